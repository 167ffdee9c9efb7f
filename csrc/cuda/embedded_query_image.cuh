// Embedded-query attention: the queries read the image. Scores of all keys, then the image averaged by their softmax.
#pragma once

#include "embedded_query_parts.cuh"
#include "tile_gemm.cuh"

namespace flashsloth::cuda::query {

// All rows of an image by 64 keys. What is kept of a score is exp(score - largest of the row in the tile), at most 1
// and so as precise in the type of the operands as it can be; the largest and the sum are in fp32.
template <class T>
struct ScoresTile : TileGemm<T, 32, 64, BLayout::columns_by_k> {
  using Gemm = TileGemm<T, 32, 64, BLayout::columns_by_k>;
  static_assert(Gemm::kColumns == kKeyTile, "a block's columns share a largest score");
};

// Block (x, y, z): keys from 64 x, rows from 32 y, image z.
template <class T>
__global__ void __launch_bounds__(ScoresTile<T>::kThreads)
    embedded_query_scores_kernel(const __grid_constant__ QueryParams<T> p) {
  using Tile = ScoresTile<T>;
  grid_dependency_launch();
  const int first_key = blockIdx.x * kKeyTile, first_row = blockIdx.y * Tile::kRows, rows = p.image_rows();
  const int64_t row_offset = static_cast<int64_t>(blockIdx.z) * rows,
                key_offset = static_cast<int64_t>(blockIdx.z) * p.tokens;
  float acc[4][4] = {};
  Tile::run(
      acc, p.inner, 0,
      [&](int m) { return first_row + m < rows ? p.asked + (row_offset + first_row + m) * p.inner : nullptr; },
      [&](int n) { return first_key + n < p.tokens ? p.y + (key_offset + first_key + n) * p.inner : nullptr; },
      [](int) {});
  __syncthreads();  // the stages are free: largest scores and sums of 32 columns each go there, (2, rows)

  float* const largest = reinterpret_cast<float*>(dynamic_shared());
  float* const sums = largest + 2 * Tile::kRows;
  const int half = threadIdx.x / 32 % 2;
  float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + Tile::column(j) + i % 2;
      acc[j][i] = key < p.tokens ? acc[j][i] * p.rstd[key_offset + key] : -INFINITY;
      peak[i / 2] = fmaxf(peak[i / 2], acc[j][i]);
    }
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    peak[upper] = warp_max<4>(peak[upper]);
    if (threadIdx.x % 4 == 0) largest[half * Tile::kRows + Tile::row() + 8 * upper] = peak[upper];
  }
  __syncthreads();
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int in_tile = Tile::row() + 8 * upper, row = first_row + in_tile;
    peak[upper] = fmaxf(peak[upper], largest[(1 - half) * Tile::kRows + in_tile]);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 prob = {exp2_approx((acc[j][2 * upper] - peak[upper]) * kLog2E),
                           exp2_approx((acc[j][2 * upper + 1] - peak[upper]) * kLog2E)};
      sum += prob.x + prob.y;
      if (row < rows)
        store_pair(p.probs + (row_offset + row) * p.tiles() * kKeyTile + first_key + Tile::column(j), prob);
    }
    sum = warp_sum<4>(sum);
    if (threadIdx.x % 4 == 0) sums[half * Tile::kRows + in_tile] = sum;
  }
  __syncthreads();
  const int in_tile = threadIdx.x, row = first_row + in_tile;
  if (in_tile >= Tile::kRows || row >= rows) return;
  p.peaks[(row_offset + row) * p.tiles() + blockIdx.x] = {fmaxf(largest[in_tile], largest[Tile::kRows + in_tile]),
                                                          sums[in_tile] + sums[Tile::kRows + in_tile]};
}

template <class T>
struct PooledTile : TileGemm<T, 48, 64, BLayout::k_by_columns> {
  using Gemm = TileGemm<T, 48, 64, BLayout::k_by_columns>;
  static_assert(Gemm::kDepth == kKeyTile, "a stage has one factor a row");
};

