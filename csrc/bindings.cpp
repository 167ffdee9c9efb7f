// The one file that knows torch: registers the kernels under torch.ops.flashsloth (libtorch stable ABI, so one
// binary serves every torch from 2.10) and gives the CPU kernels torch's matrix product and threads.
//
// Schemas, checks of what users pass, fake and autograd registrations live in flashsloth_ops/<op>.py.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/embedded_query.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/sparse_prefill.h"
#include "cpu/spatial_pool.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in torch 2.10
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// oneDNN's linear layer in torch's C interface for compiled models; weak, as builds of torch without oneDNN lack it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, const char* attr, const double** scalars,
    int64_t num_scalars, const char** algorithm, AtenTensorHandle* result);

namespace flashsloth::cpu {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// A tensor over memory of ours. Torch reads sizes and strides, so a transposed operand is only described.
template <class T>
Tensor wrap(const Matrix<T>& m) {
  const int64_t sizes[] = {m.transposed ? m.cols : m.rows, m.transposed ? m.rows : m.cols};
  const int64_t strides[] = {m.transposed ? 1 : m.stride, m.transposed ? m.stride : 1};
  return torch::stable::from_blob(const_cast<std::remove_const_t<T>*>(m.data), {sizes, 2}, {strides, 2}, kCpu,
                                  scalar_type<std::remove_const_t<T>>);
}

// Torch gives fp32 products to MKL, which takes its AVX-512 paths on Intel processors only: elsewhere oneDNN, also in
// torch, is twice as fast. It wants dense operands and makes its own result, so small products are not worth it.

bool onednn_is_faster(const Matrix<const float>& a, const Matrix<const float>& b) {
#if defined(__x86_64__)
  static const bool foreign = detected_isa() == Isa::avx512 && !__builtin_cpu_is("intel");
  const double work = 1.0 * a.rows * a.cols * (b.transposed ? b.rows : b.cols);
  return foreign && &aoti_torch_cpu__linear_pointwise != nullptr && work >= 1 << 20 && a.stride == a.cols &&
         b.stride == b.cols;
#else
  return false;
#endif
}

// C = alpha * op(A) op(B) + beta * C by oneDNN, whose linear layer multiplies with the transpose of its weight.
void onednn_gemm(float alpha, const Matrix<const float>& a, Matrix<const float> b, float beta, const Matrix<float>& c) {
  b.transposed = !b.transposed;
  const Tensor ta = wrap(a), tb = wrap(b);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu__linear_pointwise(ta.get(), tb.get(), nullptr, "none", nullptr, 0, nullptr, &handle));
  const Tensor product(handle);
  const float* from = static_cast<const float*>(product.const_data_ptr());
  for (int64_t i = 0; i < c.rows; ++i) {
    const float* source = from + i * c.cols;
    float* row = c.data + i * c.stride;
    if (alpha == 1 && beta == 0) {
      std::copy_n(source, c.cols, row);
    } else if (beta == 0) {
      for (int64_t j = 0; j < c.cols; ++j) row[j] = alpha * source[j];
    } else {
      for (int64_t j = 0; j < c.cols; ++j) row[j] = alpha * source[j] + beta * row[j];
    }
  }
}

}  // namespace

template <class T>
void gemm(T alpha, const Matrix<const T>& a, const Matrix<const T>& b, T beta, const Matrix<T>& c) {
  if constexpr (std::is_same_v<T, float>) {
    if (onednn_is_faster(a, b)) return onednn_gemm(alpha, a, b, beta, c);
  }
  const Tensor ta = wrap(a), tb = wrap(b), tc = wrap(c);
  if (alpha == T(1) && beta == T(0)) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(tc.get(), ta.get(), tb.get()));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(tc.get(), tc.get(), ta.get(), tb.get(), beta, alpha));
  }
}
template void gemm(float, const Matrix<const float>&, const Matrix<const float>&, float, const Matrix<float>&);
template void gemm(double, const Matrix<const double>&, const Matrix<const double>&, double, const Matrix<double>&);

void parallel_for_ranges(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  if (count > 0) STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}
int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace flashsloth::cpu

namespace {

namespace cpu = flashsloth::cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- helpers ----

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

cpu::DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::DType::float32;
    case ScalarType::Double: return cpu::DType::float64;
    case ScalarType::BFloat16: return cpu::DType::bfloat16;
    case ScalarType::Half: return cpu::DType::float16;
    default: throw std::runtime_error(std::string(op) + ": expected float32, float64, bfloat16 or float16 tensors");
  }
}

Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, kCpu);
}

