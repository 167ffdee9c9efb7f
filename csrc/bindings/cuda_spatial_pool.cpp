// Spatial attention pooling on CUDA: tensors to cuda/spatial_pool.h.
#include <tuple>

#include "bindings/cuda.h"
#include "cuda/spatial_pool.h"

namespace flashsloth {
namespace {

const Expect expect{"spatial_pool"};

int64_t windows_along(int64_t side, int64_t window) { return (side + window - 1) / window; }

std::tuple<Tensor, Tensor, Tensor> spatial_pool(Tensor x_, Tensor w1_, Tensor b1_, Tensor w2_, Tensor b2_,
                                                std::optional<Tensor> grids_, int64_t height, int64_t width,
                                                int64_t num_windows, int64_t window_height, int64_t window_width,
                                                double dropout_p, std::optional<Tensor> seed, bool save_mask) {
  const Tensor x = dense(x_), w1 = dense(w1_), b1 = dense(b1_), w2 = dense(w2_);
  const std::optional<Tensor> grids = dense(grids_);
  const bool packed = grids.has_value();
  expect_one_device(expect, x, w1, b1, w2, b2_, grids, seed);
  expect(x.dim() == (packed ? 2 : 3), "x: expected (B, N, D), or (T, D) with grids");
  expect(w1.dim() == 2 && w1.size(1) == x.size(x.dim() - 1), "w1: expected (Dh, D) with the D of x");
  const int64_t dim = w1.size(1), hidden = w1.size(0), tokens = packed ? x.size(0) : x.size(0) * x.size(1);
  expect(b1.numel() == hidden && w2.numel() == hidden, "b1, w2: expected Dh elements");
  expect(b2_.numel() == 1, "b2: expected one element");
  for (const Tensor& t : {w1, b1, w2, b2_})
    expect(t.scalar_type() == x.scalar_type(), "w1, b1, w2, b2: expected the dtype of x");
  expect(window_height >= 1 && window_width >= 1, "window: expected sides of 1 or more");
  expect(dropout_p >= 0 && dropout_p < 1, "dropout_p: expected a probability in [0, 1)");
  expect(dropout_p == 0 || (seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long),
         "seed: expected one int64 with dropout");
  if (packed) {  // their values are on the device, and stay there
    expect(grids->scalar_type() == ScalarType::Long && grids->dim() == 2 && grids->size(1) == 2,
           "grids: expected an int64 tensor (images, 2)");
    expect(num_windows >= 0, "num_windows: expected 0 or more, got ", num_windows);
  } else {
    expect(height >= 0 && width >= 0 && height * width == x.size(1), "grid: expected ", x.size(1),
           " tokens as x has, got ", height * width);
    expect(num_windows == windows_along(height, window_height) * windows_along(width, window_width),
           "num_windows: expected as many as the grid has, got ", num_windows);
  }

  const int64_t images = packed ? grids->size(0) : x.size(0), windows = packed ? num_windows : images * num_windows;
  Tensor y = empty(packed ? std::vector<int64_t>{windows, dim} : std::vector<int64_t>{images, num_windows, dim},
                   x.scalar_type(), x);
  Tensor weights =
      empty(packed ? std::vector<int64_t>{tokens} : std::vector<int64_t>{images, x.size(1)}, ScalarType::Float, x);
  Tensor mask = empty({save_mask ? tokens : 0, (hidden + 31) / 32}, ScalarType::Int, x);

  const cuda::SpatialPoolForward args{dtype_of(x, expect),
                                      images,
                                      tokens,
                                      windows,
                                      dim,
                                      hidden,
                                      height,
                                      width,
                                      static_cast<const int64_t*>(data(grids)),
                                      window_height,
                                      window_width,
                                      data(x),
                                      data(w1),
                                      data(b1),
                                      data(w2),
                                      dropout_p,
                                      static_cast<const int64_t*>(data(seed)),
                                      data(y),
                                      static_cast<float*>(data(weights)),
                                      save_mask ? static_cast<uint32_t*>(data(mask)) : nullptr};
  const OnDeviceOf where(x);
  const Tensor scratch = empty({cuda::spatial_pool_scratch(args)}, ScalarType::Float, x);
  cuda::spatial_pool_forward(args, static_cast<float*>(data(scratch)), where.stream);
  return {y, weights, mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flashsloth, FLASHSLOTH_CUDA_KEY, m) { m.impl("spatial_pool.cuda", TORCH_BOX(&spatial_pool)); }

}  // namespace flashsloth
