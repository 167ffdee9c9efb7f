// Embedded-query attention: raw-pointer interface of the CPU kernels.
#pragma once

#include <cstdint>

#include "types.h"

namespace flashsloth::cpu {

// What depends on the image alone: y = image weight' + bias, rounded to its type, and each row's layer-norm statistics.
struct ImageState {
  DType dtype;                        // of image, weight, bias, y
  int64_t rows, dim, inner;           // all tokens; sizes Di and E
  const void *image, *weight, *bias;  // (rows, Di), (E, Di), (E), contiguous
  double eps;
  void *y, *mean, *rstd;  // (rows, E); (rows) in fp32 (fp64 for float64)
};
void image_state(const ImageState& args);

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

struct EmbeddedQuerySizes {
  DType dtype;                          // of every tensor but statistics and what forward saves
  int64_t batch, queries, text, model;  // B, Q, T, Dm
  int64_t images, tokens, dim, inner;   // Bi, which divides B: question b reads image b / (B / Bi); N, Di, E
  int64_t heads;                        // h, divides E and Di
  double eps;
  const int64_t* text_lengths;  // (B) within [0, T], or null: all T

  int64_t rows() const { return batch * queries; }
  int64_t image_rows() const { return images ? batch / images * queries : 0; }  // query rows reading one image
  int64_t head_dim() const { return inner / heads; }
  int64_t value_dim() const { return dim / heads; }
};

// Results in fp32 (fp64 for float64) that backward needs. `hidden` holds the down-projected rows: the B*Q query rows,
// the text rows that are no padding, then zeros.
struct EmbeddedQuerySaved {
  void *hidden, *told;  // (B*(Q+T), E), (B, Q, E)
  void *pooled, *seen;  // (B, Q, h, Di), (B, Q, Di)
  void* softmax;        // (B, Q, h, 2): the largest score of a row, and the sum of exp(score - largest)
};

struct EmbeddedQueryForward {
  EmbeddedQuerySizes sizes;
  const void *query, *text, *image, *y, *rstd;
  const void* params[kEmbeddedQueryParams];
  void* out;      // (B, Q, Dm)
  void* weights;  // (B, Q, N) in fp32 (fp64), or null
  bool save;
  EmbeddedQuerySaved saved;  // all null unless `save`
};
void embedded_query_forward(const EmbeddedQueryForward& args);

struct EmbeddedQueryBackward {
  EmbeddedQuerySizes sizes;
  const void *dout, *query, *text, *image, *y, *mean, *rstd;
  const void* params[kEmbeddedQueryParams];
  EmbeddedQuerySaved saved;
  void *dquery, *dtext;
  void *dimage, *dy;                    // each null when not wanted
  void* dparams[kEmbeddedQueryParams];  // all null when not wanted
};
void embedded_query_backward(const EmbeddedQueryBackward& args);

}  // namespace flashsloth::cpu