// Statistics are fp32; for float64, which serves gradient checks, fp64.
ScalarType wide(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

// Contiguous form of an input, kept alive as long as the pointer is used.
Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }
std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}
void* data(const std::optional<Tensor>& t) { return t ? t->mutable_data_ptr() : nullptr; }
void* data(const Tensor& t) { return t.mutable_data_ptr(); }

int64_t scalar(const std::optional<Tensor>& t) {
  return t ? *static_cast<const int64_t*>(dense(*t).const_data_ptr()) : 0;
}

// The public functions check what users pass and explain it. These checks are for raw calls of the ops, which must not
// read out of bounds either.
void expect(const char* op, bool fits, const std::string& what) {
  if (!fits) throw std::runtime_error(std::string(op) + ": " + what);
}

// ---- spatial_pool ----

void expect_pool_inputs(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, bool packed) {
  constexpr const char* op = "spatial_pool";
  expect(op, x.dim() == (packed ? 2 : 3), "x: expected (B, N, D), or (T, D) with grids");
  expect(op, w1.dim() == 2 && w1.size(1) == x.size(x.dim() - 1), "w1: expected (Dh, D) with the D of x");
  expect(op, b1.numel() == w1.size(0) && w2.numel() == w1.size(0), "b1, w2: expected Dh elements");
  for (const Tensor& t : {w1, b1, w2})
    expect(op, t.scalar_type() == x.scalar_type(), "w1, b1, w2: expected the dtype of x");
}

// Geometry of a call: `grids` (images, 2) for packed tokens, else one (height, width) for every image of x.
struct PoolGeometry {
  std::optional<Tensor> packed;
  int64_t one[2];
  cpu::Grids grids;
  int64_t tokens = 0, windows = 0;

  PoolGeometry(const Tensor& x, const std::optional<Tensor>& grids_, int64_t height, int64_t width, int64_t ph,
               int64_t pw)
      : packed(dense(grids_)), one{height, width} {
    expect("spatial_pool",
           !packed || (packed->scalar_type() == ScalarType::Long && packed->dim() == 2 && packed->size(1) == 2),
           "grids: expected an int64 tensor (images, 2)");
    grids.sizes = packed ? static_cast<const int64_t*>(packed->const_data_ptr()) : one;
    grids.uniform = !packed;
    grids.images = packed ? packed->size(0) : x.size(0);
    grids.window_height = ph;
    grids.window_width = pw;
    for (int64_t i = 0; i < grids.images; ++i) {
      expect("spatial_pool", grids.height(i) >= 0 && grids.width(i) >= 0 && ph >= 1 && pw >= 1,
             "grids: expected sides of 0 or more and windows of 1 or more");
      tokens += grids.height(i) * grids.width(i);
      windows += grids.window_rows(i) * grids.window_columns(i);
    }
    const int64_t rows = packed ? x.size(0) : x.size(0) * x.size(1);
    expect("spatial_pool", tokens == rows,
           "grids: expected " + std::to_string(rows) + " tokens in all as x has, got " + std::to_string(tokens));
  }
};

