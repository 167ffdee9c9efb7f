// Products of a warpgroup, done when they are waited for. Included by emulator.cpp.
#include "../../csrc/cuda/wgmma.cuh"

#include "machine.h"

namespace flashsloth::emulator {

namespace {

// The fields of a descriptor, and where element (mn, k) of its operand lies.
struct Descriptor {
  uint32_t start, leading, stride, swizzle_bits;
  bool mn_major;

  Descriptor(uint64_t bits, bool mn_major_) : mn_major(mn_major_) {
    constexpr uint32_t kBitsOfMode[4] = {0, 3, 2, 1};
    start = static_cast<uint32_t>(bits & 0x3FFF) << 4;
    leading = static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4;
    stride = static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4;
    swizzle_bits = kBitsOfMode[bits >> 62];
    if ((bits >> 49 & 7) != 0) fail("wgmma: a descriptor's base offset is not modelled, align the swizzle's pattern");
  }

  // In chunks of 8 elements (16 bytes) along the major dimension.
  uint32_t chunk(uint32_t mn, uint32_t k) const {
    const uint32_t width = 1u << swizzle_bits;  // of the swizzle's rows, in chunks
    uint32_t offset;
    if (!mn_major) {
      const uint32_t next = swizzle_bits == 0 ? leading : 16;
      offset = mn % 8 * width * 16 + mn / 8 * stride + k / 8 * next;
    } else if (swizzle_bits == 0) {
      offset = mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      offset = mn / 8 % width * 16 + mn / 8 / width * leading + k % 8 * width * 16 + k / 8 * stride;
    }
    const uint32_t address = start + offset;
    return address ^ (address >> 7 & (width - 1)) << 4;
  }
};

// Rows x 16 of an operand as floats, [k][row] as the product below wants them.
void gather(Block& block, const Descriptor& descriptor, bool is_bf16, uint32_t rows, float* out, const char* what) {
  uint16_t chunk[8];
  if (descriptor.mn_major) {
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t mn = 0; mn < rows; mn += 8) {
        std::memcpy(chunk, shared_bytes(block, descriptor.chunk(mn, k), 16, 16, what), 16);
        for (uint32_t i = 0; i < 8; ++i) out[k * rows + mn + i] = element_to_float(chunk[i], is_bf16);
      }
  } else {
    for (uint32_t mn = 0; mn < rows; ++mn)
      for (uint32_t k = 0; k < 16; k += 8) {
        std::memcpy(chunk, shared_bytes(block, descriptor.chunk(mn, k), 16, 16, what), 16);
        for (uint32_t i = 0; i < 8; ++i) out[(k + i) * rows + mn] = element_to_float(chunk[i], is_bf16);
      }
  }
}

void multiply(const std::vector<Thread*>& threads, size_t group, size_t index) {
  const Wgmma& first = threads[0]->product_groups[group][index];
  Block& block = *threads[0]->in;
  const auto n = static_cast<uint32_t>(first.registers) * 2;
  std::vector<float> a(16 * 64), b(16 * n), d(64 * n);
  gather(block, Descriptor(first.b_descriptor, first.b_mn_major), first.bf16, n, b.data(), "wgmma, operand B");
  if (!first.a_in_registers)
    gather(block, Descriptor(first.a_descriptor, first.a_mn_major), first.bf16, 64, a.data(), "wgmma, operand A");

  for (uint32_t thread = 0; thread < 128; ++thread) {
    const Wgmma& own = threads[thread]->product_groups[group][index];
    if (own.registers != first.registers || own.a_descriptor != first.a_descriptor ||
        own.b_descriptor != first.b_descriptor || own.accumulate != first.accumulate || own.bf16 != first.bf16 ||
        own.a_in_registers != first.a_in_registers || own.a_mn_major != first.a_mn_major ||
        own.b_mn_major != first.b_mn_major)
      fail("wgmma: threads 0 and %u of the warpgroup disagree on its operands", thread);
    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    if (own.a_in_registers)
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t half = 0; half < 2; ++half)
          a[(column + i / 2 * 8 + half) * 64 + row + i % 2 * 8] =
              element_to_float(static_cast<uint16_t>(own.a[i] >> 16 * half), own.bf16);
    const std::vector<float>& values = threads[thread]->accumulators.at(own.d).values;
    for (uint32_t i = 0; i < n / 2; ++i)
      d[(row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2] = own.accumulate ? values[i] : 0.0f;
  }
  for (uint32_t m = 0; m < 64; ++m)
    for (uint32_t k = 0; k < 16; ++k) {
      const float factor = a[k * 64 + m];
      for (uint32_t j = 0; j < n; ++j) d[m * n + j] += factor * b[k * n + j];
    }
  for (uint32_t thread = 0; thread < 128; ++thread) {
    Wgmma& own = threads[thread]->product_groups[group][index];
    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    const auto found = threads[thread]->accumulators.find(own.d);
    for (uint32_t i = 0; i < n / 2; ++i)
      found->second.values[i] = d[(row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2];
    if (--found->second.products > 0) continue;
    std::copy(found->second.values.begin(), found->second.values.end(), own.d);
    threads[thread]->accumulators.erase(found);
  }
}

void finish_wait(const std::vector<Thread*>& threads, int pending) {
  const size_t groups = threads[0]->product_groups.size();
  for (Thread* thread : threads)
    if (thread->product_groups.size() != groups) fail("wgmma_wait: threads of the warpgroup committed differently");
  const size_t done = groups > static_cast<size_t>(pending) ? groups - static_cast<size_t>(pending) : 0;
  for (size_t group = 0; group < done; ++group) {
    const size_t products = threads[0]->product_groups[group].size();
    for (Thread* thread : threads)
      if (thread->product_groups[group].size() != products)
        fail("wgmma_wait: threads of the warpgroup issued different products");
    for (size_t index = 0; index < products; ++index) multiply(threads, group, index);
  }
  for (Thread* thread : threads)
    thread->product_groups.erase(thread->product_groups.begin(),
                                 thread->product_groups.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

void wgmma_fence() {
  machine().require(90, "wgmma_fence");
  self().wgmma_fenced = true;
}

void wgmma(bool is_bf16, float* d, int registers, const uint32_t* a_registers, uint64_t a, Major a_major, uint64_t b,
           Major b_major, bool accumulate) {
  Thread& thread = self();
  if (!thread.wgmma_fenced) fail("wgmma: no wgmma_fence since the last group");
  Wgmma product{
      d, registers, a_registers != nullptr, accumulate, is_bf16, a_major == Major::mn, b_major == Major::mn, {}, a, b};
  if (a_registers != nullptr) std::copy(a_registers, a_registers + 4, product.a);
  Accumulator& accumulator = thread.accumulators[d];
  if (accumulator.products == 0) {
    accumulator.values.assign(d, d + registers);
    std::memset(d, kPoison, sizeof(float) * static_cast<size_t>(registers));
  } else if (accumulator.values.size() != static_cast<size_t>(registers)) {
    fail("wgmma: the accumulators are at work in a product of another width");
  }
  ++accumulator.products;
  thread.products.push_back(product);
}

void wgmma_commit() {
  Thread& thread = self();
  thread.wgmma_fenced = false;
  thread.product_groups.push_back(std::move(thread.products));
  thread.products.clear();
}

void wgmma_wait_pending(int pending) { warpgroup_collective("wgmma_wait", pending, finish_wait); }

}  // namespace flashsloth::cuda
