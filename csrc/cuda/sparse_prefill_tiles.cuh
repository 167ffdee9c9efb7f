// Tiles of gathered rows in shared memory, and what else the block keeps there.
//
// A row of 72 or 80 elements is five columns of 16 elements. A tile keeps column after column, each a dense
// (rows x 32 bytes) matrix in the 32-byte swizzle. One layout serves all three operands:
//   * Q and K, K-major: a column is one k-step of wgmma, whose rows of 8 are 256 bytes apart;
//   * V, MN-major: a column is one 16-wide atom of n, so that N = 80 is one instruction, and 16 keys are 512 bytes.
// Nothing is padded to 96 or 128. Head size 72 leaves half of the last column: zeros in Q and K, where they add
// nothing, and in V, where they make output columns that are not stored. (N = 72 would end inside an atom, which the
// canonical layouts do not describe; it would save 5 % of the products.)
#pragma once

#include "sparse_prefill_rows.cuh"
#include "wgmma.cuh"

namespace flashsloth::cuda::prefill {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 3;                            // warpgroups that compute, each for 64 query rows
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;  // warpgroup 0 loads
constexpr int kGroupRows = 64;                           // m of wgmma
constexpr int kQueryRows = kConsumers * kGroupRows;      // of a query tile
constexpr int kKeys = 96;                                // of a key tile
constexpr int kLoadedKeys = kKeys / 4, kLoadedQueries = kQueryRows / 4;  // by a warp of the producer
constexpr int kColumns = 5, kColumnElements = 16, kColumnBytes = 32;
constexpr int kWidth = kColumns * kColumnElements;  // 80: the n of the second product
constexpr int kQueryStages = 2, kKeyStages = 4;

constexpr uint32_t kQueryPitch = kQueryRows * kColumnBytes;  // from one column to the next
constexpr uint32_t kKeyPitch = kKeys * kColumnBytes;
constexpr uint32_t kQueryBytes = kColumns * kQueryPitch, kKeyBytes = kColumns * kKeyPitch;
constexpr uint32_t kEightRows = 8 * kColumnBytes;  // the swizzle's pattern, and the step of descriptors
static_assert(kQueryPitch % kEightRows == 0 && kKeyPitch % kEightRows == 0, "columns start at a pattern's start");

// Results leave through shared memory as whole rows of 16-byte chunks. Rows are padded by a chunk: lanes of a quarter
// warp then write to different banks.
constexpr uint32_t kOutRow = kWidth * 2 + 16;
constexpr uint32_t kOutBytes = 16 * kOutRow;  // of a warp

// What the producer tells the consumers of a query tile.
struct QueryTile {
  int sequence;  // -1: there are no more tiles
  int head;
  int seen[kConsumers];  // keys that some row of the warpgroup sees
  int unused[3];
  int seen_by_all[kQueryRows / 16];  // keys that every row of a warp sees, rows that are not there left out
  int row[kQueryRows];               // of the tensor; -1: no such row
  int visible[kQueryRows];           // keys the row sees: a prefix of the list
};

// Keys of a stage whose entry names no row of the tensor, so that nobody sees them.
struct DroppedKeys {
  uint32_t any[4];  // of a producer warp's keys
  uint16_t pair[kKeys / 2];
};

struct Barriers {
  uint64_t query_full[kQueryStages], query_empty[kQueryStages];
  uint64_t key_full[kKeyStages], key_empty[kKeyStages], value_full[kKeyStages], value_empty[kKeyStages];
};

// Byte offsets of the block's shared memory.
constexpr uint32_t kQueryAt = 0;
constexpr uint32_t kKeyAt = kQueryAt + kQueryStages * kQueryBytes;
constexpr uint32_t kValueAt = kKeyAt + kKeyStages * kKeyBytes;
constexpr uint32_t kOutAt = kValueAt + kKeyStages * kKeyBytes;
constexpr uint32_t kTileAt = kOutAt + kConsumers * 4 * kOutBytes;
constexpr uint32_t kDroppedAt = kTileAt + kQueryStages * sizeof(QueryTile);
constexpr uint32_t kBarriersAt = kDroppedAt + kKeyStages * sizeof(DroppedKeys);
constexpr uint32_t kSharedBytes = kBarriersAt + sizeof(Barriers);
static_assert(kKeyAt % kEightRows == 0 && kValueAt % kEightRows == 0 && kOutAt % 16 == 0 && kTileAt % 16 == 0 &&
              kDroppedAt % 16 == 0 && sizeof(DroppedKeys) % 16 == 0 && kBarriersAt % 8 == 0);
static_assert(kSharedBytes <= 227 * 1024, "what a block of sm_90 may use");

// Where a pipeline stands: its stage, and the parity of the phase that its barriers are in.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// A warp copies rows first .. first + Rows (multiples of 4) into a tile, 16 bytes a lane, without waiting. rows[i] of
// lane l is the source of row first + 32 i + l; not Whole: where it is -1, zeros.
//
// An instruction covers four rows of the first four columns: each quarter of the warp one column, in which its lanes
// write 128 bytes without bank conflicts, while each row is read as 128 bytes. The last column follows, 16 rows at
// once.
template <int Dim, int Rows, uint32_t Pitch, bool Whole>
__device__ __forceinline__ void gather(uint32_t tile, int first, const char* source, uint32_t row_bytes,
                                       const int (&rows)[(Rows + 31) / 32]) {
  static_assert(Rows % 4 == 0 && (Dim == 72 || Dim == 80));
  const int lane = threadIdx.x % 32, column = lane / 8, four = lane % 8 / 2;
  const int half = lane % 2, swapped = half ^ (first / 4 & 1);  // the swizzle swaps the chunks of every other four rows
  const uint32_t shared = tile + first * kColumnBytes;
  const auto copy = [&](uint32_t to, const char* from, int row, bool valid) {
    const uint32_t there = Whole ? row : max(row, 0);
    cp_async16(to, from + static_cast<uint64_t>(there) * row_bytes, valid && (Whole || row >= 0));
  };

  const char* const from = source + column * kColumnBytes + half * 16;
  const uint32_t to = shared + column * Pitch + four * kColumnBytes;
#pragma unroll
  for (int i = 0; i < Rows / 4; ++i)
    copy(to + i * 4 * kColumnBytes + (swapped ^ (i & 1)) * 16, from,
         __shfl_sync(kFullWarp, rows[i / 8], i % 8 * 4 + four), true);

  const bool inside = Dim == kWidth || half == 0;  // the head size ends there: zeros
  const char* const last_from = source + 4 * kColumnBytes + (inside ? half : 0) * 16;
  const uint32_t last_to = shared + 4 * Pitch + lane / 2 * kColumnBytes + (swapped ^ (lane / 8 & 1)) * 16;
#pragma unroll
  for (int i = 0; i < (Rows + 15) / 16; ++i) {
    const int row = __shfl_sync(kFullWarp, rows[i / 2], i % 2 * 16 + lane / 2);
    if (Rows % 16 == 0 || i * 16 + lane / 2 < Rows) copy(last_to + i * 16 * kColumnBytes, last_from, row, inside);
  }
}

}  // namespace flashsloth::cuda::prefill
