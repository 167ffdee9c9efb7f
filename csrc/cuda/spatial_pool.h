// Spatial attention pooling, forward: raw-pointer interface of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace flashsloth::cuda {

// s_n = w2 . relu(w1 x_n + b1), a = softmax of s in a window, y = sum_n a_n x_n. Every pointer is of the device and
// every tensor contiguous. b2 is no argument: it shifts all scores of a window alike, which the softmax does not see.
struct SpatialPoolForward {
  DType dtype;                          // of x, w1, b1, w2, y: bfloat16 or float16
  int64_t images, tokens, windows;      // tokens and windows of all images together
  int64_t dim, hidden;                  // D and Dh
  int64_t height, width;                // tokens of every image, unless `grids`
  const int64_t* grids;                 // (images, 2): tokens of each image, laid end to end; or null
  int64_t window_height, window_width;  // in tokens
  const void *x, *w1, *b1, *w2;         // (tokens, D), (Dh, D), (Dh), (Dh)
  double dropout_p;                     // 0: no dropout, seed unused
  const int64_t* seed;                  // one number
  void* y;                              // (windows, D)
  float* weights;                       // (tokens)
  uint32_t* mask;                       // (tokens, ceil(Dh / 32)) or null: bit j is [unit j active and kept]
};

// Floats of scratch memory that the call takes on the current device.
int64_t spatial_pool_scratch(const SpatialPoolForward& args);

// Throws std::runtime_error naming the limit that the call is beyond.
void spatial_pool_forward(const SpatialPoolForward& args, float* scratch, cudaStream_t stream);

}  // namespace flashsloth::cuda
