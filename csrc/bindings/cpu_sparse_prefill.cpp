// Attention over kept tokens on the CPU: tensors to cpu/sparse_prefill.h.
#include <tuple>

#include "bindings/tensor.h"
#include "cpu/sparse_prefill.h"

namespace flashsloth {
namespace {

const Expect expect{"sparse_prefill"};

// Rows with a contiguous last dimension; other strides are the kernel's business.
Tensor rows_of(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : dense(t); }

// (batch, heads, rows, d) or packed (rows, heads, d); `trailing` is 0 for scalars a row, like the log-sum-exp.
cpu::RowStrides row_strides(const Tensor& t, bool packed, int64_t trailing = 1) {
  const int64_t rows = t.dim() - 1 - trailing;
  return packed ? cpu::RowStrides{0, t.stride(1), t.stride(0)}
                : cpu::RowStrides{t.stride(0), t.stride(1), t.stride(rows)};
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
  cpu::TokenRows rows{nullptr, nullptr, nullptr, 0};

  PrefillIndex(const std::optional<Tensor>& indices_, const std::optional<Tensor>& cu_seqlens_,
               const std::optional<Tensor>& positions_)
      : indices(dense(indices_)), cu_seqlens(dense(cu_seqlens_)), positions(dense(positions_)) {
    expect(indices.has_value() == cu_seqlens.has_value(), "indices and cu_seqlens go together");
    for (const auto* t : {&indices, &cu_seqlens, &positions})
      expect(!*t || ((*t)->dim() == 1 && (*t)->scalar_type() == ScalarType::Int),
             "expected int32 index tensors of one dimension");
    if (!indices) return;
    expect(cu_seqlens->size(0) >= 1, "expected cu_seqlens with at least one entry");
    expect(!positions || positions->size(0) == indices->size(0), "expected positions as indices");
    rows = {static_cast<const int32_t*>(data(indices)), static_cast<const int32_t*>(data(cu_seqlens)),
            static_cast<const int32_t*>(data(positions)), indices->size(0)};
  }
  int64_t sequences(int64_t otherwise) const { return cu_seqlens ? cu_seqlens->size(0) - 1 : otherwise; }
};

cpu::AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v, const PrefillIndex& q_index,
                                    const PrefillIndex& k_index, bool causal, double scale) {
  const bool packed = q.dim() == 3;
  expect((packed || q.dim() == 4) && k.dim() == q.dim() && v.dim() == q.dim(),
         "expected q, k and v of four dimensions, or of three when packed");
  const int64_t rows = packed ? 0 : 2;
  bool fits = q.size(-1) == k.size(-1) && (packed || q.size(0) == k.size(0));
  for (int64_t i = 0; i < k.dim(); ++i) fits = fits && k.size(i) == v.size(i);
  expect(fits, "q, k and v do not fit each other");
  expect(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "key heads must divide heads");
  const int64_t sequences = packed ? q_index.sequences(k_index.sequences(1)) : q.size(0);
  expect(
      q_index.sequences(packed ? 1 : sequences) == sequences && k_index.sequences(packed ? 1 : sequences) == sequences,
      "the indices do not have the sequences of q and k");
  cpu::AttentionShape shape{};
  shape.dtype = dtype_of(q, expect);
  expect(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "expected q, k and v of one dtype");
  shape.sequences = sequences;
  shape.packed = packed;
  shape.heads = q.size(1);
  shape.kv_heads = k.size(1);
  shape.q_rows = q.size(rows);
  shape.k_rows = k.size(rows);
  shape.dim = q.size(-1);
  shape.q_index = q_index.rows;
  shape.k_index = k_index.rows;
  shape.q_strides = row_strides(q, packed);
  shape.k_strides = row_strides(k, packed);
  shape.v_strides = row_strides(v, packed);
  shape.causal = causal;
  shape.scale = scale;
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(Tensor q_, Tensor k_, Tensor v_, std::optional<Tensor> q_indices,
                                                  std::optional<Tensor> q_cu_seqlens, std::optional<Tensor> q_positions,
                                                  int64_t, std::optional<Tensor> k_indices,
                                                  std::optional<Tensor> k_cu_seqlens, std::optional<Tensor> k_positions,
                                                  int64_t, bool causal, double scale,
                                                  std::optional<Tensor> importance_rows) {
  const Tensor q = rows_of(q_), k = rows_of(k_), v = rows_of(v_);
  const PrefillIndex q_index(q_indices, q_cu_seqlens, q_positions), k_index(k_indices, k_cu_seqlens, k_positions);
  cpu::SparsePrefillForward args{};
  args.shape = attention_shape(q, k, v, q_index, k_index, causal, scale);
  const bool packed = args.shape.packed;

  Tensor out = empty_token_major(q);
  const ScalarType statistics = wide(q.scalar_type());
  Tensor lse =
      empty(packed ? std::vector<int64_t>{q.size(0), q.size(1)} : std::vector<int64_t>{q.size(0), q.size(1), q.size(2)},
            statistics, q);
  Tensor importance = empty(!importance_rows ? std::vector<int64_t>{0}
                            : packed         ? std::vector<int64_t>{k.size(0)}
                                             : std::vector<int64_t>{k.size(0), k.size(2)},
                            statistics, q);
  const std::optional<Tensor> listed = dense(importance_rows);
  if (listed) {
    expect(listed->scalar_type() == ScalarType::Long && (listed->dim() == 1 || (listed->dim() == 2 && !packed)),
           "expected int64 importance_rows (R,) or (B, R)");
    expect(listed->dim() == 1 || listed->size(0) == q.size(0), "expected importance_rows (B, R)");
    args.importance_rows = static_cast<const int64_t*>(data(*listed));
    args.listed = listed->size(-1);
    args.listed_per_sequence = listed->dim() == 2;
    args.importance = data(importance);
  }
  args.shape.out_strides = row_strides(out, packed);
  args.shape.lse_strides = row_strides(lse, packed, 0);
  args.q = data(q);
  args.k = data(k);
  args.v = data(v);
  args.out = data(out);
  args.lse = data(lse);
  cpu::sparse_prefill_forward(args);
  return {out, lse, importance};
}

std::tuple<Tensor, Tensor, Tensor> sparse_prefill_backward(
    Tensor dout_, std::optional<Tensor> dlse_, Tensor q_, Tensor k_, Tensor v_, Tensor out_, Tensor lse_,
    std::optional<Tensor> q_indices, std::optional<Tensor> q_cu_seqlens, std::optional<Tensor> q_positions, int64_t,
    std::optional<Tensor> k_indices, std::optional<Tensor> k_cu_seqlens, std::optional<Tensor> k_positions, int64_t,
    bool causal, double scale) {
  const Tensor dout = rows_of(dout_), q = rows_of(q_), k = rows_of(k_), v = rows_of(v_), out = rows_of(out_);
  const Tensor lse = dense(lse_);
  const std::optional<Tensor> dlse = dense(dlse_);
  const PrefillIndex q_index(q_indices, q_cu_seqlens, q_positions), k_index(k_indices, k_cu_seqlens, k_positions);
  cpu::SparsePrefillBackward args{};
  args.shape = attention_shape(q, k, v, q_index, k_index, causal, scale);
  const bool packed = args.shape.packed;
  bool fits = lse.dim() == q.dim() - 1 && dout.dim() == q.dim() && out.dim() == q.dim();
  for (int64_t i = 0; fits && i < q.dim(); ++i) {
    fits = dout.size(i) == q.size(i) && out.size(i) == q.size(i);
    fits = fits && (i == q.dim() - 1 || (lse.size(i) == q.size(i) && (!dlse || dlse->size(i) == q.size(i))));
  }
  expect(fits, "dout, dlse, out and lse do not fit q");
  expect(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
             lse.scalar_type() == wide(q.scalar_type()) && (!dlse || dlse->scalar_type() == lse.scalar_type()),
         "expected dout and out in the dtype of q, lse and dlse in fp32");

  Tensor dq = empty_token_major(q), dk = empty_token_major(k), dv = empty_token_major(v);
  args.shape.out_strides = row_strides(out, packed);
  args.shape.lse_strides = row_strides(lse, packed, 0);
  args.dout_strides = row_strides(dout, packed);
  args.dq_strides = row_strides(dq, packed);
  args.dk_strides = row_strides(dk, packed);
  args.dv_strides = row_strides(dv, packed);
  args.q = data(q);
  args.k = data(k);
  args.v = data(v);
  args.out = data(out);
  args.dout = data(dout);
  args.lse = data(lse);
  args.dlse = data(dlse);
  args.dq = data(dq);
  args.dk = data(dk);
  args.dv = data(dv);
  cpu::sparse_prefill_backward(args);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, CPU, m) {
  m.impl("sparse_prefill", TORCH_BOX(&sparse_prefill));
  m.impl("sparse_prefill_backward", TORCH_BOX(&sparse_prefill_backward));
}

}  // namespace flashsloth
