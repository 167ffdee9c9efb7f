// Spatial attention pooling in one launch, for sm_90a: images of one size, rows of 16-byte multiples.
//
// A tile is a list of whole windows, its tokens window by window, so the windows of any grid fill it but for a rest. A
// cluster of eight blocks takes a tile; each block takes an eighth of the hidden units. x is brought once a cluster:
// every block loads an eighth of the tile's rows into the shared memory of all. w1 is brought once a tile. The blocks
// tell each other their parts of the scores, and each pools an eighth of the columns.
#pragma once

#include <algorithm>

#include "spatial_pool_parts.cuh"
#include "wgmma.cuh"

namespace flashsloth::cuda {

// `Units` of a block and pass over x; `Groups` warpgroups of 64 tokens each.
template <int Units, int Groups>
struct ClusterTile {
  static constexpr int kBlocks = 8, kTokens = 64 * Groups, kDepth = 64, kRowBytes = 2 * kDepth;
  static constexpr int kConsumers = 128 * Groups, kThreads = kConsumers + 32;  // and a warp that loads
  static constexpr int kXBytes = kTokens * kRowBytes, kW1Bytes = Units * kRowBytes, kStageBytes = kXBytes + kW1Bytes;

  // After the stages: parts of the scores (kBlocks, kTokens), weights and tokens of the rows (kTokens), b1 and w2
  // (Units / 2), barriers.
  static constexpr int kOtherBytes = (kBlocks + 2) * kTokens * 4 + Units * 8 + 128;
  static constexpr int kStages = std::min(8, (227 * 1024 - kOtherBytes) / kStageBytes);
  static constexpr int kSharedBytes = kStages * kStageBytes + kOtherBytes;
  static_assert(kStageBytes % 1024 == 0 && kXBytes % 1024 == 0, "the swizzle's pattern is 1024 bytes");
  static_assert(Units % 16 == 0, "blocks write halves of the mask's words");
};

// What the threads of a block know of their tile.
template <class T, int Units, int Groups>
struct ClusterBlock {
  using Tile = ClusterTile<Units, Groups>;

  const PoolParams<T>& p;
  const uint32_t rank = cluster_rank();
  const int area = p.window_height * p.window_width;
  const int first_window = static_cast<int>(blockIdx.x / Tile::kBlocks) * p.tile_windows;
  const int windows = min(p.tile_windows, p.windows - first_window);
  const int steps = (p.dim + Tile::kDepth - 1) / Tile::kDepth;  // of a pass
  const int passes = (p.hidden + Tile::kBlocks * Units - 1) / (Tile::kBlocks * Units);

  char* const stages = dynamic_shared();
  float* const parts = reinterpret_cast<float*>(stages + Tile::kStages * Tile::kStageBytes);
  float* const weights = parts + Tile::kBlocks * Tile::kTokens;
  int* const tokens = reinterpret_cast<int*>(weights + Tile::kTokens);      // -1: none in this row
  float4* const units = reinterpret_cast<float4*>(tokens + Tile::kTokens);  // b1 of two units, w2 of the two
  const uint32_t stages_at = shared_address(stages), barriers = shared_address(units + Units / 2);

  __device__ explicit ClusterBlock(const PoolParams<T>& params) : p(params) {}

  __device__ uint32_t full(int stage) const { return barriers + 16 * stage; }
  __device__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
  __device__ uint32_t stage_at(int step) const { return stages_at + step % Tile::kStages * Tile::kStageBytes; }
  __device__ int first_unit(int pass) const { return (pass * Tile::kBlocks + static_cast<int>(rank)) * Units; }

  // ---- The warp that loads ----

  __device__ void start_barriers() const {
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(full(stage), 1);
      mbarrier_init(empty(stage), Tile::kBlocks * Groups);
    }
    mbarrier_init_fence();
  }

  // Announces all that a step brings, and loads its part of w1, which is this block's own.
  __device__ void load_w1(const CUtensorMap& map, int step) const {
    const uint32_t barrier = full(step % Tile::kStages);
    mbarrier_arrive_expect_tx(barrier, Tile::kW1Bytes + windows * area * Tile::kRowBytes);
    tma_load(stage_at(step) + Tile::kXBytes, map, barrier, step % steps * Tile::kDepth, first_unit(step / steps));
  }

  // w1 of the first stages needs no other block, so it is on its way before the cluster has met.
  __device__ void load_first(const CUtensorMap& map) const {
    for (int step = 0; step < min(passes * steps, Tile::kStages); ++step) load_w1(map, step);
  }

