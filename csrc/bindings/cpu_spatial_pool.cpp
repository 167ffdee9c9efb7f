// Spatial attention pooling on the CPU: tensors to cpu/spatial_pool.h.
#include <tuple>

#include "bindings/tensor.h"
#include "cpu/spatial_pool.h"

namespace flashsloth {
namespace {

const Expect expect{"spatial_pool"};

int64_t scalar(const std::optional<Tensor>& t) {
  return t ? *static_cast<const int64_t*>(dense(*t).const_data_ptr()) : 0;
}

void expect_pool_inputs(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, bool packed) {
  expect(x.dim() == (packed ? 2 : 3), "x: expected (B, N, D), or (T, D) with grids");
  expect(w1.dim() == 2 && w1.size(1) == x.size(x.dim() - 1), "w1: expected (Dh, D) with the D of x");
  expect(b1.numel() == w1.size(0) && w2.numel() == w1.size(0), "b1, w2: expected Dh elements");
  for (const Tensor& t : {w1, b1, w2})
    expect(t.scalar_type() == x.scalar_type(), "w1, b1, w2: expected the dtype of x");
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
    expect(!packed || (packed->scalar_type() == ScalarType::Long && packed->dim() == 2 && packed->size(1) == 2),
           "grids: expected an int64 tensor (images, 2)");
    grids.sizes = packed ? static_cast<const int64_t*>(packed->const_data_ptr()) : one;
    grids.uniform = !packed;
    grids.images = packed ? packed->size(0) : x.size(0);
    grids.window_height = ph;
    grids.window_width = pw;
    for (int64_t i = 0; i < grids.images; ++i) {
      expect(grids.height(i) >= 0 && grids.width(i) >= 0 && ph >= 1 && pw >= 1,
             "grids: expected sides of 0 or more and windows of 1 or more");
      tokens += grids.height(i) * grids.width(i);
      windows += grids.window_rows(i) * grids.window_columns(i);
    }
    const int64_t rows = packed ? x.size(0) : x.size(0) * x.size(1);
    expect(tokens == rows, "grids: expected ", rows, " tokens in all as x has, got ", tokens);
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
  expect(geometry.windows == num_windows * (grids ? 1 : x.size(0)), "num_windows: expected ", geometry.windows,
         " in all for these grids, got ", num_windows);
  expect(b2.numel() == 1 && b2.scalar_type() == x.scalar_type(), "b2: expected one element as x");
  expect(dropout_p == 0 || (seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
         "seed: expected one int64 with dropout");

  Tensor y = empty(grids ? std::vector<int64_t>{num_windows, dim} : std::vector<int64_t>{x.size(0), num_windows, dim},
                   x.scalar_type(), x);
  Tensor weights = empty(grids ? std::vector<int64_t>{tokens} : std::vector<int64_t>{x.size(0), x.size(1)},
                         wide(x.scalar_type()), x);
  Tensor mask = empty({save_mask ? tokens : 0, (hidden + 31) / 32}, ScalarType::Int, x);

  cpu::spatial_pool_forward({dtype_of(x, expect), tokens, dim, hidden, geometry.grids, data(x), data(w1), data(b1),
                             data(w2), data(b2), dropout_p, scalar(seed), data(y), data(weights),
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
  expect(dy.numel() == geometry.windows * dim && dy.scalar_type() == x.scalar_type(),
         "dy: expected (windows, D) in the dtype of x");
  expect(weights.numel() == tokens && weights.scalar_type() == wide(x.scalar_type()) &&
             (!dweights || (dweights->numel() == tokens && dweights->scalar_type() == weights.scalar_type())),
         "weights, dweights: expected one fp32 number a token");
  expect(mask.numel() == tokens * ((hidden + 31) / 32) && mask.scalar_type() == ScalarType::Int,
         "mask: expected what forward saves, int32 (tokens, ceil(Dh / 32))");

  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> dx_sizes(x.sizes().begin(), x.sizes().end());
  if (!need_dx) dx_sizes[0] = 0;
  Tensor dx = empty(dx_sizes, dtype, x);
  Tensor dw1 = empty({need_dw ? hidden : 0, dim}, dtype, x), db1 = empty({need_dw ? hidden : 0}, dtype, x);
  Tensor dw2 = empty({need_dw ? hidden : 0}, dtype, x);
  cpu::spatial_pool_backward(
      {dtype_of(x, expect), tokens, dim, hidden, geometry.grids, data(x), data(w1), data(b1), data(w2), data(weights),
       data(dy), data(dweights), static_cast<const uint32_t*>(data(mask)), dropout_p, need_dx ? data(dx) : nullptr,
       need_dw ? data(dw1) : nullptr, need_dw ? data(db1) : nullptr, need_dw ? data(dw2) : nullptr});
  return {dx, dw1, db1, dw2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, CPU, m) {
  m.impl("spatial_pool", TORCH_BOX(&spatial_pool));
  m.impl("spatial_pool_backward", TORCH_BOX(&spatial_pool_backward));
}

}  // namespace flashsloth