// Block (x, y, z): columns from 64 x, rows from 48 y, image z. Each tile of keys comes with its own largest score: its
// product is scaled to that of the row as it is added.
template <class T>
__global__ void __launch_bounds__(PooledTile<T>::kThreads)
    embedded_query_pooled_kernel(const __grid_constant__ QueryParams<T> p) {
  using Tile = PooledTile<T>;
  grid_dependency_launch();
  const int first_column = blockIdx.x * Tile::kColumns, first_row = blockIdx.y * Tile::kRows, rows = p.image_rows();
  const int64_t row_offset = static_cast<int64_t>(blockIdx.z) * rows,
                key_offset = static_cast<int64_t>(blockIdx.z) * p.tokens;
  const int tiles = p.tiles();
  const auto global_row = [&](int in_tile) { return row_offset + min(first_row + in_tile, rows - 1); };

  float acc[4][4] = {}, sum[4][4] = {};
  float2 softmax[2];  // largest and total of this thread's rows
  Tile::run(
      acc, p.tokens, p.dim,
      [&](int m) { return first_row + m < rows ? p.probs + global_row(m) * tiles * kKeyTile : nullptr; },
      [&](int k) { return k < p.tokens ? p.image + (key_offset + k) * p.dim + first_column : nullptr; },
      [&](int first_key) {
        if (first_key == 0) {
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const float2* const peaks = p.peaks + global_row(Tile::row() + 8 * upper) * tiles;
            float peak = -INFINITY, total = 0.0f;  // the four lanes of a row share its tiles
            for (int i = threadIdx.x % 4; i < tiles; i += 4) peak = fmaxf(peak, peaks[i].x);
            peak = warp_max<4>(peak);
            for (int i = threadIdx.x % 4; i < tiles; i += 4)
              total += peaks[i].y * exp2_approx((peaks[i].x - peak) * kLog2E);
            softmax[upper] = {peak, warp_sum<4>(total)};
          }
        }
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const float peak = p.peaks[global_row(Tile::row() + 8 * upper) * tiles + first_key / kKeyTile].x;
          const float factor = exp2_approx((peak - softmax[upper].x) * kLog2E);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 2 * upper; i < 2 * upper + 2; ++i) {
              sum[j][i] += factor * acc[j][i];
              acc[j][i] = 0.0f;
            }
          }
        }
      });

#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int in_tile = Tile::row() + 8 * upper;
    if (first_row + in_tile >= rows) continue;
    const int64_t row = row_offset + first_row + in_tile;
    if (blockIdx.x == 0 && threadIdx.x / 32 % 2 == 0 && threadIdx.x % 4 == 0) p.softmax[row] = softmax[upper];
    const float share = 1.0f / softmax[upper].y;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + Tile::column(j);
      if (column >= p.dim) continue;
      const float2 pooled = {sum[j][2 * upper] * share, sum[j][2 * upper + 1] * share};
      store_pair(p.pooled_rows + row * p.dim + column, pooled);
      if (p.pooled != nullptr) *reinterpret_cast<float2*>(p.pooled + row * p.dim + column) = pooled;
    }
  }
}

// Block (x, y): key tile x of query row y. The attention averaged over heads.
template <class T>
__global__ void __launch_bounds__(kKeyTile) embedded_query_weights_kernel(const __grid_constant__ QueryParams<T> p) {
  grid_dependency_wait();
  const int key = blockIdx.x * kKeyTile + threadIdx.x, tiles = p.tiles();
  float sum = 0.0f;
#pragma unroll 4
  for (int head = 0; head < p.heads; ++head) {
    const int64_t row = static_cast<int64_t>(blockIdx.y) * p.heads + head;
    const float2 softmax = p.softmax[row];
    const float factor = exp2_approx((p.peaks[row * tiles + blockIdx.x].x - softmax.x) * kLog2E) / softmax.y;
    sum += factor * static_cast<float>(p.probs[row * tiles * kKeyTile + key]);
  }
  if (key < p.tokens) p.weights[static_cast<int64_t>(blockIdx.y) * p.tokens + key] = sum / static_cast<float>(p.heads);
}

}  // namespace flashsloth::cuda::query
