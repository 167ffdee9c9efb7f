// Embedded-query attention on the CPU: tensors to cpu/embedded_query.h.
#include <tuple>

#include "bindings/tensor.h"
#include "cpu/embedded_query.h"

namespace flashsloth {
namespace {

const Expect expect{"embedded_query"};

std::tuple<Tensor, Tensor, Tensor> image_state(Tensor image_, Tensor weight_, Tensor bias_, double eps) {
  const Tensor image = dense(image_), weight = dense(weight_), bias = dense(bias_);
  const ScalarType dtype = image.scalar_type();
  expect(image.dim() == 3 && weight.dim() == 2 && weight.size(1) == image.size(2) && bias.numel() == weight.size(0) &&
             weight.scalar_type() == dtype && bias.scalar_type() == dtype,
         "expected image (Bi, N, Di), weight (E, Di) and bias (E) of one dtype");
  const int64_t images = image.size(0), tokens = image.size(1), inner = weight.size(0);
  Tensor y = empty({images, tokens, inner}, dtype, image);
  Tensor mean = empty({images, tokens}, wide(dtype), image), rstd = empty({images, tokens}, wide(dtype), image);
  cpu::image_state({dtype_of(image, expect), images * tokens, image.size(2), inner, data(image), data(weight),
                    data(bias), eps, data(y), data(mean), data(rstd)});
  return {y, mean, rstd};
}

// Inputs that forward and backward share, contiguous, with their sizes.
struct QueryInputs {
  Tensor query, text, image, y, mean, rstd;
  std::optional<Tensor> lengths;
  std::vector<Tensor> params;
  cpu::EmbeddedQuerySizes sizes;

  QueryInputs(const Tensor& query_, const Tensor& text_, const std::optional<Tensor>& lengths_, const Tensor& image_,
              const Tensor& y_, const Tensor& mean_, const Tensor& rstd_, const std::vector<Tensor>& params_,
              int64_t heads, double eps)
      : query(dense(query_)),
        text(dense(text_)),
        image(dense(image_)),
        y(dense(y_)),
        mean(dense(mean_)),
        rstd(dense(rstd_)),
        lengths(dense(lengths_)) {
    const ScalarType dtype = query.scalar_type();
    for (const Tensor* t : {&query, &text, &image, &y}) {
      expect(t->dim() == 3, "expected query, text, image and y of three dimensions");
      expect(t->scalar_type() == dtype, "expected one dtype for query, text, image, y and params");
    }
    sizes = {dtype_of(query, expect), query.size(0), query.size(1), text.size(1), query.size(2), image.size(0),
             image.size(1),           image.size(2), y.size(2),     heads,        eps,           nullptr};
    const auto& s = sizes;
    expect(text.size(0) == s.batch && text.size(2) == s.model, "expected text (B, T, Dm) like query (B, Q, Dm)");
    expect(y.size(0) == s.images && y.size(1) == s.tokens, "expected y (Bi, N, E) like image (Bi, N, Di)");
    expect(s.images > 0 ? s.batch % s.images == 0 : s.batch == 0, "expected a multiple of the images as batch");
    expect(heads > 0 && s.inner % heads == 0 && s.dim % heads == 0, "expected num_heads that divides E and Di");
    for (const Tensor* t : {&mean, &rstd})
      expect(t->numel() == s.images * s.tokens && t->scalar_type() == wide(dtype), "expected mean and rstd (Bi, N)");

    const std::vector<int64_t> expected = param_sizes();
    expect(params_.size() == expected.size(), "expected 22 params, got ", static_cast<int64_t>(params_.size()));
    for (size_t i = 0; i < expected.size(); ++i) {
      params.push_back(dense(params_[i]));
      expect(params[i].numel() == expected[i] && params[i].scalar_type() == dtype, "params[", static_cast<int64_t>(i),
             "]: expected ", expected[i], " numbers of the dtype of query");
    }
    if (!lengths) return;
    expect(lengths->scalar_type() == ScalarType::Long && lengths->numel() == s.batch,
           "text_lengths: expected int64 (B,)");
    sizes.text_lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < s.batch; ++b)
      expect(sizes.text_lengths[b] >= 0 && sizes.text_lengths[b] <= s.text, "text_lengths: expected lengths in [0, ",
             s.text, "], got ", sizes.text_lengths[b]);
  }

