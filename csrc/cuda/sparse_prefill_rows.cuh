// Which rows take part: one sequence's list, and how many of its keys a query may see.
#pragma once

#include "instructions.cuh"
#include "sparse_prefill.h"

namespace flashsloth::cuda {

// TokenRows as the kernels take it: everything counts in 32 bits.
struct DeviceRows {
  const int32_t *indices, *cu_seqlens, *positions;  // cu_seqlens null: every row
  int capacity, max_seqlen, rows;                   // rows: of the tensor, what entries must stay below
  int first_position;                               // of row 0, where there is no index
};

// The entries of one sequence.
struct TokenList {
  const int32_t *indices, *positions;  // of entry 0; indices null: entry i is row i, at first_position + i
  int count, rows, first_position;

  __device__ __forceinline__ TokenList(const DeviceRows& all, int sequence)
      : indices(nullptr), positions(nullptr), count(all.rows), rows(all.rows), first_position(all.first_position) {
    if (all.cu_seqlens == nullptr) return;
    const int begin = min(max(__ldg(all.cu_seqlens + sequence), 0), all.capacity);
    const int end = min(max(__ldg(all.cu_seqlens + sequence + 1), begin), all.capacity);
    count = min(end - begin, all.max_seqlen);
    indices = all.indices + begin;
    positions = (all.positions == nullptr ? all.indices : all.positions) + begin;
  }

  // The row of an entry, -1 where the index names none of the tensor.
  __device__ __forceinline__ int row(int entry) const {
    const int row = indices == nullptr ? entry : __ldg(indices + entry);
    return static_cast<unsigned>(row) < static_cast<unsigned>(rows) ? row : -1;
  }
  __device__ __forceinline__ int position(int entry) const {
    return indices == nullptr ? first_position + entry : __ldg(positions + entry);
  }

  // Entries up to and including a position: what a query there may see. `guess` is tried first: where queries and keys
  // are one list, or the queries its end, it is right, and costs two loads instead of a bisection.
  __device__ __forceinline__ int visible(int position_, int guess) const {
    if (indices == nullptr) return position_ >= count ? count : max(position_ + 1, 0);
    int low = 0, high = count;
    guess = min(max(guess, 0), count);
    if (guess > 0) {
      if (position(guess - 1) <= position_) {
        low = guess;
      } else {
        high = guess - 1;
      }
    }
    if (low == guess && guess < count && position(guess) > position_) high = guess;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (position(middle) <= position_) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // The entry that is this row, or -1.
  __device__ __forceinline__ int find(int wanted) const {
    if (wanted < 0 || wanted >= rows) return -1;
    if (indices == nullptr) return wanted;
    int low = 0, high = count;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (__ldg(indices + middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < count && __ldg(indices + low) == wanted ? low : -1;
  }
};

// A (batch, head, row, dim) tensor of 16-bit elements, in bytes.
struct DeviceTensor {
  char* data;
  int64_t batch, head;
  uint32_t row;

  __device__ __forceinline__ char* at(int sequence, int head_) const { return data + sequence * batch + head_ * head; }
};

struct PrefillArguments {
  DeviceTensor q, k, v, out;
  float* lse;
  int64_t lse_batch, lse_head, lse_row;  // elements
  DeviceRows queries, keys;
  int lists, heads, group;  // lists: sequences times heads; group: query heads of a key/value head
  int query_tiles, tiles;   // query tiles of a list, and in all
  bool causal, negative;    // negative: the scale is, and scores are negated first
  bool fill_gaps;           // zero the rows between and after the kept ones
  float scale, scale_log2;  // absolute values; scale_log2 = scale log2(e)

  __device__ __forceinline__ float* lse_at(int sequence, int head) const {
    return lse + sequence * lse_batch + head * lse_head;
  }
};

}  // namespace flashsloth::cuda
