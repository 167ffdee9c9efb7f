// A consumer warpgroup: attention of 64 query rows, FlashAttention-3 style (arXiv 2407.08608).
//
// S = Q K' and O += P V are wgmma products whose accumulators stay in registers, with the online softmax between them:
// a thread holds parts of rows g and g + 8 of its warp's 16 (g = lane / 4). Two overlaps keep the tensor cores busy:
//   * inside a warpgroup, P V of a key tile runs while the softmax of the next one is computed;
//   * warpgroups take turns in issuing products, so while one computes exponentials the other two multiply.
#pragma once

#include <cstddef>

#include "sparse_prefill_tiles.cuh"

namespace flashsloth::cuda::prefill {

template <class T, int Dim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const PrefillArguments& args, char* memory, int group)
      : args_(args),
        memory_(memory),
        shared_(shared_address(memory)),
        barriers_(*reinterpret_cast<Barriers*>(memory + kBarriersAt)),
        group_(group) {}

  __device__ __forceinline__ void run() {
    // A turn is passed on to the next warpgroup, and the first turn to the first. Every warpgroup takes a turn for each
    // key tile of the block, so at the end one turn is left over: the first warpgroup's.
    if (group_ == kConsumers - 1) pass_turn();
    for (;;) {
      wait(shared_address(&barriers_.query_full[query_.stage]), query_.parity);
      const QueryTile& tile = reinterpret_cast<const QueryTile*>(memory_ + kTileAt)[query_.stage];
      if (tile.sequence < 0) break;
      attend(tile);
      store(tile);
      release(shared_address(&barriers_.query_empty[query_.stage]));
      query_.advance();
    }
    if (group_ == 0) take_turn();
  }

 private:
  // Not kept in registers, of which there are none to spare.
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % 4; }

  // ---- Handshakes ----

  __device__ __forceinline__ void take_turn() const { named_barrier_sync(1 + group_, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(1 + (group_ == kConsumers - 1 ? 0 : group_ + 1), 2 * kWarpgroup);
  }

  // The stage of the block's n-th key tile. The broadcast tells the compiler that all lanes have the same, and that
  // descriptors and addresses may be computed once a warp.
  struct Stage {
    uint32_t shared, index, parity;

    __device__ __forceinline__ uint32_t barrier(size_t first) const {
      return shared + kBarriersAt + static_cast<uint32_t>(first) + index * 8;
    }
    __device__ __forceinline__ uint32_t key_full() const { return barrier(offsetof(Barriers, key_full)); }
    __device__ __forceinline__ uint32_t key_empty() const { return barrier(offsetof(Barriers, key_empty)); }
    __device__ __forceinline__ uint32_t value_full() const { return barrier(offsetof(Barriers, value_full)); }
    __device__ __forceinline__ uint32_t value_empty() const { return barrier(offsetof(Barriers, value_empty)); }
  };
  __device__ __forceinline__ Stage stage_of(uint32_t n) const {
    n = __shfl_sync(kFullWarp, n, 0);
    return {shared_, n % kKeyStages, n / kKeyStages % 2};
  }

  // Before products, fence_proxy_async comes too: the producer's copies are ordinary writes, wgmma reads otherwise.
  __device__ __forceinline__ void wait(uint32_t full, uint32_t parity) const { mbarrier_wait(full, parity); }

  // Once a warp: all its lanes are done.
  __device__ __forceinline__ void release(uint32_t empty) const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(empty);
  }

  // ---- Products ----

  __device__ __forceinline__ void multiply_keys(const Stage& stage) {
    const uint64_t q =
        wgmma_descriptor(shared_ + kQueryAt + query_.stage * kQueryBytes + group_ * kGroupRows * kColumnBytes,
                         Swizzle::bytes32, 0, kEightRows);
    const uint64_t k = wgmma_descriptor(shared_ + kKeyAt + stage.index * kKeyBytes, Swizzle::bytes32, 0, kEightRows);
    wgmma_fence();
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      wgmma_ss<T, Major::k, Major::k>(scores_, wgmma_advance(q, column * kQueryPitch),
                                      wgmma_advance(k, column * kKeyPitch), column > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(const Stage& stage) {
    const uint64_t v =
        wgmma_descriptor(shared_ + kValueAt + stage.index * kKeyBytes, Swizzle::bytes32, kKeyPitch, kEightRows);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      wgmma_rs<T, Major::mn>(sums_, probabilities_[i], wgmma_advance(v, i * 2 * kEightRows), true);
    wgmma_commit();
  }

  // ---- Softmax ----
  // scores_[4 j + 2 h + i] is row g + 8 h, key 8 j + 2 t + i (t = lane % 4).

  __device__ __forceinline__ void mask(const QueryTile& tile, int key_tile, const Stage& stage) {
    if (args_.negative) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) scores_[i] = -scores_[i];
    }
    const int key = key_tile * kKeys + lane() % 4 * 2, row = group_ * kGroupRows + warp() * 16 + lane() / 4;
    if (key_tile * kKeys + kKeys > tile.seen_by_all[group_ * 4 + warp()]) {
      const int limit[2] = {tile.visible[row] - key, tile.visible[row + 8] - key};
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i)
        if (i / 4 * 8 + i % 2 >= limit[i / 2 % 2]) scores_[i] = -INFINITY;
    }
    if (args_.keys.indices == nullptr) return;
    const DroppedKeys& dropped = reinterpret_cast<const DroppedKeys*>(memory_ + kDroppedAt)[stage.index];
    const uint4 any = *reinterpret_cast<const uint4*>(dropped.any);
    if ((any.x | any.y | any.z | any.w) == 0) return;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      const unsigned pair = dropped.pair[4 * i + lane() % 4];
