// The attention that keys receive from a few listed queries, once their log-sum-exp is known.
//
// A cluster of blocks shares 128 keys: each block takes every eighth head, computes the scores of 16 listed rows at a
// time with mma.sync, and keeps the sums of exp(score - lse) over rows and heads in registers. The eight sums of a key
// meet through distributed shared memory, in a fixed order: one launch, no workspace, no atomics.
#pragma once

#include "hopper.cuh"
#include "sparse_prefill_rows.cuh"

namespace flashsloth::cuda::importance {

constexpr int kBlocks = 8;  // of a cluster
constexpr int kThreads = 128;
constexpr int kKeys = 128;                     // 32 a warp
constexpr int kRows = 16;                      // m of mma
constexpr int kWidth = 80;                     // head size 72 ends in zeros
constexpr uint32_t kKeyRow = kWidth * 2 + 16;  // bytes; the padding spreads ldmatrix over the banks
constexpr uint32_t kStageBytes = kKeys * kKeyRow;

struct Shared {
  char keys[2][kStageBytes];
  int key_row[kKeys];  // of the tensor, -1: none
  int row[kRows];      // listed rows of this pass, -1: none
  int visible[kRows];  // keys they see
  float sum[kKeys];
};
constexpr uint32_t kSharedBytes = sizeof(Shared);

struct Arguments {
  const int64_t* listed_rows;
  int64_t listed, listed_stride;  // stride: from one sequence's list to the next, 0 where they share one
  float* importance;
  int64_t importance_batch;
  int key_tiles;  // of a sequence
};

// Keys of one head, in 16-byte chunks.
template <int Dim>
__device__ __forceinline__ void load_keys(const PrefillArguments& args, Shared& shared, int stage, int sequence,
                                          int head) {
  constexpr int kChunks = kWidth / 8;
  const char* const from = args.k.at(sequence, head / args.group);
  const uint32_t to = shared_address(shared.keys[stage]);
#pragma unroll
  for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
    const int key = i / kChunks, chunk = i % kChunks, row = shared.key_row[key];
    const bool valid = row >= 0 && chunk < Dim / 8;
    cp_async16(to + key * kKeyRow + chunk * 16,
               from + static_cast<uint64_t>(max(row, 0)) * args.k.row + (valid ? chunk : 0) * 16, valid);
  }
  cp_async_commit();
}

// Adds exp(score - lse) of the listed rows of one head to `received`: [j][i] is key 8 j + 2 t + i of the warp's 32.
template <class T, int Dim>
__device__ __forceinline__ void receive(const PrefillArguments& args, const Shared& shared, int stage, int sequence,
                                        int head, int first_key, float (&received)[4][2]) {
  constexpr float kLog2e = 1.4426950408889634f;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const char* const q = args.q.at(sequence, head);
  const float* const lse = args.lse_at(sequence, head);
  const int row[2] = {shared.row[g], shared.row[g + 8]};
  const char* from[2];
  for (int h = 0; h < 2; ++h) from[h] = q + static_cast<uint64_t>(max(row[h], 0)) * args.q.row + t * 4;

  float scores[4][4] = {};
  const uint32_t keys = shared_address(shared.keys[stage]) + (warp * 32 + lane / 16 * 8 + lane % 8) * kKeyRow;
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = step * 16 + i / 2 * 8 < Dim && row[i % 2] >= 0;
      a[i] = inside ? *reinterpret_cast<const uint32_t*>(from[i % 2] + step * 32 + i / 2 * 16) : 0;
    }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4(b, keys + pair * 16 * kKeyRow + step * 32 + lane / 8 % 2 * 16);
      mma_m16n8k16<T>(scores[2 * pair], a, b[0], b[1]);
      mma_m16n8k16<T>(scores[2 * pair + 1], a, b[2], b[3]);
    }
  }
  const float scale = args.negative ? -args.scale : args.scale;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int visible = shared.visible[g + 8 * h] - first_key - warp * 32 - 2 * t;
    const float base = visible > 0 ? lse[row[h] * args.lse_row] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (8 * j + i < visible) received[j][i] += exp2_approx(fmaf(scores[j][2 * h + i], scale, -base) * kLog2e);
  }
}

// A grid of clusters, one for each 128 keys of each sequence.
template <class T, int Dim>
__global__ void __launch_bounds__(kThreads)
    importance_kernel(const __grid_constant__ PrefillArguments args, const __grid_constant__ Arguments wanted) {
  if constexpr (kHasSm90a) {
    Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
    const int rank = static_cast<int>(cluster_rank()), item = blockIdx.x / kBlocks;
    const int sequence = item / wanted.key_tiles, first_key = item % wanted.key_tiles * kKeys;
    const int thread = threadIdx.x, lane = thread % 32;
    grid_dependency_wait();
    const TokenList queries(args.queries, sequence), keys(args.keys, sequence);

    const int key_row = first_key + thread < keys.count ? keys.row(first_key + thread) : -1;
    shared.key_row[thread] = key_row;

    int counted = 0;  // listed rows that take part
    float received[4][2] = {};
    const int64_t* const listed = wanted.listed_rows + sequence * wanted.listed_stride;
    for (int64_t first = 0; first < wanted.listed; first += kRows) {
      int entry = -1;
      if (thread < kRows && first + thread < wanted.listed) {
        const int64_t row = listed[first + thread];
        if (row >= 0 && row < queries.rows) entry = queries.find(static_cast<int>(row));
        shared.row[thread] = entry >= 0 ? static_cast<int>(row) : -1;
      } else if (thread < kRows) {
        shared.row[thread] = -1;
      }
      if (thread < kRows)
        shared.visible[thread] = entry < 0 ? 0
                                 : args.causal
                                     ? keys.visible(queries.position(entry), entry + 1 + keys.count - queries.count)
                                     : keys.count;
      counted += __syncthreads_count(entry >= 0);

      int stage = 0;
      if (rank < args.heads) load_keys<Dim>(args, shared, stage, sequence, rank);
      for (int head = rank; head < args.heads; head += kBlocks, stage ^= 1) {
        if (head + kBlocks < args.heads) {
          load_keys<Dim>(args, shared, stage ^ 1, sequence, head + kBlocks);
          cp_async_wait<1>();
        } else {
          cp_async_wait<0>();
        }
        __syncthreads();
        receive<T, Dim>(args, shared, stage, sequence, head, first_key, received);
        __syncthreads();  // the stage, and the listed rows, are written again
      }
      __syncthreads();
    }

    // Sums over the rows: lanes of one t.
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = received[j][i];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
        if (lane < 4) shared.sum[thread / 32 * 32 + 8 * j + 2 * lane + i] = sum;
      }
    cluster_sync();
    // Each block finishes its eighth of the keys.
    constexpr int kShare = kKeys / kBlocks;
    const int key = rank * kShare + thread;
    if (thread < kShare && shared.key_row[key] >= 0) {
      float sum = 0.0f;
      for (int block = 0; block < kBlocks; ++block)
        sum += load_cluster(cluster_address(shared_address(shared.sum + key), block));
      const float mean = counted > 0 ? sum / (static_cast<float>(counted) * static_cast<float>(args.heads)) : 0.0f;
      wanted.importance[sequence * wanted.importance_batch + shared.key_row[key]] = mean;
    }
    cluster_sync();  // no block ends while others read its sums
  }
}

}  // namespace flashsloth::cuda::importance