  // The rows of windows are shared out over blocks and lanes. Past a window's edge a row holds other tokens, or zeros.
  __device__ void load(const CUtensorMap& x_map, const CUtensorMap& w1_map, int lane) const {
    const int row = static_cast<int>(rank) + Tile::kBlocks * lane, window = row / p.window_height;
    const bool has_row = window < windows;
    const int r = row % p.window_height;
    const Window at = window_of_grid(p, first_window + (has_row ? window : 0));
    const int token = static_cast<int>(at.first + static_cast<int64_t>(r) * at.width);
    const uint32_t offset = (window * area + r * p.window_width) * Tile::kRowBytes;
    cluster_wait();  // the barriers of all blocks are there
    for (int step = 0; step < passes * steps; ++step) {
      const int stage = step % Tile::kStages, round = step / Tile::kStages;
      if (round > 0) {
        mbarrier_wait_cluster(empty(stage), (round - 1) % 2);  // in all blocks
        if (lane == 0) load_w1(w1_map, step);
        __syncwarp();
      }
      if (has_row)
        tma_load_multicast(stage_at(step) + offset, x_map, full(stage), (1 << Tile::kBlocks) - 1,
                           step % steps * Tile::kDepth, token);
    }
  }

  // ---- The warpgroups that multiply ----

  // Divisions take long, so each row's token is found once, before its first stage has come.
  __device__ void find_tokens() const {
    for (int row = threadIdx.x; row < Tile::kTokens; row += Tile::kConsumers) {
      const int in_window = row % area, r = in_window / p.window_width, c = in_window % p.window_width;
      const bool has_window = row / area < windows;
      const Window window = window_of_grid(p, first_window + (has_window ? row / area : 0));
      const bool there = has_window && r < window.rows && c < window.columns;
      tokens[row] = there ? static_cast<int>(window.first + static_cast<int64_t>(r) * window.width + c) : -1;
    }
  }

  __device__ void load_units(int pass) const {
    for (int i = threadIdx.x; i < Units / 2; i += Tile::kConsumers) {
      const float2 b1 = load_pair(p.b1, first_unit(pass) + 2 * i, p.hidden);
      const float2 w2 = load_pair(p.w2, first_unit(pass) + 2 * i, p.hidden);
      units[i] = {b1.x, b1.y, w2.x, w2.y};
    }
  }

  // This warpgroup has read the step's stage: says so in every block that may load it anew.
  __device__ void release(int step) const {
    const uint32_t block = threadIdx.x % 128;
    if (block < Tile::kBlocks) mbarrier_arrive_cluster_relaxed(cluster_address(empty(step % Tile::kStages), block));
  }

  // acc = x w1' for the warpgroup's 64 tokens and the pass's units.
  __device__ void multiply(float (&acc)[Units / 2], int pass) const {
    const int group = threadIdx.x / 128;
    for (int i = 0; i < steps; ++i) {
      const int step = pass * steps + i;
      const uint32_t x = stage_at(step) + group * 64 * Tile::kRowBytes, w1 = stage_at(step) + Tile::kXBytes;
      const uint64_t a = wgmma_descriptor(x, Swizzle::bytes128, 0, 8 * Tile::kRowBytes);
      const uint64_t b = wgmma_descriptor(w1, Swizzle::bytes128, 0, 8 * Tile::kRowBytes);
      mbarrier_wait(full(step % Tile::kStages), step / Tile::kStages % 2);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < Tile::kDepth / 16; ++k)
        wgmma_ss<T, Major::k, Major::k>(acc, wgmma_advance(a, 32 * k), wgmma_advance(b, 32 * k), i > 0 || k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release(step - 1);
    }
    wgmma_wait<0>();
    release(pass * steps + steps - 1);
  }

  // Adds the pass's units to the scores of the lane's rows, row and row + 8 of the tile, and writes their mask.
  __device__ void add_scores(float (&score)[2], const float (&acc)[Units / 2], int pass, int row, int lane) const {
    const int t = lane % 4;
    if (p.mask == nullptr && p.drop_below == 0) {  // inference, without the bits
#pragma unroll
      for (int j = 0; j < Units / 8; ++j) {
        const float4 unit = units[4 * j + t];
#pragma unroll
        for (int half = 0; half < 2; ++half)
          add_units(score[half], acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1], {unit.x, unit.y}, {unit.z, unit.w},
                    3);
      }
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = tokens[row + 8 * half];
      const uint64_t kept = p.drop_below == 0 ? ~uint64_t{0} : kept_units(p, n, first_unit(pass), Units / 8, lane);
      uint64_t active = 0;
#pragma unroll
      for (int j = 0; j < Units / 8; ++j) {
        const float4 unit = units[4 * j + t];
        active |=
            static_cast<uint64_t>(add_units(score[half], acc[4 * j + 2 * half], acc[4 * j + 2 * half + 1],
                                            {unit.x, unit.y}, {unit.z, unit.w}, static_cast<uint32_t>(kept >> (2 * j))))
            << (2 * j);
      }
      if (p.mask != nullptr) write_mask(active, n, first_unit(pass), t);
    }
  }

  __device__ void write_mask(uint64_t active, int n, int unit, int t) const {
    uint16_t* const halves = reinterpret_cast<uint16_t*>(p.mask + static_cast<int64_t>(n) * p.mask_words);
#pragma unroll
    for (int h = 0; h < Units / 16; ++h) {
      const uint32_t pairs = static_cast<uint32_t>(active >> (4 * h));
      const uint32_t bits = or_of_row((pairs & 3) << (2 * t) | (pairs >> 2 & 3) << (8 + 2 * t));
      if (t == h % 4 && n >= 0 && unit / 16 + h < 2 * p.mask_words) halves[unit / 16 + h] = bits;
    }
  }

  // The scores of the lane's rows over this block's units, to every block of the cluster.
  __device__ void send(const float (&score)[2], int row, int lane) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = warp_sum<4>(score[half]) * p.keep_scale;
      const uint32_t part = shared_address(parts + rank * Tile::kTokens + row + 8 * half);
