// The producer warpgroup: decides which query tiles the block takes, and keeps their rows coming.
#pragma once

#include "sparse_prefill_tiles.cuh"

namespace flashsloth::cuda::prefill {

constexpr uint32_t kProducerBarrier = 1 + kConsumers;  // named barrier; 1 to 3 are the consumers' turns

// Tiles of `kListsTogether` lists (sequence, head) at a time. Of a list the last tile comes first: under causality it
// sees most keys, and long tiles that start early leave short ones to fill the end. Lists are together so that about
// four blocks read the same keys at once: then key tiles come from L2, though all lists together would not fit there.
constexpr int kListsTogether = 32;

struct Place {
  int sequence, head, query_tile;
};

__device__ __forceinline__ Place place_of(const PrefillArguments& args, int tile) {
  const int together = tile / (args.query_tiles * kListsTogether);
  const int first = together * kListsTogether, width = min(kListsTogether, args.lists - first);
  const int inside = tile - first * args.query_tiles;
  const int list = first + inside % width;
  return {list / args.heads, list % args.heads, args.query_tiles - 1 - inside / width};
}

// Rows between the kept ones get 0 and -inf: from the entry before the tile's first to its last, and of the rows after
// the last entry the tile's share. Each warp takes a quarter of the entries, a row is 16 bytes a lane.
template <int Dim>
__device__ __forceinline__ void fill_gaps(const PrefillArguments& args, const Place& place, const TokenList& queries) {
  constexpr int kLanes = Dim / 8, kRowsTogether = 32 / kLanes, kWarpRows = kQueryRows / 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const out = args.out.at(place.sequence, place.head);
  float* const lse = args.lse_at(place.sequence, place.head);

  const auto zero = [&](int begin, int end) {
    for (int row = begin + lane / kLanes; row < end; row += kRowsTogether) {
      if (lane >= kRowsTogether * kLanes) continue;
      const int chunk = lane % kLanes;
      *reinterpret_cast<uint4*>(out + static_cast<uint64_t>(row) * args.out.row + chunk * 16) = uint4{0, 0, 0, 0};
      if (chunk == 0) lse[row * args.lse_row] = -INFINITY;
    }
  };
  // The first row after the last valid one among the entries below this one.
  const auto after = [&](int entry) {
    int row = -1;
    while (entry > 0 && row < 0) row = queries.row(--entry);
    return row + 1;
  };

  const int first = place.query_tile * kQueryRows + warp * kWarpRows;
  const int end = min(first + kWarpRows, queries.count);
  for (int base = first; base < end; base += 32) {
    const int entry = base + lane;
    const int row = entry < end ? queries.row(entry) : -1;
    const int begin = row >= 0 ? after(entry) : 0;
    unsigned gaps = __ballot_sync(kFullWarp, begin < row);
    while (gaps != 0) {
      const int source = __ffs(static_cast<int>(gaps)) - 1;
      gaps &= gaps - 1;
      zero(__shfl_sync(kFullWarp, begin, source), __shfl_sync(kFullWarp, row, source));
    }
  }
  const int64_t start = after(queries.count), rest = queries.rows - start;
  const int64_t parts = static_cast<int64_t>(args.query_tiles) * 4, part = place.query_tile * 4 + warp;
  zero(static_cast<int>(start + rest * part / parts), static_cast<int>(start + rest * (part + 1) / parts));
}

template <int Dim>
class Producer {
 public:
  __device__ __forceinline__ Producer(const PrefillArguments& args, char* memory)
      : args_(args),
        memory_(memory),
        shared_(shared_address(memory)),
        barriers_(*reinterpret_cast<Barriers*>(memory + kBarriersAt)),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / 32, 0)),
        lane_(threadIdx.x % 32) {}

  // Blocks take tiles in rounds, there and back: who had the longest of one round has the shortest of the next.
  __device__ __forceinline__ void run() {
    const int blocks = gridDim.x;
    for (int round = 0;; ++round) {
      const int64_t tile =
          static_cast<int64_t>(round) * blocks +
          ((round & 1) != 0 ? blocks - 1 - static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x));
      if (static_cast<int64_t>(round) * blocks >= args_.tiles) break;
      if (tile < args_.tiles) load(place_of(args_, static_cast<int>(tile)));
    }
    QueryTile& last = acquire_query();
    last.sequence = -1;
    cp_async_mbarrier_arrive(shared_address(&barriers_.query_full[query_.stage]));
    mbarrier_arrive(shared_address(&barriers_.query_full[query_.stage]));
  }

 private:
  __device__ __forceinline__ QueryTile& acquire_query() {
    mbarrier_wait(shared_address(&barriers_.query_empty[query_.stage]), query_.parity ^ 1);
    return reinterpret_cast<QueryTile*>(memory_ + kTileAt)[query_.stage];
  }

  __device__ __forceinline__ void load(const Place& place) {
    const TokenList queries(args_.queries, place.sequence), keys(args_.keys, place.sequence);
    if (place.query_tile * kQueryRows < queries.count) {
      const int seen = load_queries(place, queries, keys);
      load_keys(place, keys, seen);
    }
    if (args_.fill_gaps) fill_gaps<Dim>(args_, place, queries);
  }

  // Each warp brings a quarter of the tile's rows. Returns how many keys are seen by any of them.
  __device__ __forceinline__ int load_queries(const Place& place, const TokenList& queries, const TokenList& keys) {
    constexpr int kWarpRows = kLoadedQueries;
    QueryTile& tile = acquire_query();
    const uint32_t full = shared_address(&barriers_.query_full[query_.stage]);
    int rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int inside = i * 32 + lane_, entry = place.query_tile * kQueryRows + warp_ * kWarpRows + inside;
      rows[i] = -1;
      if (inside < kWarpRows) {
        int visible = -1;
        if (entry < queries.count) rows[i] = queries.row(entry);
        if (rows[i] >= 0)
          visible =
              args_.causal ? keys.visible(queries.position(entry), entry + 1 + keys.count - queries.count) : keys.count;
        tile.row[warp_ * kWarpRows + inside] = rows[i];
        tile.visible[warp_ * kWarpRows + inside] = visible;
      }
    }
    gather<Dim, kWarpRows, kQueryPitch, false>(shared_ + kQueryAt + query_.stage * kQueryBytes, warp_ * kWarpRows,
                                               args_.q.at(place.sequence, place.head), args_.q.row, rows);
    cp_async_mbarrier_arrive(full);

    named_barrier_sync(kProducerBarrier, kWarpgroup);
    if (warp_ < kConsumers) {
      int most = 0;
#pragma unroll
      for (int i = 0; i < kGroupRows; i += 32) {
        const int visible = tile.visible[warp_ * kGroupRows + i + lane_];
        most = max(most, visible);
        int least = visible < 0 ? 0x7FFFFFFF : visible;
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) least = min(least, __shfl_xor_sync(kFullWarp, least, offset));
        if (lane_ % 16 == 0) tile.seen_by_all[(warp_ * kGroupRows + i + lane_) / 16] = least;
      }
      most = static_cast<int>(__reduce_max_sync(kFullWarp, static_cast<unsigned>(most)));
      if (lane_ == 0) tile.seen[warp_] = most;
    }
    if (threadIdx.x == 0) {
      tile.sequence = place.sequence;
      tile.head = place.head;
    }
    named_barrier_sync(kProducerBarrier, kWarpgroup);
    mbarrier_arrive(full);
    query_.advance();
    return max(max(tile.seen[0], tile.seen[1]), tile.seen[2]);
  }

  // The last key tile first. Each warp brings a quarter of its rows: zeros in place of keys nobody sees, which may hold
  // NaN, and a probability of zero would not hide that.
  __device__ __forceinline__ void load_keys(const Place& place, const TokenList& keys, int seen) {
    const int key_tiles = (seen + kKeys - 1) / kKeys;
    const int first = warp_ * kLoadedKeys, kv_head = place.head / args_.group;
    const char* const k = args_.k.at(place.sequence, kv_head);
    const char* const v = args_.v.at(place.sequence, kv_head);
    const auto row_of = [&](int tile) {
      const int entry = tile * kKeys + first + lane_;
      return lane_ < kLoadedKeys && entry < seen ? keys.row(entry) : -1;
    };
    const bool indexed = keys.indices != nullptr;
    int next = key_tiles > 0 ? row_of(key_tiles - 1) : -1;
    for (int tile = key_tiles - 1; tile >= 0; --tile) {
      const int row[1] = {next};
      if (tile > 0) next = row_of(tile - 1);  // an index is read long before it is needed
      const bool dropped = row[0] < 0 && lane_ < min(kLoadedKeys, seen - tile * kKeys - first);
      const bool whole = __all_sync(kFullWarp, row[0] >= 0 || lane_ >= kLoadedKeys);
      const uint32_t stage = __shfl_sync(kFullWarp, key_.stage, 0);  // broadcast: one address a warp

      mbarrier_wait(shared_address(&barriers_.key_empty[stage]), key_.parity ^ 1);
      const uint32_t key_full = shared_address(&barriers_.key_full[stage]);
      gather_keys(whole, shared_ + kKeyAt + stage * kKeyBytes, k, args_.k.row, row);
      cp_async_mbarrier_arrive(key_full);
      if (indexed) note_dropped(stage, dropped);
      if (lane_ == 0) mbarrier_arrive(key_full);

      mbarrier_wait(shared_address(&barriers_.value_empty[stage]), key_.parity ^ 1);
      gather_keys(whole, shared_ + kValueAt + stage * kKeyBytes, v, args_.v.row, row);
      cp_async_mbarrier_arrive(shared_address(&barriers_.value_full[stage]));
      key_.advance();
    }
  }

  __device__ __forceinline__ void gather_keys(bool whole, uint32_t tile, const char* source, uint32_t row_bytes,
                                              const int (&row)[1]) {
    if (whole) {
      gather<Dim, kLoadedKeys, kKeyPitch, true>(tile, warp_ * kLoadedKeys, source, row_bytes, row);
    } else {
      gather<Dim, kLoadedKeys, kKeyPitch, false>(tile, warp_ * kLoadedKeys, source, row_bytes, row);
    }
  }

  __device__ __forceinline__ void note_dropped(int stage, bool dropped) {
    DroppedKeys& keys = reinterpret_cast<DroppedKeys*>(memory_ + kDroppedAt)[stage];
    const unsigned all = __ballot_sync(kFullWarp, dropped);
    if (lane_ < kLoadedKeys / 2) keys.pair[warp_ * (kLoadedKeys / 2) + lane_] = all >> 2 * lane_ & 3;
    if (lane_ == 0) keys.any[warp_] = all;
    __syncwarp();  // the lane that arrives has seen the others' writes
  }

  const PrefillArguments& args_;
  char* const memory_;
  const uint32_t shared_;
  Barriers& barriers_;
  const int warp_, lane_;
  Ring<kQueryStages> query_;
  Ring<kKeyStages> key_;
};

}  // namespace flashsloth::cuda::prefill