std::tuple<Tensor, Tensor, Tensor> spatial_pool(Tensor x_, Tensor w1_, Tensor b1_, Tensor w2_, Tensor b2_,
                                                std::optional<Tensor> grids, int64_t height, int64_t width,
                                                int64_t num_windows, int64_t window_height, int64_t window_width,
                                                double dropout_p, std::optional<Tensor> seed, bool save_mask) {
  const Tensor x = dense(x_), w1 = dense(w1_), b1 = dense(b1_), w2 = dense(w2_), b2 = dense(b2_);
  expect_pool_inputs(x, w1, b1, w2, grids.has_value());
  const PoolGeometry geometry(x, grids, height, width, window_height, window_width);
  const int64_t dim = w1.size(1), hidden = w1.size(0), tokens = geometry.tokens;
  expect("spatial_pool", geometry.windows == num_windows * (grids ? 1 : x.size(0)),
         "num_windows: expected " + std::to_string(geometry.windows) + " in all for these grids, got " +
             std::to_string(num_windows));
  expect("spatial_pool", b2.numel() == 1 && b2.scalar_type() == x.scalar_type(), "b2: expected one element as x");
  expect("spatial_pool", dropout_p == 0 || (seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
         "seed: expected one int64 with dropout");

  Tensor y = empty(grids ? std::vector<int64_t>{num_windows, dim} : std::vector<int64_t>{x.size(0), num_windows, dim},
                   x.scalar_type());
  Tensor weights =
      empty(grids ? std::vector<int64_t>{tokens} : std::vector<int64_t>{x.size(0), x.size(1)}, wide(x.scalar_type()));
  Tensor mask = empty({save_mask ? tokens : 0, (hidden + 31) / 32}, ScalarType::Int);

  cpu::spatial_pool_forward({dtype_of(x, "spatial_pool"), tokens, dim, hidden, geometry.grids, data(x), data(w1),
                             data(b1), data(w2), data(b2), dropout_p, scalar(seed), data(y), data(weights),
                             save_mask ? static_cast<uint32_t*>(data(mask)) : nullptr});
  return {y, weights, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_pool_backward(Tensor dy_, std::optional<Tensor> dweights_, Tensor x_,
                                                                 Tensor w1_, Tensor b1_, Tensor w2_, Tensor weights_,
                                                                 Tensor mask_, std::optional<Tensor> grids,
                                                                 int64_t height, int64_t width, int64_t window_height,
                                                                 int64_t window_width, double dropout_p, bool need_dx,
                                                                 bool need_dw) {
  const Tensor dy = dense(dy_), x = dense(x_), w1 = dense(w1_), b1 = dense(b1_), w2 = dense(w2_);
  const Tensor weights = dense(weights_), mask = dense(mask_);
  const std::optional<Tensor> dweights = dense(dweights_);
  expect_pool_inputs(x, w1, b1, w2, grids.has_value());
  const PoolGeometry geometry(x, grids, height, width, window_height, window_width);
  const int64_t dim = w1.size(1), hidden = w1.size(0), tokens = geometry.tokens;
  expect("spatial_pool", dy.numel() == geometry.windows * dim && dy.scalar_type() == x.scalar_type(),
         "dy: expected (windows, D) in the dtype of x");
  expect("spatial_pool",
         weights.numel() == tokens && weights.scalar_type() == wide(x.scalar_type()) &&
             (!dweights || (dweights->numel() == tokens && dweights->scalar_type() == weights.scalar_type())),
         "weights, dweights: expected one fp32 number a token");
  expect("spatial_pool", mask.numel() == tokens * ((hidden + 31) / 32) && mask.scalar_type() == ScalarType::Int,
         "mask: expected what forward saves, int32 (tokens, ceil(Dh / 32))");

  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> dx_sizes(x.sizes().begin(), x.sizes().end());
  if (!need_dx) dx_sizes[0] = 0;
  Tensor dx = empty(dx_sizes, dtype);
  Tensor dw1 = empty({need_dw ? hidden : 0, dim}, dtype), db1 = empty({need_dw ? hidden : 0}, dtype);
  Tensor dw2 = empty({need_dw ? hidden : 0}, dtype);
  cpu::spatial_pool_backward({dtype_of(x, "spatial_pool_backward"), tokens, dim, hidden, geometry.grids, data(x),
                              data(w1), data(b1), data(w2), data(weights), data(dy), data(dweights),
                              static_cast<const uint32_t*>(data(mask)), dropout_p, need_dx ? data(dx) : nullptr,
                              need_dw ? data(dw1) : nullptr, need_dw ? data(db1) : nullptr,
                              need_dw ? data(dw2) : nullptr});
  return {dx, dw1, db1, dw2};
}

// ---- embedded_query ----

void expect(bool fits, const std::string& what) { expect("embedded_query", fits, what); }

std::tuple<Tensor, Tensor, Tensor> image_state(Tensor image_, Tensor weight_, Tensor bias_, double eps) {
  const Tensor image = dense(image_), weight = dense(weight_), bias = dense(bias_);
  const ScalarType dtype = image.scalar_type();
  expect(image.dim() == 3 && weight.dim() == 2 && weight.size(1) == image.size(2) && bias.numel() == weight.size(0) &&
             weight.scalar_type() == dtype && bias.scalar_type() == dtype,
         "expected image (Bi, N, Di), weight (E, Di) and bias (E) of one dtype");
  const int64_t images = image.size(0), tokens = image.size(1), inner = weight.size(0);
  Tensor y = empty({images, tokens, inner}, dtype);
  Tensor mean = empty({images, tokens}, wide(dtype)), rstd = empty({images, tokens}, wide(dtype));
  cpu::image_state({dtype_of(image, "image_state"), images * tokens, image.size(2), inner, data(image), data(weight),
                    data(bias), eps, data(y), data(mean), data(rstd)});
  return {y, mean, rstd};
}

// Inputs that forward and backward share, contiguous, with their sizes. Shapes are checked once more, since a raw call
// of the op must not read out of bounds either.
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
    sizes = {dtype_of(query, "embedded_query"),
             query.size(0),
             query.size(1),
             text.size(1),
             query.size(2),
             image.size(0),
             image.size(1),
             image.size(2),
             y.size(2),
             heads,
             eps,
             nullptr};
    const auto& s = sizes;
    expect(text.size(0) == s.batch && text.size(2) == s.model, "expected text (B, T, Dm) like query (B, Q, Dm)");
    expect(y.size(0) == s.images && y.size(1) == s.tokens, "expected y (Bi, N, E) like image (Bi, N, Di)");
    expect(s.images > 0 ? s.batch % s.images == 0 : s.batch == 0, "expected a multiple of the images as batch");
    expect(heads > 0 && s.inner % heads == 0 && s.dim % heads == 0, "expected num_heads that divides E and Di");
    for (const Tensor* t : {&mean, &rstd})
      expect(t->numel() == s.images * s.tokens && t->scalar_type() == wide(dtype), "expected mean and rstd (Bi, N)");

    const std::vector<int64_t> expected = param_sizes();
    expect(params_.size() == expected.size(), "expected 22 params, got " + std::to_string(params_.size()));
    for (size_t i = 0; i < expected.size(); ++i) {
      params.push_back(dense(params_[i]));
      expect(params[i].numel() == expected[i] && params[i].scalar_type() == dtype,
             "params[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) +
                 " numbers of the dtype of query");
    }
    if (!lengths) return;
    expect(lengths->scalar_type() == ScalarType::Long && lengths->numel() == s.batch,
           "text_lengths: expected int64 (B,)");
    sizes.text_lengths = static_cast<const int64_t*>(lengths->const_data_ptr());
    for (int64_t b = 0; b < s.batch; ++b)
      expect(sizes.text_lengths[b] >= 0 && sizes.text_lengths[b] <= s.text, "text_lengths: expected lengths in [0, " +
                                                                                std::to_string(s.text) + "], got " +
                                                                                std::to_string(sizes.text_lengths[b]));
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
  Tensor out = empty({s.batch, s.queries, s.model}, dtype);
  Tensor weights = empty({return_weights ? s.batch : 0, s.queries, s.tokens}, fp);
  Tensor hidden = empty({kept * (s.queries + s.text), s.inner}, fp), told = empty({kept, s.queries, s.inner}, fp);
  Tensor pooled = empty({kept, s.queries, s.heads, s.dim}, fp), seen = empty({kept, s.queries, s.dim}, fp);
  Tensor softmax = empty({kept, s.queries, s.heads, 2}, fp);

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
  expect(hidden.numel() == s.batch * (s.queries + s.text) * s.inner && told.numel() == s.rows() * s.inner &&
             pooled.numel() == s.rows() * s.heads * s.dim && seen.numel() == s.rows() * s.dim &&
             softmax.numel() == s.rows() * s.heads * 2,
         "expected what forward saved with save=True");

  Tensor dquery = empty({s.batch, s.queries, s.model}, dtype), dtext = empty({s.batch, s.text, s.model}, dtype);
  Tensor dimage = empty({need_image ? s.images : 0, s.tokens, s.dim}, dtype);
  Tensor dy = empty({need_y ? s.images : 0, s.tokens, s.inner}, dtype);
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
    dparams.push_back(empty(shape, dtype));
    args.params[i] = data(in.params[i]);
    args.dparams[i] = need_params ? data(dparams[i]) : nullptr;
  }
  cpu::embedded_query_backward(args);
  return {dquery, dtext, dimage, dy, dparams};
}

// ---- sparse_prefill ----

void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

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
  if (like.dim() == 3) return empty({like.size(0), like.size(1), like.size(2)}, like.scalar_type());
  return torch::stable::transpose(empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type()),
                                  1, 2);
}

