// Attention over kept tokens on CUDA: tensors to cuda/sparse_prefill.h.
#include <tuple>

#include "bindings/cuda.h"
#include "cuda/sparse_prefill.h"

namespace flashsloth {
namespace {

const Expect expect{"sparse_prefill"};

// Rows the kernel can copy 16 bytes at a time: where a tensor starts or is strided otherwise, a copy of it.
Tensor rows_of(const Tensor& t) {
  constexpr int64_t kBytes = 16, kElements = kBytes / 2;
  bool fits = reinterpret_cast<uintptr_t>(data(t)) % kBytes == 0 && (t.size(-1) <= 1 || t.stride(-1) == 1);
  for (int64_t i = 0; i + 1 < t.dim(); ++i) fits = fits && (t.size(i) <= 1 || t.stride(i) % kElements == 0);
  if (fits || t.numel() == 0) return t;
  Tensor copy = empty(std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), t.scalar_type(), t);
  return torch::stable::copy_(copy, t);
}

// The strides of (batch, heads, rows, d) or packed (rows, heads, d); `trailing` is 0 for scalars a row, like the
// log-sum-exp. A dimension of one element may have any stride, and gets none.
cuda::RowStrides row_strides(const Tensor& t, bool packed, int64_t trailing = 1) {
  const auto stride = [&](int64_t i) { return t.size(i) > 1 ? t.stride(i) : 0; };
  return packed ? cuda::RowStrides{0, stride(1), stride(0)}
                : cuda::RowStrides{stride(0), stride(1), stride(t.dim() - 1 - trailing)};
}

// Memory in the order (batch, row, head, d), which the projection after attention reads as a matrix.
Tensor empty_token_major(const Tensor& like) {
  if (like.dim() == 3) return empty({like.size(0), like.size(1), like.size(2)}, like.scalar_type(), like);
  return torch::stable::transpose(
      empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type(), like), 1, 2);
}

// One side's index, kept alive for the call.
struct PrefillIndex {
  std::optional<Tensor> indices, cu_seqlens, positions;
  cuda::TokenRows rows{nullptr, nullptr, nullptr, 0, 0};