#pragma unroll
      for (int i = 0; i < Tile::kBlocks / 4; ++i) store_cluster(cluster_address(part, lane % 4 + 4 * i), sum);
    }
  }

  // ---- Windows ----

  // Softmax of a window by one warp, from all parts of its scores. A lane keeps to its own rows.
  __device__ void softmax(int window, int lane) const {
    const int first = window * area + lane, end = window * area + area;
    float peak = -INFINITY, total = 0.0f;
    for (int row = first; row < end; row += 32) {
      float score = 0.0f;
#pragma unroll
      for (int block = 0; block < Tile::kBlocks; ++block) score += parts[block * Tile::kTokens + row];
      weights[row] = tokens[row] >= 0 ? score * kLog2E : -INFINITY;
      peak = fmaxf(peak, weights[row]);
    }
    peak = warp_max(peak);
    for (int row = first; row < end; row += 32) {
      weights[row] = exp2_approx(weights[row] - peak);
      total += weights[row];
    }
    const float scale = 1.0f / warp_sum(total);
    for (int row = first; row < end; row += 32) {
      weights[row] *= scale;
      if (window % Tile::kBlocks == static_cast<int>(rank) && tokens[row] >= 0) p.weights[tokens[row]] = weights[row];
    }
  }
};

// Blocks 8i to 8i + 7: tile i.
template <class T, int Units, int Groups>
__global__ void __launch_bounds__(ClusterTile<Units, Groups>::kThreads, 1)
    spatial_pool_cluster_kernel(const __grid_constant__ PoolParams<T> p, const __grid_constant__ CUtensorMap x_map,
                                const __grid_constant__ CUtensorMap w1_map) {
  if constexpr (kHasSm90a) {
    using Tile = ClusterTile<Units, Groups>;
    const ClusterBlock<T, Units, Groups> block(p);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == Tile::kConsumers / 32) {
      if (lane == 0) {
        tma_prefetch(w1_map);
        tma_prefetch(x_map);
        block.start_barriers();
        block.load_first(w1_map);
      }
      __syncwarp();
      cluster_arrive();
      block.load(x_map, w1_map, lane);
      __syncwarp();
      cluster_sync();
      return;
    }
    cluster_arrive();

    // An item is a window and eight of this block's columns. One warpgroup has registers to read the first item's x
    // now: it is there when weights are, and in L2 when the cluster loads it.
    const int per_block = (p.dim / 8 + Tile::kBlocks - 1) / Tile::kBlocks;
    const int first_piece = static_cast<int>(block.rank) * per_block;
    const int pieces = max(0, min(per_block, p.dim / 8 - first_piece)), items = block.windows * pieces;
    WindowSum<T, true> pooled;
    Window window{};
    int item = threadIdx.x, in_tile = 0, column = 0;
    const auto start = [&] {
      if (item >= items) return;
      in_tile = item / pieces;
      column = 8 * (first_piece + item % pieces);
      window = window_of_grid(p, block.first_window + in_tile);
      pooled.start(p, window, column);
    };
    if constexpr (Groups == 1) start();
    block.find_tokens();
    cluster_wait();

    const int row = 16 * warp + lane / 4;
    float score[2] = {0.0f, 0.0f};
    for (int pass = 0; pass < block.passes; ++pass) {
      float acc[Units / 2];
      block.load_units(pass);
      block.multiply(acc, pass);
      named_barrier_sync(1, Tile::kConsumers);  // units and tokens are there
      block.add_scores(score, acc, pass, row, lane);
      named_barrier_sync(1, Tile::kConsumers);  // and read
    }
    if constexpr (Groups > 1) start();
    block.send(score, row, lane);
    cluster_sync();  // the parts of all blocks are here; no block reaches into another from now on
    for (int i = warp; i < block.windows; i += Tile::kConsumers / 32) block.softmax(i, lane);
    named_barrier_sync(1, Tile::kConsumers);
    while (item < items) {
      float sum[8];
      pooled.finish(p, window, column, sum,
                    [&](int r, int c) { return block.weights[in_tile * block.area + r * p.window_width + c]; });
      store8<T, true>(p.y + static_cast<int64_t>(block.first_window + in_tile) * p.dim, column, p.dim, sum);
      item += Tile::kConsumers;
      start();
    }
  }
}

}  // namespace flashsloth::cuda