// One side's index, kept alive for the call.
struct PrefillIndex {
  std::optional<Tensor> indices, cu_seqlens, positions;
  cpu::TokenRows rows{nullptr, nullptr, nullptr, 0};

  PrefillIndex(const std::optional<Tensor>& indices_, const std::optional<Tensor>& cu_seqlens_,
               const std::optional<Tensor>& positions_)
      : indices(dense(indices_)), cu_seqlens(dense(cu_seqlens_)), positions(dense(positions_)) {
    require(indices.has_value() == cu_seqlens.has_value(), "sparse_prefill: indices and cu_seqlens go together");
    for (const auto* t : {&indices, &cu_seqlens, &positions})
      require(!*t || ((*t)->dim() == 1 && (*t)->scalar_type() == ScalarType::Int),
              "sparse_prefill: expected int32 index tensors of one dimension");
    if (!indices) return;
    require(cu_seqlens->size(0) >= 1, "sparse_prefill: expected cu_seqlens with at least one entry");
    require(!positions || positions->size(0) == indices->size(0), "sparse_prefill: expected positions as indices");
    rows = {static_cast<const int32_t*>(data(indices)), static_cast<const int32_t*>(data(cu_seqlens)),
            static_cast<const int32_t*>(data(positions)), indices->size(0)};
  }
  int64_t sequences(int64_t otherwise) const { return cu_seqlens ? cu_seqlens->size(0) - 1 : otherwise; }
};

