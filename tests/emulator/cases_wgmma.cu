// Cases of csrc/cuda/wgmma.cuh: every swizzle, both majors, operands in shared memory and registers.
#include "cases.h"
#include "wgmma.cuh"

namespace flashsloth::cuda::cases {
namespace {

constexpr int kDepth = 64;  // k

// An operand of `rows` x kDepth elements in shared memory, as wgmma.cuh lays it out.
template <Swizzle S, Major M>
struct Operand {
  static constexpr uint32_t kWidth = row_bytes(S);
  uint32_t start, rows;

  __host__ __device__ static constexpr uint32_t bytes(uint32_t rows) {
    return M == Major::k ? rows * kDepth * 2 : (rows * 2 + kWidth - 1) / kWidth * kWidth * kDepth;
  }

  // The byte, from the start, of element (mn, k).
  __device__ uint32_t byte(uint32_t mn, uint32_t k) const {
    const uint32_t line = M == Major::k ? mn : k, along = (M == Major::k ? k : mn) * 2;
    const uint32_t lines = M == Major::k ? rows : kDepth;
    const uint32_t offset = along / kWidth * lines * kWidth + line * kWidth + along % kWidth;
    return swizzled(offset, S);
  }

  // The descriptor of the 16 k from `k` on.
  __device__ uint64_t descriptor(uint32_t k) const {
    if constexpr (M == Major::k) {
      const uint32_t along = k * 2, at = start + along / kWidth * rows * kWidth + along % kWidth;
      return wgmma_descriptor(at, S, rows * kWidth, 8 * kWidth);
    } else {
      const uint32_t at = start + k * kWidth, column = kDepth * kWidth, group = 8 * kWidth;
      return S == Swizzle::none ? wgmma_descriptor(at, S, group, column) : wgmma_descriptor(at, S, column, group);
    }
  }
};

// C (64 x N) = A (64 x 64, [m][k]) B (stored [n][k]), in two committed groups of which the first is waited for alone.
template <class T, Swizzle S, Major A, Major B, int N, bool InRegisters>
__global__ void wgmma_product(float* c, const uint16_t* a, const uint16_t* b) {
  if constexpr (kHasSm90a) {
    char* memory = dynamic_shared();
    const Operand<S, A> a_tile{shared_address(memory), 64};
    const Operand<S, B> b_tile{a_tile.start + Operand<S, A>::bytes(64), N};
    const uint32_t thread = threadIdx.x;
    for (uint32_t i = thread; i < 64 * kDepth; i += 128)
      *reinterpret_cast<uint16_t*>(memory + a_tile.byte(i / kDepth, i % kDepth)) = a[i];
    for (uint32_t i = thread; i < N * kDepth; i += 128)
      *reinterpret_cast<uint16_t*>(memory + (b_tile.start - a_tile.start) + b_tile.byte(i / kDepth, i % kDepth)) = b[i];
    fence_proxy_async();
    __syncthreads();

    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    uint32_t fragments[kDepth / 16][4];
    if constexpr (InRegisters) {
      for (uint32_t k = 0; k < kDepth / 16; ++k)
        for (uint32_t i = 0; i < 4; ++i)
          fragments[k][i] =
              *reinterpret_cast<const uint32_t*>(a + (row + i % 2 * 8) * kDepth + k * 16 + column + i / 2 * 8);
    }
    float d[N / 2];
    for (int half = 0; half < 2; ++half) {
      wgmma_fence();
#pragma unroll
      for (int k = 2 * half; k < 2 * half + 2; ++k) {
        if constexpr (InRegisters) {
          wgmma_rs<T, B>(d, fragments[k], b_tile.descriptor(k * 16), k > 0);
        } else {
          wgmma_ss<T, A, B>(d, a_tile.descriptor(k * 16), b_tile.descriptor(k * 16), k > 0);
        }
      }
      wgmma_commit();
    }
    wgmma_wait<1>();
    wgmma_wait<0>();
    for (uint32_t i = 0; i < N / 2; ++i) c[(row + i % 4 / 2 * 8) * N + i / 4 * 8 + column + i % 2] = d[i];
  }
}

template <class T, Swizzle S, Major A, Major B, int N, bool InRegisters>
void run(const Arguments& in) {
  const size_t bytes = Operand<S, A>::bytes(64) + Operand<S, B>::bytes(N);
  launch_kernel("wgmma_product", wgmma_product<T, S, A, B, N, InRegisters>,
                {.grid = {1}, .block = {128}, .shared_bytes = bytes}, in.array<float>(0), in.array<uint16_t>(1),
                in.array<uint16_t>(2));
}

// wgmma_<swizzle bytes>_<majors of A and B>, the latter for every width below and both types.
template <Swizzle S>
void register_majors(const std::string& name) {
  registry()[name + "_kk"] = run<bf16, S, Major::k, Major::k, 64, false>;
  registry()[name + "_km"] = run<bf16, S, Major::k, Major::mn, 64, false>;
  registry()[name + "_mk"] = run<bf16, S, Major::mn, Major::k, 128, false>;
  registry()[name + "_mm"] = run<bf16, S, Major::mn, Major::mn, 128, false>;
}

template <int... N>
void register_widths() {
  ((registry()["wgmma_width_" + std::to_string(N)] = run<bf16, Swizzle::bytes128, Major::k, Major::k, N, false>), ...);
  ((registry()["wgmma_mn_width_" + std::to_string(N)] = run<fp16, Swizzle::bytes32, Major::k, Major::mn, N, true>),
   ...);
}

const bool registered = [] {
  register_majors<Swizzle::bytes128>("wgmma_128");
  register_majors<Swizzle::bytes64>("wgmma_64");
  register_majors<Swizzle::bytes32>("wgmma_32");
  register_majors<Swizzle::none>("wgmma_16");
  register_widths<16, 32, 64, 80, 96, 128, 144, 160, 192, 256>();
  registry()["wgmma_width_8"] = run<bf16, Swizzle::bytes128, Major::k, Major::k, 8, false>;
  registry()["wgmma_width_72"] = run<bf16, Swizzle::bytes128, Major::k, Major::k, 72, false>;
  registry()["wgmma_width_72_columns"] = run<bf16, Swizzle::bytes128, Major::k, Major::mn, 72, true>;
  registry()["wgmma_registers_k"] = run<fp16, Swizzle::bytes64, Major::k, Major::k, 80, true>;
  return true;
}();

#if defined(FLASHSLOTH_EMULATE)  // a GPU would give any numbers
enum Mistake { no_wait, no_proxy_fence, no_fence, too_far };

__global__ void wrong_wgmma(float* out, int mistake) {
  auto* memory = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (uint32_t i = threadIdx.x; i < 2048; i += 128) memory[i] = 0;
  if (mistake != no_proxy_fence) fence_proxy_async();
  __syncthreads();
  const uint64_t operand =
      wgmma_descriptor(shared_address(memory), Swizzle::bytes128, 0, mistake == too_far ? 2048 : 1024);
  float d[32] = {};
  if (mistake != no_fence) wgmma_fence();
  wgmma_ss<bf16, Major::k, Major::k>(d, operand, operand, false);
  wgmma_commit();
  if (mistake == no_wait) out[threadIdx.x] = d[0];
  wgmma_wait<0>();
  if (mistake != no_wait) out[threadIdx.x] = d[0];
}

const Registered run_wrong("wrong_wgmma", [](const Arguments& in) {
  launch_kernel("wrong_wgmma", wrong_wgmma, {.grid = {1}, .block = {128}, .shared_bytes = 8192}, in.array<float>(0),
                in.numbers[0]);
});
#endif

}  // namespace
}  // namespace flashsloth::cuda::cases
