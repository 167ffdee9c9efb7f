// Attention over the tokens that are kept, head sizes 72 and 80, on GPUs of compute capability 9.0: the interface.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace flashsloth::cuda {

// Rows that take part, sequence by sequence: sequence s keeps indices[cu_seqlens[s] .. cu_seqlens[s + 1]), ascending.
// Whatever the arrays hold, kernels read and write inside the tensors: bounds are clamped and entries out of range are
// ignored. Of a list that does not ascend, results are unspecified.
struct TokenRows {
  const int32_t* indices;     // (capacity)
  const int32_t* cu_seqlens;  // (sequences + 1), or null: every row of every sequence
  const int32_t* positions;   // (capacity), or null: the indices. Ascending within a sequence
  int64_t capacity;
  int64_t max_seqlen;  // no sequence keeps more; what is listed beyond it is ignored
};

// Elements from one batch item, head and row to the next; the last dimension is contiguous.
struct RowStrides {
  int64_t batch, head, row;
};

// out = softmax(scale q k' + mask) v, lse = log sum exp. Rows not kept and rows without a key give 0 and -inf.
// q, k, v and out start on, and are strided by, multiples of 16 bytes.
struct SparsePrefillForward {
  DType dtype;                                   // of q, k, v and out: bfloat16 or float16
  int64_t sequences;                             // batch items, or packed sequences
  bool packed;                                   // rows are rows of the whole tensor, batch strides are not used
  int64_t heads, kv_heads, q_rows, k_rows, dim;  // rows of one batch item, or of the packed tensor
  TokenRows q_index, k_index;
  RowStrides q_strides, k_strides, v_strides, out_strides, lse_strides;  // lse: of (batch, head, row) scalars
  bool causal;  // by position; without an index query row i is position k_rows - q_rows + i
  double scale;
  const void *q, *k, *v;
  void* out;
  float* lse;

  // Mean over heads and over the listed query rows of the attention each key receives; null when not wanted.
  const int64_t* importance_rows;  // (listed), or (sequences, listed) when listed_per_sequence
  int64_t listed;
  bool listed_per_sequence;
  float* importance;  // (sequences, k_rows), or (k_rows) when packed, contiguous
};

// Throws std::runtime_error naming what is outside the kernel's limits, or a launch that failed.
void sparse_prefill_forward(const SparsePrefillForward& args, cudaStream_t stream);

}  // namespace flashsloth::cuda
