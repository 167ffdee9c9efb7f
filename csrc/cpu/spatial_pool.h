// Spatial attention pooling: raw-pointer interface of the CPU kernels.
#pragma once

#include <cstdint>

#include "types.h"

namespace flashsloth::cpu {

// Token grids of a batch. Images lie end to end: image i has heights[i] x widths[i] tokens, row-major, and its
// windows are row-major too, smaller at the right and bottom edge where a side does not divide.
struct Grids {
  const int64_t* sizes;  // (height, width) of each image; with `uniform`, of every image
  bool uniform;
  int64_t images, window_height, window_width;

  int64_t height(int64_t image) const { return sizes[uniform ? 0 : 2 * image]; }
  int64_t width(int64_t image) const { return sizes[uniform ? 1 : 2 * image + 1]; }
  int64_t window_rows(int64_t image) const { return (height(image) + window_height - 1) / window_height; }
  int64_t window_columns(int64_t image) const { return (width(image) + window_width - 1) / window_width; }
};

// s_n = w2 . relu(w1 x_n + b1) + b2, a = softmax of s in a window, y = sum_n a_n x_n.
struct SpatialPoolForward {
  DType dtype;                  // of x, w1, b1, w2, b2, y
  int64_t tokens, dim, hidden;  // in all images together; sizes D and Dh
  Grids grids;
  const void *x, *w1, *b1, *w2, *b2;  // (tokens, D), (Dh, D), (Dh), (Dh), (1), contiguous
  double dropout_p;                   // 0: no dropout, seed unused
  int64_t seed;
  void* y;         // (windows, D)
  void* weights;   // (tokens), fp32 (fp64 for float64)
  uint32_t* mask;  // (tokens, ceil(Dh / 32)) or null: bit j is [unit j active and kept]
};
void spatial_pool_forward(const SpatialPoolForward& args);

// Gradients from the weights and the one-bit mask alone; nothing of the forward pass is recomputed.
struct SpatialPoolBackward {
  DType dtype;
  int64_t tokens, dim, hidden;
  Grids grids;
  const void *x, *w1, *b1, *w2;
  const void *weights, *dy, *dweights;  // dweights as weights, or null
  const uint32_t* mask;
  double dropout_p;
  void* dx;               // or null when not wanted
  void *dw1, *db1, *dw2;  // all null when not wanted; db2 is zero, the softmax does not see b2
};
void spatial_pool_backward(const SpatialPoolBackward& args);

}  // namespace flashsloth::cpu