  std::vector<int64_t> param_sizes() const {
    const int64_t e = sizes.inner, model = sizes.model, dim = sizes.dim;
    std::vector<int64_t> numbers{e * model, e};
    numbers.insert(numbers.end(), 6, e);
    for (int i = 0; i < 5; ++i) numbers.insert(numbers.end(), {e * e, e});
    numbers.insert(numbers.end(), {dim * dim, dim, model * dim, model});
    return numbers;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embedded_query(
    Tensor query, Tensor text, std::optional<Tensor> text_lengths, Tensor image, Tensor y, Tensor mean, Tensor rstd,
    std::vector<Tensor> params, int64_t num_heads, double eps, bool return_weights, bool save) {
  const QueryInputs in(query, text, text_lengths, image, y, mean, rstd, params, num_heads, eps);
  const auto& s = in.sizes;
  const ScalarType dtype = in.query.scalar_type(), fp = wide(dtype);
  const int64_t kept = save ? s.batch : 0;
  Tensor out = empty({s.batch, s.queries, s.model}, dtype, in.query);
  Tensor weights = empty({return_weights ? s.batch : 0, s.queries, s.tokens}, fp, in.query);
  Tensor hidden = empty({kept * (s.queries + s.text), s.inner}, fp, in.query);
  Tensor told = empty({kept, s.queries, s.inner}, fp, in.query);
  Tensor pooled = empty({kept, s.queries, s.heads, s.dim}, fp, in.query);
  Tensor seen = empty({kept, s.queries, s.dim}, fp, in.query);
  Tensor softmax = empty({kept, s.queries, s.heads, 2}, fp, in.query);

  cpu::EmbeddedQueryForward args{s,
                                 data(in.query),
                                 data(in.text),
                                 data(in.image),
                                 data(in.y),
                                 data(in.rstd),
                                 {},
                                 data(out),
                                 return_weights ? data(weights) : nullptr,
                                 save,
                                 {}};
  for (int i = 0; i < cpu::kEmbeddedQueryParams; ++i) args.params[i] = data(in.params[i]);
  if (save) args.saved = {data(hidden), data(told), data(pooled), data(seen), data(softmax)};
  cpu::embedded_query_forward(args);
  return {out, weights, hidden, told, pooled, seen, softmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>> embedded_query_backward(
    Tensor dout_, Tensor query, Tensor text, std::optional<Tensor> text_lengths, Tensor image, Tensor y, Tensor mean,
    Tensor rstd, std::vector<Tensor> params, Tensor hidden_, Tensor told_, Tensor pooled_, Tensor seen_,
    Tensor softmax_, int64_t num_heads, double eps, bool need_image, bool need_y, bool need_params) {
  const QueryInputs in(query, text, text_lengths, image, y, mean, rstd, params, num_heads, eps);
  const auto& s = in.sizes;
  const ScalarType dtype = in.query.scalar_type();
  const Tensor dout = dense(dout_), hidden = dense(hidden_), told = dense(told_), pooled = dense(pooled_);
  const Tensor seen = dense(seen_), softmax = dense(softmax_);
  expect(dout.numel() == s.rows() * s.model && dout.scalar_type() == dtype,
         "dout: expected the shape and dtype of query");
  for (const Tensor* t : {&hidden, &told, &pooled, &seen, &softmax})
    expect(t->scalar_type() == wide(dtype), "expected what forward saved with save=True");
  expect(hidden.numel() == s.batch * (s.queries + s.text) * s.inner && told.numel() == s.rows() * s.inner &&
             pooled.numel() == s.rows() * s.heads * s.dim && seen.numel() == s.rows() * s.dim &&
             softmax.numel() == s.rows() * s.heads * 2,
         "expected what forward saved with save=True");

  Tensor dquery = empty({s.batch, s.queries, s.model}, dtype, in.query);
  Tensor dtext = empty({s.batch, s.text, s.model}, dtype, in.query);
  Tensor dimage = empty({need_image ? s.images : 0, s.tokens, s.dim}, dtype, in.query);
  Tensor dy = empty({need_y ? s.images : 0, s.tokens, s.inner}, dtype, in.query);
  cpu::EmbeddedQueryBackward args{s,
                                  data(dout),
                                  data(in.query),
                                  data(in.text),
                                  data(in.image),
                                  data(in.y),
                                  data(in.mean),
                                  data(in.rstd),
                                  {},
                                  {data(hidden), data(told), data(pooled), data(seen), data(softmax)},
                                  data(dquery),
                                  data(dtext),
                                  need_image ? data(dimage) : nullptr,
                                  need_y ? data(dy) : nullptr,
                                  {}};
  std::vector<Tensor> dparams;
  for (int i = 0; i < cpu::kEmbeddedQueryParams; ++i) {
    std::vector<int64_t> shape(in.params[i].sizes().begin(), in.params[i].sizes().end());
    if (!need_params) shape[0] = 0;
    dparams.push_back(empty(shape, dtype, in.query));
    args.params[i] = data(in.params[i]);
    args.dparams[i] = need_params ? data(dparams[i]) : nullptr;
  }
  cpu::embedded_query_backward(args);
  return {dquery, dtext, dimage, dy, dparams};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, CPU, m) {
  m.impl("image_state", TORCH_BOX(&image_state));
  m.impl("embedded_query", TORCH_BOX(&embedded_query));
  m.impl("embedded_query_backward", TORCH_BOX(&embedded_query_backward));
}

}  // namespace flashsloth
