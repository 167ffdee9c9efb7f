// Shared memory, asynchronous copies and matrix products of a warp. Included by emulator.cpp.
#include "../../csrc/cuda/instructions.cuh"
#include "machine.h"

namespace flashsloth::emulator {

char* shared_bytes(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address % alignment != 0)
    fail("%s: shared address %u (byte %d of the block's) is not a multiple of %u", what, address,
         static_cast<int>(address) - static_cast<int>(kSharedBase), alignment);
  if (address < kSharedBase || address + bytes > kSharedBase + block.shared_bytes)
    fail("%s: bytes %d to %d are not in the block's %u bytes of shared memory", what,
         static_cast<int>(address) - static_cast<int>(kSharedBase),
         static_cast<int>(address + bytes) - static_cast<int>(kSharedBase), block.shared_bytes);
  return block.shared + (address - kSharedBase);
}

const char* proxy_bytes(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  const std::ptrdiff_t offset = shared_bytes(block, address, bytes, alignment, what) - block.shared;
  if (block.proxy_fenced) std::memcpy(block.proxy, block.shared, block.shared_bytes);
  block.proxy_fenced = false;
  return block.proxy + offset;
}

void proxy_write(Block& block, uint32_t address, const void* from, uint32_t bytes) {
  std::memcpy(block.shared + (address - kSharedBase), from, bytes);
  std::memcpy(block.proxy + (address - kSharedBase), from, bytes);
}

float half_to_float(uint16_t bits) {
  // Exponent and mantissa shifted into place, then rescaled: exact for normal and subnormal numbers.
  float out = bit_cast<float>(static_cast<uint32_t>(bits & 0x7FFFu) << 13) * 0x1p112f;
  uint32_t word = bit_cast<uint32_t>(out);
  if ((bits & 0x7C00u) == 0x7C00u) word |= 0x7F800000u;
  return bit_cast<float>(word | static_cast<uint32_t>(bits & 0x8000u) << 16);
}

void land_copies(Thread& thread, size_t end) {
  for (; thread.copies_landed < end; ++thread.copies_landed) {
    const CpAsync& copy = thread.copies[thread.copies_landed];
    char* to = shared_bytes(*thread.in, copy.shared, 16, 16, "cp_async16");
    if (copy.valid) {
      std::memcpy(to, copy.global, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
}

namespace {

struct Ldmatrix {
  uint32_t row;
  uint32_t* registers;
  int matrices;
  bool transposed;
};

void ldmatrix_finish(WarpOperands operands, unsigned) {
  const auto& first = *static_cast<const Ldmatrix*>(operands[0]);
  for (int m = 0; m < first.matrices; ++m) {
    uint16_t matrix[8][8];
    for (int i = 0; i < 8; ++i) {
      const uint32_t address = static_cast<const Ldmatrix*>(operands[m * 8 + i])->row;
      std::memcpy(matrix[i], shared_bytes(address, 16, 16, "ldmatrix"), 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = first.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = first.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<const Ldmatrix*>(operands[lane])->registers[m] = high << 16 | low;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// D (16 x 8) += A (16 x K) B (K x 8), gathered from and scattered to the lanes' accumulators.
template <int K>
void multiply(WarpOperands operands, const float (&a)[16][K], const float (&b)[K][8]) {
  float d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const float* own = static_cast<const Mma*>(operands[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) d[g + i / 2 * 8][2 * t + i % 2] = own[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    float* own = static_cast<const Mma*>(operands[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) own[i] = d[g + i / 2 * 8][2 * t + i % 2];
  }
}

template <bool Bf16>
void mma_finish(WarpOperands operands, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] =
            element_to_float(static_cast<uint16_t>(own.a[i] >> 16 * half), Bf16);
      for (int i = 0; i < 2; ++i)
        b[2 * t + i * 8 + half][g] = element_to_float(static_cast<uint16_t>(own.b[i] >> 16 * half), Bf16);
    }
  }
  multiply(operands, a, b);
}

void mma_tf32_finish(WarpOperands operands, unsigned) {
  constexpr uint32_t kKept = ~0x1FFFu;
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const Mma*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = bit_cast<float>(own.a[i] & kKept);
    for (int i = 0; i < 2; ++i) b[t + i * 4][g] = bit_cast<float>(own.b[i] & kKept);
  }
  multiply(operands, a, b);
}

}  // namespace

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

char* dynamic_shared() { return self().in->shared; }

uint32_t shared_address(const void* pointer) {
  const Block& block = *self().in;
  const std::ptrdiff_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < 0 || offset > static_cast<std::ptrdiff_t>(block.shared_bytes))
    fail("shared_address: the pointer is not into the block's shared memory");
  return kSharedBase + static_cast<uint32_t>(offset);
}

void ldmatrix(const char* what, uint32_t* registers, uint32_t row, int matrices, bool transposed) {
  Ldmatrix operand{row, registers, matrices, transposed};
  warp_collective(what, kFullWarp, &operand, ldmatrix_finish);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma operand{d, a, {b0, b1}};
  warp_collective("mma_m16n8k16 bf16", kFullWarp, &operand, mma_finish<true>);
}

void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma operand{d, a, {b0, b1}};
  warp_collective("mma_m16n8k16 fp16", kFullWarp, &operand, mma_finish<false>);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma operand{d, a, {b0, b1}};
  warp_collective("mma_m16n8k8_tf32", kFullWarp, &operand, mma_tf32_finish);
}

uint32_t to_tf32(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7F800000u) == 0x7F800000u) return bits;  // infinity, NaN
  return (bits + 0x1000u) & ~0x1FFFu;
}

float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

void cp_async16(uint32_t shared, const void* global, bool valid) {
  Thread& thread = self();
  std::memset(shared_bytes(shared, 16, 16, "cp_async16"), kPoison, 16);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("cp_async16: global address %p is not a multiple of 16", global);
  if (thread.copies_landed == thread.copies.size() && thread.copy_groups.empty()) {
    thread.copies.clear();
    thread.copies_landed = 0;
  }
  thread.copies.push_back({shared, global, valid});
}

void cp_async_commit() { self().copy_groups.push_back(self().copies.size()); }

void cp_async_wait_pending(int pending) {
  Thread& thread = self();
  const size_t keep = static_cast<size_t>(pending);
  if (thread.copy_groups.size() <= keep) return;
  const size_t done = thread.copy_groups.size() - keep;
  land_copies(thread, thread.copy_groups[done - 1]);
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + static_cast<std::ptrdiff_t>(done));
}

void grid_dependency_wait() { machine().dependency_waited(); }

uint4 load_streaming16(const void* global) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("load_streaming16: address %p is not a multiple of 16", global);
  uint4 v;
  std::memcpy(&v, global, sizeof v);
  return v;
}

void store_streaming16(void* global, uint4 v) {
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("store_streaming16: address %p is not a multiple of 16", global);
  std::memcpy(global, &v, sizeof v);
}

uint32_t load_acquire(const uint32_t* counter) {
  machine().spin("load_acquire");
  Thread& thread = self();
  const uint32_t value = *static_cast<const volatile uint32_t*>(counter);
  if (thread.acquired != counter || thread.acquired_value != value) machine().looked_elsewhere();
  thread.acquired = counter;
  thread.acquired_value = value;
  return value;
}

void add_release(uint32_t* counter, uint32_t value) {
  *counter += value;
  machine().progress();
}

}  // namespace flashsloth::cuda
