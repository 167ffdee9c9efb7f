// Spatial attention pooling in two kernels, for every GPU from sm_80, every shape and packed images.
//
// Scores: a block takes 64 tokens and 128 hidden units, so that one image of 27x27x1152 gives 12 x 9 = 108 blocks. Its
// part of the scores goes to scratch. Windows: a warp takes a window and 256 columns, adds the parts, and pools. It is
// launched over the tail of the first kernel, and loads its part of x before it waits for the scores.
#pragma once

#include "spatial_pool_parts.cuh"

namespace flashsloth::cuda {

struct ScoresTile {
  static constexpr int kTokens = 64, kUnits = 128, kDepth = 64, kStages = 4;
  static constexpr int kWarpsDown = 2, kWarpsAcross = 4, kThreads = 32 * kWarpsDown * kWarpsAcross;
  static constexpr int kRowBytes = 2 * kDepth;
  static constexpr int kStageBytes = (kTokens + kUnits) * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
};

constexpr int kWindowsThreads = 128, kWindowColumns = 32 * 8;

namespace detail {

// Where 16-byte piece `piece` of row `row` lies: pieces are exchanged so that eight rows' pieces use all banks.
__device__ inline uint32_t swizzled(int row, int piece) {
  return static_cast<uint32_t>(row * ScoresTile::kRowBytes + (piece ^ (row % 8)) * 16);
}

// Brings rows [first, first + Rows) of a (count, dim) matrix, columns from k, into the tile; zeros outside.
template <class T, bool Vector, int Rows>
__device__ inline void load_rows(char* tile, const T* matrix, int64_t first, int64_t count, int dim, int k) {
  const int piece = threadIdx.x % 8, column = k + 8 * piece;
#pragma unroll
  for (int i = 0; i < Rows * 8 / ScoresTile::kThreads; ++i) {
    const int row = threadIdx.x / 8 + i * (ScoresTile::kThreads / 8);
    const bool valid = first + row < count && column < dim;
    const T* source = matrix + (valid ? first + row : 0) * dim;
    char* const target = tile + swizzled(row, piece);
    if constexpr (Vector) {
      cp_async16(shared_address(target), source + (valid ? column : 0), valid);
    } else {
      *reinterpret_cast<uint4*>(target) = valid ? load8<T, false>(source, column, dim) : uint4{0, 0, 0, 0};
    }
  }
}

// acc += x w1' over one stage, for this warp's 32 tokens and 32 units.
template <class T>
__device__ inline void multiply_stage(float (&acc)[2][4][4], uint32_t x, uint32_t w1, int token, int unit, int lane) {
#pragma unroll
  for (int k = 0; k < ScoresTile::kDepth / 16; ++k) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) ldmatrix_x4(a[i], x + swizzled(token + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
    for (int i = 0; i < 2; ++i)
      ldmatrix_x4(b[i], w1 + swizzled(unit + 16 * i + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

}  // namespace detail

// Block (x, y): tokens from 64 x, units from 128 y. Writes partial[y][token] and the mask's words of these units.
template <class T, bool Vector>
__global__ void __launch_bounds__(ScoresTile::kThreads)
    spatial_pool_scores_kernel(const __grid_constant__ PoolParams<T> p) {
  using Tile = ScoresTile;
  grid_dependency_launch();  // the next kernel's blocks fit beside these, and wait
  char* const shared = dynamic_shared();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * Tile::kTokens;
  const int first_unit = blockIdx.y * Tile::kUnits;
  const int warp_token = warp / Tile::kWarpsAcross * 32, warp_unit = warp % Tile::kWarpsAcross * 32;

  const int steps = (p.dim + Tile::kDepth - 1) / Tile::kDepth;
  const auto load = [&](int step) {
    if (step < steps) {
      char* const stage = shared + step % Tile::kStages * Tile::kStageBytes;
      const int k = step * Tile::kDepth;
      detail::load_rows<T, Vector, Tile::kTokens>(stage, p.x, first_token, p.tokens, p.dim, k);
      detail::load_rows<T, Vector, Tile::kUnits>(stage + Tile::kTokens * Tile::kRowBytes, p.w1, first_unit, p.hidden,
                                                 p.dim, k);
    }
    cp_async_commit();
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);

  float2 b1[4], w2[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    b1[j] = load_pair(p.b1, first_unit + warp_unit + 8 * j + 2 * t, p.hidden);
    w2[j] = load_pair(p.w2, first_unit + warp_unit + 8 * j + 2 * t, p.hidden);
  }
  float acc[2][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this stage has landed, and all are done with the one that is loaded next
    load(step + Tile::kStages - 1);
    const uint32_t stage = shared_address(shared) + step % Tile::kStages * Tile::kStageBytes;
    detail::multiply_stage<T>(acc, stage, stage + Tile::kTokens * Tile::kRowBytes, warp_token, warp_unit, lane);
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free: scores of a warp's units go there, (kWarpsAcross, kTokens)

  float* const scores = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // the lane's four rows
    const int row = warp_token + 16 * (i / 2) + 8 * (i % 2) + g;
    const int64_t token = first_token + row;
    const uint64_t kept = p.drop_below == 0 ? ~uint64_t{0} : kept_units(p, token, first_unit + warp_unit, 4, lane);
    float score = 0.0f;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const pair = &acc[i / 2][j][i % 2 * 2];
      const uint32_t active = add_units(score, pair[0], pair[1], b1[j], w2[j], static_cast<uint32_t>(kept >> (2 * j)));
      bits |= active << (8 * j + 2 * t);
    }
    score = warp_sum<4>(score);
    if (t == 0) scores[warp % Tile::kWarpsAcross * Tile::kTokens + row] = score * p.keep_scale;
    if (p.mask != nullptr) {
      bits = or_of_row(bits);
      const int word = (first_unit + warp_unit) / 32;
      if (t == 0 && token < p.tokens && word < p.mask_words) p.mask[token * p.mask_words + word] = bits;
    }
  }
  __syncthreads();
  if (threadIdx.x < Tile::kTokens && first_token + threadIdx.x < p.tokens) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < Tile::kWarpsAcross; ++i) score += scores[i * Tile::kTokens + threadIdx.x];
    p.partial[blockIdx.y * p.tokens + first_token + threadIdx.x] = score;
  }
}

// Warp i of block (x, y): window 4 x + i, columns from 256 y. `parts`: of the scores.
template <class T, bool Vector>
__global__ void __launch_bounds__(kWindowsThreads, 1)
    spatial_pool_windows_kernel(const __grid_constant__ PoolParams<T> p, int parts) {
  const int lane = threadIdx.x % 32, column = kWindowColumns * blockIdx.y + 8 * lane;
  const int index = blockIdx.x * (kWindowsThreads / 32) + threadIdx.x / 32;
  if (index >= p.windows) return;
  const Window window = p.grids == nullptr ? window_of_grid(p, index) : window_of_packed(p, index);
  WindowSum<T, Vector> pooled;
  pooled.start(p, window, column);
  grid_dependency_wait();  // x is an input of both kernels; the scores are the first one's

  const int count = window.rows * window.columns;
  const auto token = [&](int i) {
    return window.first + static_cast<int64_t>(i / window.columns) * window.width + i % window.columns;
  };
  const auto score = [&](int i) {  // base 2
    float sum = 0.0f;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) sum += p.partial[part * p.tokens + token(i)];
    return sum * kLog2E;
  };
  // Lane i keeps token i; windows of more than 32 tokens compute the others' scores again where they need them.
  const float own = lane < count ? score(lane) : -INFINITY;
  float peak = own;
  for (int i = lane + 32; i < count; i += 32) peak = fmaxf(peak, score(i));
  peak = warp_max(peak);
  float total = lane < count ? exp2_approx(own - peak) : 0.0f;
  for (int i = lane + 32; i < count; i += 32) total += exp2_approx(score(i) - peak);
  const float scale = count > 0 ? 1.0f / warp_sum(total) : 0.0f;

  int i = 0;
  float weight = 0.0f;  // of token i / 32 * 32 + lane
  float sum[8];
  pooled.finish(p, window, column, sum, [&](int, int) {
    if (i % 32 == 0) {
      const int mine = i + lane;
      weight = mine < count ? exp2_approx((i == 0 ? own : score(mine)) - peak) * scale : 0.0f;
      if (blockIdx.y == 0 && mine < count) p.weights[token(mine)] = weight;
    }
    return __shfl_sync(kFullWarp, weight, i++ % 32);
  });
  if (column < p.dim) store8<T, Vector>(p.y + static_cast<int64_t>(index) * p.dim, column, p.dim, sum);
}

}  // namespace flashsloth::cuda
