// Embedded-query attention: what its kernels share. Their parameters, which text rows are no padding, and statistics of
// rows from parts of 32 columns.
#pragma once

#include "embedded_query.h"
#include "instructions.cuh"

namespace flashsloth::cuda::query {

constexpr float kLog2E = 1.44269504f;
constexpr int kPartColumns = 32;  // of statistics
constexpr int kKeyTile = 64;      // image tokens that share a largest score
constexpr int kMaxHeadDim = 128;  // E / h

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// Parameters of the kernels; see embedded_query.h. A row of `probs`, `pooled` and `softmax` is (question, query, head).
template <class T>
struct QueryParams {
  int batch, queries, text, model, images, tokens, dim, inner, heads;
  float eps;
  const int64_t* text_lengths;
  const T *query, *text_rows, *image, *y;
  const float* rstd;
  const T* params[kEmbeddedQueryParams];
  T* out;
  float *weights, *hidden, *told, *pooled, *seen;  // each may be null
  float2* softmax;

  // Between kernels. What is the operand of a product is in its type, once.
  T* hidden_rows;  // (B*(Q+T), E), as hidden
  float2* parts;   // (parts, B*(Q+T)): mean and sum of squared differences from it, of 32 columns of hidden_rows
  T* told_rows;    // (B*Q, E)
  T* asked;        // (B*Q*h, E)
  T* probs;        // (B*Q*h, 64 tiles): exp(score - the tile's largest), zeros past the last token
  float2* peaks;   // (B*Q*h, tiles): a tile's largest score, and the sum of exp(score - largest)
  T* pooled_rows;  // (B*Q*h, Di)
  T* seen_rows;    // (B*Q, Di)

  __host__ __device__ int rows() const { return batch * queries; }
  __host__ __device__ int all_rows() const { return batch * (queries + text); }
  __host__ __device__ int head_dim() const { return inner / heads; }
  __host__ __device__ int value_dim() const { return dim / heads; }
  __host__ __device__ int image_rows() const { return rows() / images * heads; }  // rows that read one image
  __host__ __device__ int tiles() const { return divide_up(tokens, kKeyTile); }
};

// ---- Text rows ----

// A length on the device is not checked on the host: outside [0, T] it counts as the nearest within.
template <class T>
__device__ inline int text_length(const QueryParams<T>& p, int question) {
  if (p.text_lengths == nullptr) return p.text;
  const int64_t length = p.text_lengths[question];
  return length < 0 ? 0 : length > p.text ? p.text : static_cast<int>(length);
}

// The row of hidden where the text of a question begins.
template <class T>
__device__ inline int first_text_row(const QueryParams<T>& p, int question) {
  int row = p.rows();
  for (int b = 0; b < question; ++b) row += text_length(p, b);  // batches are small
  return row;
}

// What row `row` of hidden is projected from; null past the last text row.
template <class T>
__device__ inline const T* source_row(const QueryParams<T>& p, int row) {
  if (row < p.rows()) return p.query + static_cast<int64_t>(row) * p.model;
  row -= p.rows();
  for (int b = 0; b < p.batch; ++b) {
    const int length = text_length(p, b);
    if (row < length) return p.text_rows + (static_cast<int64_t>(b) * p.text + row) * p.model;
    row -= length;
  }
  return nullptr;
}

// ---- Statistics ----

// Mean of the numbers of a part, and the sum of their squared differences from it. `Width` lanes hold them, `Count`
// each; whole(i): whether number i is there.
template <int Width, int Count, class Whole>
__device__ inline float2 part_statistics(const float (&v)[Count], int size, Whole whole) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < Count; ++i) sum += whole(i) ? v[i] : 0.0f;
  const float mean = warp_sum<Width>(sum) / static_cast<float>(size);
#pragma unroll
  for (int i = 0; i < Count; ++i) squares += whole(i) ? (v[i] - mean) * (v[i] - mean) : 0.0f;
  return {mean, warp_sum<Width>(squares)};
}

// Mean and reciprocal deviation of a row of `inner` numbers from those of its parts, part_at(i). Lanes i
// and i + 16 share a row and both get them.
template <class Part>
__device__ inline float2 row_statistics(Part part_at, int inner, float eps) {
  const int count = divide_up(inner, kPartColumns);
  const auto size = [&](int part) { return static_cast<float>(min(kPartColumns, inner - part * kPartColumns)); };
  const auto both = [](float x) { return x + __shfl_xor_sync(kFullWarp, x, 16); };
  const int first = threadIdx.x % 32 / 16;
  float mean = 0.0f, squares = 0.0f;
#pragma unroll 5
  for (int part = first; part < count; part += 2) mean += part_at(part).x * size(part);
  mean = both(mean) / static_cast<float>(inner);
#pragma unroll 5
  for (int part = first; part < count; part += 2) {
    const float2 own = part_at(part);
    squares += own.y + size(part) * (own.x - mean) * (own.x - mean);
  }
  return {mean, rsqrtf(both(squares) / static_cast<float>(inner) + eps)};
}

// ---- Weights ----

// Row n of a product's weights, from row `first` of `rows`; past the last one any, which the product's user ignores.
template <class T>
__device__ inline auto weight_rows(const T* weight, int first, int rows, int size) {
  return [=](int n) { return weight + static_cast<int64_t>(min(first + n, rows - 1)) * size; };
}

// ---- Pairs and eights ----

template <class T>
__device__ inline float2 load_pair(const T* pair) {
  return unpack2<T>(*reinterpret_cast<const uint32_t*>(pair));
}

template <class T>
__device__ inline void store_pair(T* pair, float2 v) {
  *reinterpret_cast<uint32_t*>(pair) = pack2<T>(v.x, v.y);
}

template <class T>
__device__ inline void unpack8(uint4 packed, float (&x)[8]) {
  const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<T>(pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

}  // namespace flashsloth::cuda::query
