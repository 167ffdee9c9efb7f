// What the kernels build from the instructions: packed conversions, reductions of a warp, products of fp32 accuracy
// from tf32, the block that comes last. Included by instructions.cuh.
#pragma once

#include <cstring>

#include "instructions.cuh"

namespace flashsloth::cuda {

// The same bits as another type of the same size.
template <class To, class From>
__device__ __forceinline__ To reinterpret_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "reinterpret_bits keeps the size");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// Two numbers as a register of packed T (bf16 or fp16, rounded to nearest even), `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "pack2 takes bf16 or fp16");
  std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2> pair;
  if constexpr (std::is_same_v<T, bf16>) {
    pair = __floats2bfloat162_rn(low, high);
  } else {
    pair = __floats2half2_rn(low, high);
  }
  return reinterpret_bits<uint32_t>(pair);
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "unpack2 takes bf16 or fp16");
  if constexpr (std::is_same_v<T, bf16>) {
    return __bfloat1622float2(reinterpret_bits<__nv_bfloat162>(packed));
  } else {
    return __half22float2(reinterpret_bits<__half2>(packed));
  }
}

// Sum or maximum over groups of `Width` neighbouring lanes (4: the lanes that share a row of an mma accumulator); every
// lane gets it. The order of additions does not depend on the lane, so all lanes hold the same bits.
template <int Width = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

template <int Width = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

// x = big + small + an error of about 2^-22 |x|, both in tf32.
__device__ __forceinline__ void split_tf32(float x, uint32_t& big, uint32_t& small) {
  big = to_tf32(x);
  small = to_tf32(x - __uint_as_float(big));
}

// D += A B to fp32 accuracy by three tf32 products of the split operands; small * small is below fp32's own rounding.
__device__ __forceinline__ void mma_m16n8k8_3xtf32(float (&d)[4], const uint32_t (&a_big)[4],
                                                   const uint32_t (&a_small)[4], const uint32_t (&b_big)[2],
                                                   const uint32_t (&b_small)[2]) {
  mma_m16n8k8_tf32(d, a_small, b_big[0], b_big[1]);
  mma_m16n8k8_tf32(d, a_big, b_small[0], b_small[1]);
  mma_m16n8k8_tf32(d, a_big, b_big[0], b_big[1]);
}

__device__ __forceinline__ void mma_m16n8k8_3xtf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  uint32_t a_big[4], a_small[4], b_big[2], b_small[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32(a[i], a_big[i], a_small[i]);
  split_tf32(b0, b_big[0], b_small[0]);
  split_tf32(b1, b_big[1], b_small[1]);
  mma_m16n8k8_3xtf32(d, a_big, a_small, b_big, b_small);
}

// For reductions split over blocks: every thread of `blocks` blocks calls it once its block has written its part, and
// it is true in the block that came last, which then sees all parts. The counter starts at zero and ends there, so
// the next launch, or the replay of a graph, finds it ready.
__device__ __forceinline__ bool last_block(uint32_t* counter, uint32_t blocks) {
  __syncthreads();  // the block's writes come before the fence of the one thread that counts it
  bool last = false;
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

}  // namespace flashsloth::cuda