  PrefillIndex(const std::optional<Tensor>& indices_, const std::optional<Tensor>& cu_seqlens_,
               const std::optional<Tensor>& positions_, int64_t max_seqlen)
      : indices(dense(indices_)), cu_seqlens(dense(cu_seqlens_)), positions(dense(positions_)) {
    expect(indices.has_value() == cu_seqlens.has_value(), "indices and cu_seqlens go together");
    for (const auto* t : {&indices, &cu_seqlens, &positions})
      expect(!*t || ((*t)->dim() == 1 && (*t)->scalar_type() == ScalarType::Int),
             "expected int32 index tensors of one dimension");
    if (!indices) return;
    expect(cu_seqlens->size(0) >= 1, "expected cu_seqlens with at least one entry");
    expect(!positions || positions->size(0) == indices->size(0), "expected positions as indices");
    rows = {static_cast<const int32_t*>(data(indices)), static_cast<const int32_t*>(data(cu_seqlens)),
            static_cast<const int32_t*>(data(positions)), indices->size(0), max_seqlen};
  }
  int64_t sequences(int64_t otherwise) const { return cu_seqlens ? cu_seqlens->size(0) - 1 : otherwise; }
};

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(Tensor q_, Tensor k_, Tensor v_, std::optional<Tensor> q_indices,
                                                  std::optional<Tensor> q_cu_seqlens, std::optional<Tensor> q_positions,
                                                  int64_t q_max_seqlen, std::optional<Tensor> k_indices,
                                                  std::optional<Tensor> k_cu_seqlens, std::optional<Tensor> k_positions,
                                                  int64_t k_max_seqlen, bool causal, double scale,
                                                  std::optional<Tensor> importance_rows) {
  expect_one_device(expect, q_, k_, v_, q_indices, q_cu_seqlens, q_positions, k_indices, k_cu_seqlens, k_positions,
                    importance_rows);
  const bool packed = q_.dim() == 3;
  expect((packed || q_.dim() == 4) && k_.dim() == q_.dim() && v_.dim() == q_.dim(),
         "expected q, k and v of four dimensions, or of three when packed");
  expect(q_.size(-1) == 72 || q_.size(-1) == 80, "q: expected a head size of 72 or 80, got ", q_.size(-1));
  bool fits = q_.size(-1) == k_.size(-1) && (packed || q_.size(0) == k_.size(0));
  for (int64_t i = 0; i < k_.dim(); ++i) fits = fits && k_.size(i) == v_.size(i);
  expect(fits, "q, k and v do not fit each other");
  expect(k_.size(1) > 0 ? q_.size(1) % k_.size(1) == 0 : q_.size(1) == 0, "key heads must divide heads");
  expect(q_.scalar_type() == ScalarType::BFloat16 || q_.scalar_type() == ScalarType::Half,
         "q: expected bfloat16 or float16");
  expect(k_.scalar_type() == q_.scalar_type() && v_.scalar_type() == q_.scalar_type(),
         "expected q, k and v of one dtype");

  const OnDeviceOf where(q_);
  const Tensor q = rows_of(q_), k = rows_of(k_), v = rows_of(v_);
  const PrefillIndex q_index(q_indices, q_cu_seqlens, q_positions, q_max_seqlen);
  const PrefillIndex k_index(k_indices, k_cu_seqlens, k_positions, k_max_seqlen);
  const int64_t rows = packed ? 0 : 2;
  cuda::SparsePrefillForward args{};
  args.dtype = dtype_of(q, expect);
  args.sequences = packed ? q_index.sequences(k_index.sequences(1)) : q.size(0);
  expect(q_index.sequences(packed ? 1 : args.sequences) == args.sequences &&
             k_index.sequences(packed ? 1 : args.sequences) == args.sequences,
         "the indices do not have the sequences of q and k");
  args.packed = packed;
  args.heads = q.size(1);
  args.kv_heads = k.size(1);
  args.q_rows = q.size(rows);
  args.k_rows = k.size(rows);
  args.dim = q.size(-1);
  args.q_index = q_index.rows;
  args.k_index = k_index.rows;
  args.q_strides = row_strides(q, packed);
  args.k_strides = row_strides(k, packed);
  args.v_strides = row_strides(v, packed);
  args.causal = causal;
  args.scale = scale;

  Tensor out = empty_token_major(q);
  std::vector<int64_t> per_row = {q.size(0), q.size(1)};
  if (!packed) per_row.push_back(q.size(2));
  Tensor lse = empty(per_row, ScalarType::Float, q);
  Tensor importance = empty(!importance_rows ? std::vector<int64_t>{0}
                            : packed         ? std::vector<int64_t>{k.size(0)}
                                             : std::vector<int64_t>{k.size(0), k.size(2)},
                            ScalarType::Float, q);
  const std::optional<Tensor> listed = dense(importance_rows);
  if (listed) {
    expect(listed->scalar_type() == ScalarType::Long && (listed->dim() == 1 || (listed->dim() == 2 && !packed)),
           "expected int64 importance_rows (R,) or (B, R)");
    expect(listed->dim() == 1 || listed->size(0) == q.size(0), "expected importance_rows (B, R)");
    args.importance_rows = static_cast<const int64_t*>(data(*listed));
    args.listed = listed->size(-1);
    args.listed_per_sequence = listed->dim() == 2;
    args.importance = static_cast<float*>(data(importance));
  }
  args.out_strides = row_strides(out, packed);
  args.lse_strides = row_strides(lse, packed, 0);
  args.q = data(q);
  args.k = data(k);
  args.v = data(v);
  args.out = data(out);
  args.lse = static_cast<float*>(data(lse));
  cuda::sparse_prefill_forward(args, where.stream);
  return {out, lse, importance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, FLASHSLOTH_CUDA_KEY, m) {
  m.impl("sparse_prefill.cuda", TORCH_BOX(&sparse_prefill));
}

}  // namespace flashsloth