#pragma unroll
      for (int j = 4 * i; j < 4 * i + 4; ++j)
        if ((pair >> j % 2 & 1) != 0) scores_[j] = -INFINITY;
    }
  }

  // Whether these scores move the peak of a row of the warp; earlier sums are then to be scaled by `factor`. Peaks
  // settle within the first tiles, so that is skipped more often than not.
  __device__ __forceinline__ bool move_peaks(float (&factor)[2]) {
    float peak[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      peak[h] = peak_[h];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i)
        peak[h] = fmaxf(peak[h], fmaxf(scores_[4 * i + 2 * h], scores_[4 * i + 2 * h + 1]));
      peak[h] = warp_max<4>(peak[h]);
    }
    const bool moved = __any_sync(kFullWarp, peak[0] != peak_[0] || peak[1] != peak_[1]);
    if (moved) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float before = peak_[h] * args_.scale_log2;
        peak_[h] = peak[h];
        base_[h] = peak[h] == -INFINITY ? 0.0f : peak[h] * args_.scale_log2;  // no key yet: exp2(-inf - 0) = 0
        factor[h] = exp2_approx(before - base_[h]);
        total_[h] *= factor[h];
      }
    }
    return moved;
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums_[i] *= factor[i / 2 % 2];
  }

  // Scores to exp(score - peak). An accumulator's layout is that of the left operand: rounding is all it takes.
  __device__ __forceinline__ void exponentiate() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {  // keys 8 (i / 2) + 2 t and the next, row g + 8 (i % 2)
      const int h = i % 2;
      const float low = exp2_approx(fmaf(scores_[2 * i], args_.scale_log2, -base_[h]));
      const float high = exp2_approx(fmaf(scores_[2 * i + 1], args_.scale_log2, -base_[h]));
      total_[h] += low + high;  // of this lane's keys
      probabilities_[i / 4][i % 4] = pack2<T>(low, high);
    }
  }

  // ---- A query tile ----

  __device__ __forceinline__ void attend(const QueryTile& tile) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums_[i] = 0.0f;
    peak_[0] = peak_[1] = -INFINITY;
    total_[0] = total_[1] = base_[0] = base_[1] = 0.0f;
    const int own = (tile.seen[group_] + kKeys - 1) / kKeys;
    int key_tile = (max(max(tile.seen[0], tile.seen[1]), tile.seen[2]) + kKeys - 1) / kKeys - 1;

    for (; key_tile >= own; --key_tile) {  // seen by later rows only
      take_turn();
      pass_turn();
      const Stage now = stage_of(taken_++);
      wait(now.key_full(), now.parity);
      release(now.key_empty());
      wait(now.value_full(), now.parity);
      release(now.value_empty());
    }
    if (key_tile < 0) return;

    float factor[2];
    {
      const Stage now = stage_of(taken_++);
      wait(now.key_full(), now.parity);
      fence_proxy_async();
      take_turn();
      multiply_keys(now);
      pass_turn();
      wgmma_wait<0>();
      mask(tile, key_tile, now);
      release(now.key_empty());
      move_peaks(factor);
      exponentiate();
    }
    for (--key_tile; key_tile >= 0; --key_tile) {
      const Stage before = stage_of(taken_ - 1), now = stage_of(taken_);
      ++taken_;
      wait(now.key_full(), now.parity);
      wait(before.value_full(), before.parity);
      fence_proxy_async();
      take_turn();
      multiply_keys(now);
      multiply_values(before);
      pass_turn();
      wgmma_wait<1>();
      mask(tile, key_tile, now);
      release(now.key_empty());
      const bool moved = move_peaks(factor);
      wgmma_wait<0>();  // the registers of the probabilities are free
      release(before.value_empty());
      if (moved) rescale(factor);
      exponentiate();
    }
    const Stage before = stage_of(taken_ - 1);
    wait(before.value_full(), before.parity);
    fence_proxy_async();
    multiply_values(before);
    wgmma_wait<0>();
    release(before.value_empty());
  }

  __device__ __forceinline__ void store(const QueryTile& tile) {
    const int* rows = tile.row + group_ * kGroupRows + warp() * 16;
    char* const staged = memory_ + kOutAt + (group_ * 4 + warp()) * kOutBytes;
    constexpr float kLn2 = 0.6931471805599453f;
    float* const lse = args_.lse_at(tile.sequence, tile.head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int inside = lane() / 4 + 8 * h;
      const float total = warp_sum<4>(total_[h]);
      const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
      if (lane() % 4 == 0 && rows[inside] >= 0)
        lse[rows[inside] * args_.lse_row] = total == 0.0f ? -INFINITY : (base_[h] + log2f(total)) * kLn2;
#pragma unroll
      for (int j = 0; j < Dim / 8; ++j)
        *reinterpret_cast<uint32_t*>(staged + inside * kOutRow + j * 16 + lane() % 4 * 4) =
            pack2<T>(sums_[4 * j + 2 * h] * inverse, sums_[4 * j + 2 * h + 1] * inverse);
    }
    __syncwarp();
    char* const out = args_.out.at(tile.sequence, tile.head);
    constexpr int kChunks = Dim / 8, kRowsTogether = 32 / kChunks;
    const int chunk = lane() % kChunks;
#pragma unroll
    for (int i = 0; i < 16; i += kRowsTogether) {
      const int inside = i + lane() / kChunks;
      if (lane() < kRowsTogether * kChunks && inside < 16 && rows[inside] >= 0)
        *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(rows[inside]) * args_.out.row + chunk * 16) =
            *reinterpret_cast<const uint4*>(staged + inside * kOutRow + chunk * 16);
    }
    // The warp meets again in release(), before anyone writes here anew.
  }

  const PrefillArguments& args_;
  char* const memory_;
  const uint32_t shared_;
  Barriers& barriers_;
  const int group_;
  Ring<kQueryStages> query_;
  uint32_t taken_ = 0;  // key tiles
  float scores_[kKeys / 2], sums_[kWidth / 2];
  uint32_t probabilities_[kKeys / 16][4];  // the left operand of P V
  float peak_[2], base_[2], total_[2];     // base: the peak times scale_log2, what exponents are relative to
};

}  // namespace flashsloth::cuda::prefill
