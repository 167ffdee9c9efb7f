// A consumer warpgroup: attention of 64 query rows, FlashAttention-3 style (arXiv 2407.08608).
//
// S = Q K' and O += P V are wgmma products whose accumulators stay in registers, with the online softmax between them:
// a thread holds parts of rows g and g + 8 of its warp's 16 (g = lane / 4). Two overlaps keep the tensor cores busy:
//   * inside a warpgroup, P V of a key tile runs while the softmax of the next one is computed;
//   * warpgroups take turns in issuing products, so while one computes exponentials the other two multiply.
#pragma once

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
      mbarrier_wait(shared_address(&barriers_.query_full[query_.stage]), query_.parity);
      const QueryTile& tile = reinterpret_cast<const QueryTile*>(memory_ + kTileAt)[query_.stage];
      if (tile.sequence < 0) break;
      attend(tile);
      store(tile);
      release(barriers_.query_empty[query_.stage]);
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

  // Before products, fence_proxy_async comes too: the producer's copies are ordinary writes, wgmma reads otherwise.
  __device__ __forceinline__ void wait(uint64_t& full, uint32_t parity) const {
    mbarrier_wait(shared_address(&full), parity);
  }

  // Once a warp: all its lanes are done.
  __device__ __forceinline__ void release(uint64_t& empty) const {
    __syncwarp();
    if (lane() == 0) mbarrier_arrive(shared_address(&empty));
  }

  // ---- Products ----

  __device__ __forceinline__ void multiply_keys(int stage) {
    const uint64_t q =
        wgmma_descriptor(shared_ + kQueryAt + query_.stage * kQueryBytes + group_ * kGroupRows * kColumnBytes,
                         Swizzle::bytes32, 0, kEightRows);
    const uint64_t k = wgmma_descriptor(shared_ + kKeyAt + stage * kKeyBytes, Swizzle::bytes32, 0, kEightRows);
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
      wgmma_ss<T, Major::k, Major::k>(scores_, wgmma_advance(q, column * kQueryPitch),
                                      wgmma_advance(k, column * kKeyPitch), column > 0);
  }

  __device__ __forceinline__ void multiply_values(int stage) {
    const uint64_t v =
        wgmma_descriptor(shared_ + kValueAt + stage * kKeyBytes, Swizzle::bytes32, kKeyPitch, kEightRows);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      wgmma_rs<T, Major::mn>(sums_, probabilities_[i], wgmma_advance(v, i * 2 * kEightRows), true);
  }

  // ---- Softmax ----
  // scores_[4 j + 2 h + i] is row g + 8 h, key 8 j + 2 t + i (t = lane % 4).

  __device__ __forceinline__ void mask(const QueryTile& tile, int key_tile, int stage) {
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
    const DroppedKeys& dropped = reinterpret_cast<const DroppedKeys*>(memory_ + kDroppedAt)[stage];
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

  // What scores, times scale_log2, are relative to. No key seen yet: exp2(-inf - 0) = 0.
  __device__ __forceinline__ float base_of(float peak) const {
    return peak == -INFINITY ? 0.0f : peak * args_.scale_log2;
  }

  // Moves the peaks of the rows on to these scores too; earlier sums are to be scaled by `factor`.
  __device__ __forceinline__ void find_peak(float (&factor)[2], float (&base)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float peak = peak_[h];
#pragma unroll
      for (int i = 0; i < kKeys / 8; ++i) peak = fmaxf(peak, fmaxf(scores_[4 * i + 2 * h], scores_[4 * i + 2 * h + 1]));
      peak = warp_max<4>(peak);
      base[h] = base_of(peak);
      factor[h] = exp2_approx(peak_[h] * args_.scale_log2 - base[h]);
      peak_[h] = peak;
      total_[h] *= factor[h];
    }
  }

  // Scores to exp(score - peak). An accumulator's layout is that of the left operand: rounding is all it takes.
  __device__ __forceinline__ void exponentiate(const float (&base)[2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) {  // (keys 8 (i / 2) + 2 t and the next, row g + 8 (i % 2))
      const int h = i % 2;
      const float low = exp2_approx(fmaf(scores_[2 * i], args_.scale_log2, -base[h]));
      const float high = exp2_approx(fmaf(scores_[2 * i + 1], args_.scale_log2, -base[h]));
      total_[h] += low + high;  // of this lane's keys
      probabilities_[i / 4][i % 4] = pack2<T>(low, high);
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums_[i] *= factor[i / 2 % 2];
  }

  // ---- A query tile ----

  __device__ __forceinline__ void attend(const QueryTile& tile) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sums_[i] = 0.0f;
    peak_[0] = peak_[1] = -INFINITY;
    total_[0] = total_[1] = 0.0f;
    // Broadcasts tell the compiler that these are the same in all lanes.
    const int own = __shfl_sync(kFullWarp, (tile.seen[group_] + kKeys - 1) / kKeys, 0);
    const int all = __shfl_sync(kFullWarp, (max(max(tile.seen[0], tile.seen[1]), tile.seen[2]) + kKeys - 1) / kKeys, 0);

    int key_tile = all - 1;
    for (; key_tile >= own; --key_tile) {  // seen by later rows only
      take_turn();
      pass_turn();
      wait(barriers_.key_full[key_.stage], key_.parity);
      release(barriers_.key_empty[key_.stage]);
      wait(barriers_.value_full[key_.stage], key_.parity);
      release(barriers_.value_empty[key_.stage]);
      key_.advance();
    }
    if (key_tile < 0) return;

    float factor[2], base[2];
    wait(barriers_.key_full[key_.stage], key_.parity);
    fence_proxy_async();
    take_turn();
    wgmma_fence();
    multiply_keys(key_.stage);
    wgmma_commit();
    pass_turn();
    wgmma_wait<0>();
    mask(tile, key_tile, key_.stage);
    release(barriers_.key_empty[key_.stage]);
    find_peak(factor, base);
    exponentiate(base);

    Ring<kKeyStages> value = key_;
    key_.advance();
    for (--key_tile; key_tile >= 0; --key_tile) {
      wait(barriers_.key_full[key_.stage], key_.parity);
      wait(barriers_.value_full[value.stage], value.parity);
      fence_proxy_async();
      take_turn();
      wgmma_fence();
      multiply_keys(key_.stage);
      wgmma_commit();
      wgmma_fence();
      multiply_values(value.stage);
      wgmma_commit();
      pass_turn();
      wgmma_wait<1>();
      mask(tile, key_tile, key_.stage);
      release(barriers_.key_empty[key_.stage]);
      find_peak(factor, base);
      wgmma_wait<0>();  // the registers of the probabilities are free
      release(barriers_.value_empty[value.stage]);
      rescale(factor);
      exponentiate(base);
      value = key_;
      key_.advance();
    }
    wait(barriers_.value_full[value.stage], value.parity);
    fence_proxy_async();
    wgmma_fence();
    multiply_values(value.stage);
    wgmma_commit();
    wgmma_wait<0>();
    release(barriers_.value_empty[value.stage]);
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
        lse[rows[inside] * args_.lse_row] = total == 0.0f ? -INFINITY : (base_of(peak_[h]) + log2f(total)) * kLn2;
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
  Ring<kKeyStages> key_;
  int seen_by_all_ = 0;  // keys that each row of the warp sees
  float scores_[kKeys / 2], sums_[kWidth / 2];
  uint32_t probabilities_[kKeys / 16][4];  // the left operand of P V
  float peak_[2], total_[2];
};

}  // namespace flashsloth::cuda::prefill
