// Embedded-query attention on CUDA: tensors to cuda/embedded_query.h.
#include <tuple>

#include "bindings/cuda.h"
#include "cuda/embedded_query.h"

namespace flashsloth {
namespace {

const Expect expect{"embedded_query"}, expect_state{"image_state"};

// Contiguous and 16-byte aligned, which a view into a larger tensor may not be.
Tensor aligned(const Tensor& t_) {
  const Tensor t = dense(t_);
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

Tensor bytes(int64_t count, const Tensor& where) { return empty({count}, ScalarType::Byte, where); }

std::tuple<Tensor, Tensor, Tensor> image_state(Tensor image_, Tensor weight_, Tensor bias_, double eps) {
  expect_one_device(expect_state, image_, weight_, bias_);
  const Tensor image = aligned(image_), weight = aligned(weight_), bias = aligned(bias_);
  const ScalarType dtype = image.scalar_type();
  expect_state(image.dim() == 3 && weight.dim() == 2 && weight.size(1) == image.size(2) &&
                   bias.numel() == weight.size(0) && weight.scalar_type() == dtype && bias.scalar_type() == dtype,
               "expected image (Bi, N, Di), weight (E, Di) and bias (E) of one dtype");
  const int64_t images = image.size(0), tokens = image.size(1), inner = weight.size(0);
  Tensor y = empty({images, tokens, inner}, dtype, image);
  Tensor mean = empty({images, tokens}, wide(dtype), image), rstd = empty({images, tokens}, wide(dtype), image);
  const cuda::ImageState args{dtype_of(image, expect_state),
                              images * tokens,
                              image.size(2),
                              inner,
                              data(image),
                              data(weight),
                              data(bias),
                              eps,
                              data(y),
                              static_cast<float*>(data(mean)),
                              static_cast<float*>(data(rstd))};
  const OnDeviceOf where(image);
  const Tensor scratch = bytes(cuda::image_state_scratch(args), image);
  cuda::image_state(args, data(scratch), where.stream);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> embedded_query(
    Tensor query_, Tensor text_, std::optional<Tensor> lengths_, Tensor image_, Tensor y_, Tensor mean_, Tensor rstd_,
    std::vector<Tensor> params_, int64_t heads, double eps, bool return_weights, bool save) {
  expect_one_device(expect, query_, text_, lengths_, image_, y_, mean_, rstd_, params_);
  const Tensor query = aligned(query_), text = aligned(text_), image = aligned(image_), y = aligned(y_);
  const Tensor mean = dense(mean_), rstd = aligned(rstd_);
  const std::optional<Tensor> lengths = dense(lengths_);
  const ScalarType dtype = query.scalar_type();
  for (const Tensor* t : {&query, &text, &image, &y}) {
    expect(t->dim() == 3, "expected query, text, image and y of three dimensions");
    expect(t->scalar_type() == dtype, "expected one dtype for query, text, image, y and params");
  }
  const int64_t batch = query.size(0), queries = query.size(1), model = query.size(2), texts = text.size(1);
  const int64_t images = image.size(0), tokens = image.size(1), dim = image.size(2), inner = y.size(2);
  expect(text.size(0) == batch && text.size(2) == model, "expected text (B, T, Dm) like query (B, Q, Dm)");
  expect(y.size(0) == images && y.size(1) == tokens, "expected y (Bi, N, E) like image (Bi, N, Di)");
  expect(images > 0 ? batch % images == 0 : batch == 0, "expected a multiple of the images as batch");
  expect(heads > 0 && inner % heads == 0 && dim % heads == 0, "expected num_heads that divides E and Di");
  for (const Tensor* t : {&mean, &rstd})
    expect(t->numel() == images * tokens && t->scalar_type() == wide(dtype), "expected mean and rstd (Bi, N)");
  if (lengths)  // their values are on the device, and stay there
    expect(lengths->scalar_type() == ScalarType::Long && lengths->numel() == batch,
           "text_lengths: expected int64 (B,)");

  std::vector<int64_t> sizes{inner * model, inner};
  sizes.insert(sizes.end(), 6, inner);
  for (int i = 0; i < 5; ++i) sizes.insert(sizes.end(), {inner * inner, inner});
  sizes.insert(sizes.end(), {dim * dim, dim, model * dim, model});
  expect(params_.size() == sizes.size(), "expected 22 params, got ", static_cast<int64_t>(params_.size()));
  std::vector<Tensor> params;
  for (size_t i = 0; i < sizes.size(); ++i) {
    params.push_back(aligned(params_[i]));
    expect(params[i].numel() == sizes[i] && params[i].scalar_type() == dtype, "params[", static_cast<int64_t>(i),
           "]: expected ", sizes[i], " numbers of the dtype of query");
  }

  const int64_t kept = save ? batch : 0;
  const ScalarType fp = wide(dtype);
  Tensor out = empty({batch, queries, model}, dtype, query);
  Tensor weights = empty({return_weights ? batch : 0, queries, tokens}, fp, query);
  Tensor hidden = empty({kept * (queries + texts), inner}, fp, query);
  Tensor told = empty({kept, queries, inner}, fp, query);
  Tensor pooled = empty({kept, queries, heads, dim}, fp, query);
  Tensor seen = empty({kept, queries, dim}, fp, query);
  Tensor softmax = empty({kept, queries, heads, 2}, fp, query);

  cuda::EmbeddedQueryForward args{};
  args.dtype = dtype_of(query, expect);
  args.batch = batch;
  args.queries = queries;
  args.text = texts;
  args.model = model;
  args.images = images;
  args.tokens = tokens;
  args.dim = dim;
  args.inner = inner;
  args.heads = heads;
  args.eps = eps;
  args.text_lengths = static_cast<const int64_t*>(data(lengths));
  args.query = data(query);
  args.text_rows = data(text);
  args.image = data(image);
  args.y = data(y);
  args.rstd = static_cast<const float*>(data(rstd));
  for (size_t i = 0; i < params.size(); ++i) args.params[i] = data(params[i]);
  args.out = data(out);
  const auto floats = [](bool wanted, const Tensor& t) { return wanted ? static_cast<float*>(data(t)) : nullptr; };
  args.weights = floats(return_weights, weights);
  args.hidden = floats(save, hidden);
  args.told = floats(save, told);
  args.pooled = floats(save, pooled);
  args.seen = floats(save, seen);
  args.softmax = floats(save, softmax);
  const OnDeviceOf where(query);
  const Tensor scratch = bytes(cuda::embedded_query_scratch(args), query);
  cuda::embedded_query_forward(args, data(scratch), where.stream);
  return {out, weights, hidden, told, pooled, seen, softmax};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, FLASHSLOTH_CUDA_KEY, m) {
  m.impl("image_state.cuda", TORCH_BOX(&image_state));
  m.impl("embedded_query.cuda", TORCH_BOX(&embedded_query));
}

}  // namespace flashsloth
