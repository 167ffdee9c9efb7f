// Attention over the tokens that are kept: interface of the CPU kernels.
#pragma once

#include <cstdint>

#include "types.h"

namespace flashsloth::cpu {

// Rows that take part, sequence by sequence: sequence s keeps indices[cu_seqlens[s] .. cu_seqlens[s + 1]), ascending.
// Whatever the arrays hold, kernels read and write inside the tensors: bounds are clamped, and entries that are out of
// range, out of order or listed twice are ignored.
struct TokenRows {
  const int32_t* indices;     // (capacity)
  const int32_t* cu_seqlens;  // (sequences + 1), or null: every row of every sequence
  const int32_t* positions;   // (capacity), or null: the indices. Ascending within a sequence
  int64_t capacity;
};

// Elements from one batch item, head and row to the next; the last dimension is contiguous.
struct RowStrides {
  int64_t batch, head, row;
};

struct AttentionShape {
  DType dtype;                                   // of q, k, v, out and their gradients
  int64_t sequences;                             // batch items, or packed sequences
  bool packed;                                   // rows are rows of the whole tensor, batch strides are not used
  int64_t heads, kv_heads, q_rows, k_rows, dim;  // rows of one batch item, or of the packed tensor
  TokenRows q_index, k_index;
  RowStrides q_strides, k_strides, v_strides, out_strides, lse_strides;  // lse: of (batch, head, row) scalars
  bool causal;  // by position; without an index query row i is position k_rows - q_rows + i
  double scale;
};

// out = softmax(scale q k' + mask) v, lse = log sum exp. Rows not kept and rows without a key give 0 and -inf.
struct SparsePrefillForward {
  AttentionShape shape;
  const void *q, *k, *v;
  void* out;
  void* lse;  // fp32 (fp64 for float64)

  // Mean over heads and over the listed query rows of the attention each key receives; null when not wanted.
  const int64_t* importance_rows;  // (listed), or (sequences, listed) when listed_per_sequence
  int64_t listed;
  bool listed_per_sequence;
  void* importance;  // (sequences, k_rows), or (k_rows) when packed, contiguous, type of lse
};
void sparse_prefill_forward(const SparsePrefillForward& args);

// Probabilities are recomputed from lse; the order of every sum is fixed, so repeated runs are bitwise equal.
struct SparsePrefillBackward {
  AttentionShape shape;  // out_strides also for dout, with dlse strides as lse_strides
  const void *q, *k, *v, *out, *dout;
  const void *lse, *dlse;  // dlse may be null
  void *dq, *dk, *dv;      // contiguous (batch, row, head, dim)
  RowStrides dout_strides, dq_strides, dk_strides, dv_strides;
};
void sparse_prefill_backward(const SparsePrefillBackward& args);

}  // namespace flashsloth::cpu
