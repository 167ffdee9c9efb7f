// Embedded-query attention, forward: raw-pointer interface of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../dtype.h"

namespace flashsloth::cuda {

// Every pointer is of the device, 16-byte aligned, and every tensor contiguous; dtypes are bfloat16 or float16. Dm, E
// and Di are multiples of 8. Everything throws std::runtime_error naming the limit that a call is beyond.

// What depends on the image alone: y = image weight' + bias, rounded to its type, and each row's layer-norm statistics.
struct ImageState {
  DType dtype;                        // of image, weight, bias, y
  int64_t rows, dim, inner;           // all tokens; sizes Di and E
  const void *image, *weight, *bias;  // (rows, Di), (E, Di), (E)
  double eps;
  void* y;             // (rows, E)
  float *mean, *rstd;  // (rows)
};

int64_t image_state_scratch(const ImageState& args);  // bytes
void image_state(const ImageState& args, void* scratch, cudaStream_t stream);

// Weights, in the order of EmbeddedQueryParams in flashsloth_ops/embedded_query.py without down_image.
enum EmbeddedQueryParam {
  kDown,
  kDownBias,  // (E, Dm)
  kNormQuery,
  kNormQueryBias,
  kNormText,
  kNormTextBias,
  kNormImage,
  kNormImageBias,  // (E)
  kTextQ,
  kTextQBias,
  kTextK,
  kTextKBias,
  kTextV,
  kTextVBias,  // text to query: (E, E)
  kImageQ,
  kImageQBias,
  kImageK,
  kImageKBias,  // image to query: (E, E)
  kImageV,
  kImageVBias,  // (Di, Di)
  kUp,
  kUpBias,  // (Dm, Di)
  kEmbeddedQueryParams
};

struct EmbeddedQueryForward {
  DType dtype;                          // of every tensor but statistics and what is saved
  int64_t batch, queries, text, model;  // B, Q, T, Dm
  int64_t images, tokens, dim, inner;   // Bi, which divides B: question b reads image b / (B / Bi); N, Di, E
  int64_t heads;                        // h, divides E and Di
  double eps;
  const int64_t* text_lengths;                // (B), taken as within [0, T]; or null: all T
  const void *query, *text_rows, *image, *y;  // (B, Q, Dm), (B, T, Dm), (Bi, N, Di), (Bi, N, E)
  const float* rstd;                          // (Bi, N)
  const void* params[kEmbeddedQueryParams];
  void* out;       // (B, Q, Dm)
  float* weights;  // (B, Q, N): attention averaged over heads; or null

  // What backward needs, all null or none. `hidden` holds the down-projected rows: the B*Q query rows, the text rows
  // that are no padding, then zeros.
  float *hidden, *told;  // (B*(Q+T), E), (B, Q, E)
  float *pooled, *seen;  // (B, Q, h, Di), (B, Q, Di)
  float* softmax;        // (B, Q, h, 2): the largest score of a row, and the sum of exp(score - largest)
};

int64_t embedded_query_scratch(const EmbeddedQueryForward& args);  // bytes
void embedded_query_forward(const EmbeddedQueryForward& args, void* scratch, cudaStream_t stream);

}  // namespace flashsloth::cuda