cpu::AttentionShape attention_shape(const Tensor& q, const Tensor& k, const Tensor& v, const PrefillIndex& q_index,
                                    const PrefillIndex& k_index, bool causal, double scale) {
  const bool packed = q.dim() == 3;
  require((packed || q.dim() == 4) && k.dim() == q.dim() && v.dim() == q.dim(),
          "sparse_prefill: expected q, k and v of four dimensions, or of three when packed");
  const int64_t rows = packed ? 0 : 2;
  bool fits = q.size(-1) == k.size(-1) && (packed || q.size(0) == k.size(0));
  for (int64_t i = 0; i < k.dim(); ++i) fits = fits && k.size(i) == v.size(i);
  require(fits, "sparse_prefill: q, k and v do not fit each other");
  require(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, "sparse_prefill: key heads must divide heads");
  const int64_t sequences = packed ? q_index.sequences(k_index.sequences(1)) : q.size(0);
  require(
      q_index.sequences(packed ? 1 : sequences) == sequences && k_index.sequences(packed ? 1 : sequences) == sequences,
      "sparse_prefill: the indices do not have the sequences of q and k");
  cpu::AttentionShape shape{};
  shape.dtype = dtype_of(q, "sparse_prefill");
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
          "sparse_prefill: expected q, k and v of one dtype");
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
            statistics);
  Tensor importance = empty(!importance_rows ? std::vector<int64_t>{0}
                            : packed         ? std::vector<int64_t>{k.size(0)}
                                             : std::vector<int64_t>{k.size(0), k.size(2)},
                            statistics);
  const std::optional<Tensor> listed = dense(importance_rows);
  if (listed) {
    require(listed->scalar_type() == ScalarType::Long && (listed->dim() == 1 || (listed->dim() == 2 && !packed)),
            "sparse_prefill: expected int64 importance_rows (R,) or (B, R)");
    require(listed->dim() == 1 || listed->size(0) == q.size(0), "sparse_prefill: expected importance_rows (B, R)");
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
  require(fits, "sparse_prefill_backward: dout, dlse, out and lse do not fit q");
  require(dout.scalar_type() == q.scalar_type() && out.scalar_type() == q.scalar_type() &&
              lse.scalar_type() == wide(q.scalar_type()) && (!dlse || dlse->scalar_type() == lse.scalar_type()),
          "sparse_prefill_backward: expected dout and out in the dtype of q, lse and dlse in fp32");

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
  m.impl("spatial_pool", TORCH_BOX(&spatial_pool));
  m.impl("spatial_pool_backward", TORCH_BOX(&spatial_pool_backward));
  m.impl("image_state", TORCH_BOX(&image_state));
  m.impl("embedded_query", TORCH_BOX(&embedded_query));
  m.impl("embedded_query_backward", TORCH_BOX(&embedded_query_backward));
  m.impl("sparse_prefill", TORCH_BOX(&sparse_prefill));
  m.impl("sparse_prefill_backward", TORCH_BOX(&sparse_prefill_backward));
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and test switches; the ops themselves are under torch.ops.flashsloth.";
  m.def("cpu_isa", [] { return cpu::isa_name(cpu::isa()); }, "Instruction set the CPU kernels run with.");
  m.def(
      "set_cpu_isa",
      [](const std::string& name) {
        for (cpu::Isa isa : {cpu::Isa::baseline, cpu::Isa::avx2, cpu::Isa::avx512}) {
          if (name != cpu::isa_name(isa)) continue;
          if (!cpu::set_isa(isa)) throw std::invalid_argument("isa: this processor has no " + name);
          return;
        }
        throw std::invalid_argument("isa: expected baseline, avx2 or avx512, got " + name);
      },
      "Use a lesser instruction set than the processor has.");
  m.def("set_scratch_poison", &cpu::set_scratch_poison, "Fill scratch memory with NaN before each use.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = FLASHSLOTH_COMPILER;
    info["torch"] = FLASHSLOTH_TORCH_VERSION;
    info["torch_target_version"] = "2.10";
    info["cuda"] = false;
    return info;
  });
}
