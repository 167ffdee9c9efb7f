// Products of few rows: 16 rows by up to 32 columns, C = A B', as fast as the weights B arrive.
//
// Both operands go from global memory straight to registers, 16 bytes a lane: there is no reuse that shared memory
// could serve, and every load is independent of every other. In a step of 32 numbers along k, lane t of four holds
// numbers 8t to 8t + 7 of a row. Two m16n8k16 take them as if they were the columns they want: a sum over k does not
// care for the order, as long as A and B are permuted alike. The block's warps split k and add up in shared memory, in
// a fixed order. Weights do not depend on the previous kernel: prefetch() has them on their way while it still runs.
#pragma once

#include "instructions.cuh"

namespace flashsloth::cuda {

// A warp's part of a product: steps part, part + parts, ... of k in steps of 32.
template <class T, int NTiles, int Ahead>
struct SkinnyWarp {
  static constexpr int kRows = 16, kColumns = 8 * NTiles, kStep = 32;

  const T* b[NTiles];  // rows of B: column 8j + lane / 4 of C
  int k, size, stride;
  uint4 ahead[Ahead][NTiles];

  // b_row(n): row n of B, `size` numbers, a multiple of 8; any readable row where C has no column n.
  template <class Row>
  __device__ SkinnyWarp(Row b_row, int size, int part, int parts)
      : k(kStep * part + threadIdx.x % 4 * 8), size(size), stride(kStep * parts) {
#pragma unroll
    for (int j = 0; j < NTiles; ++j) b[j] = b_row(8 * j + static_cast<int>(threadIdx.x) % 32 / 4);
  }

  __device__ void prefetch() {
#pragma unroll
    for (int i = 0; i < Ahead; ++i)
#pragma unroll
      for (int j = 0; j < NTiles; ++j)
        ahead[i][j] = k + i * stride < size ? load_streaming16(b[j] + k + i * stride) : uint4{0, 0, 0, 0};
  }

  // After prefetch: acc += A B'. a_row(m): row m of A, any readable row where there is none. change(a, k): makes 8
  // numbers of rows lane / 4 and that + 8, from column k, what they are in the product.
  template <class Row, class Change>
  __device__ void multiply(float (&acc)[NTiles][4], Row a_row, Change change) {
    const int g = threadIdx.x % 32 / 4;
    const T* const rows[2] = {a_row(g), a_row(g + 8)};
    while (true) {
      uint4 a[Ahead][2];
#pragma unroll
      for (int i = 0; i < Ahead; ++i)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
          a[i][upper] =
              k + i * stride < size ? *reinterpret_cast<const uint4*>(rows[upper] + k + i * stride) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < Ahead; ++i) {
        if (k + i * stride < size) change(a[i], k + i * stride);
        const uint32_t first[4] = {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y};
        const uint32_t second[4] = {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w};
#pragma unroll
        for (int j = 0; j < NTiles; ++j) {
          mma_m16n8k16<T>(acc[j], first, ahead[i][j].x, ahead[i][j].y);
          mma_m16n8k16<T>(acc[j], second, ahead[i][j].z, ahead[i][j].w);
        }
      }
      k += Ahead * stride;
      if (k - static_cast<int>(threadIdx.x) % 4 * 8 >= size) return;  // the same for the warp
      prefetch();
    }
  }

  template <class Row>
  __device__ void multiply(float (&acc)[NTiles][4], Row a_row) {
    multiply(acc, a_row, [](uint4(&)[2], int) {});
  }

  // The accumulator as (16, kColumns) numbers, rows `row_stride` apart.
  __device__ static void store(const float (&acc)[NTiles][4], float* to, int row_stride) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NTiles; ++j) {
      *reinterpret_cast<float2*>(to + g * row_stride + 8 * j + 2 * t) = {acc[j][0], acc[j][1]};
      *reinterpret_cast<float2*>(to + (g + 8) * row_stride + 8 * j + 2 * t) = {acc[j][2], acc[j][3]};
    }
  }
};

// The whole of it by a block: after add(), thread i has columns 2 (i % kPairs) and the next of row i / kPairs.
template <class T, int NTiles>
struct SkinnyGemm {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kRows = 16, kColumns = 8 * NTiles, kPairs = 4 * NTiles;
  static constexpr int kSharedBytes = kWarps * kRows * kColumns * 4;
  static_assert(kRows * kPairs <= kThreads, "a pair a thread");
  using Warp = SkinnyWarp<T, NTiles, 5>;

  __device__ static bool has_pair() { return threadIdx.x < kRows * kPairs; }
  __device__ static int row() { return threadIdx.x / kPairs; }
  __device__ static int column() { return threadIdx.x % kPairs * 2; }

  // Sums what the warps have. Ends with shared memory still in use.
  __device__ static float2 add(const float (&acc)[NTiles][4], float* shared) {
    Warp::store(acc, shared + threadIdx.x / 32 * (kRows * kColumns), kColumns);
    __syncthreads();
    float2 sum = {0.0f, 0.0f};
    if (!has_pair()) return sum;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const float2 part = *reinterpret_cast<const float2*>(shared + (warp * kRows + row()) * kColumns + column());
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }
};

}  // namespace flashsloth::cuda
