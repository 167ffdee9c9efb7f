// Embedded-query attention: from the averaged image to the result. The value projection of each head, then the
// up-projection and the residual.
#pragma once

#include "embedded_query_parts.cuh"
#include "skinny_gemm.cuh"

namespace flashsloth::cuda::query {

template <class T>
using OutputGemm = SkinnyGemm<T, 2>;

// Block (x, y, z): head x, columns from 16 y of it, query rows from 16 z. Weights of a row sum to one, so the bias of
// the values is added once.
template <class T>
__global__ void __launch_bounds__(OutputGemm<T>::kThreads)
    embedded_query_values_kernel(const __grid_constant__ QueryParams<T> p) {
  using Gemm = OutputGemm<T>;
  grid_dependency_launch();
  const int head = blockIdx.x, first_column = blockIdx.y * Gemm::kColumns, first_row = blockIdx.z * Gemm::kRows;
  const int d = p.value_dim();
  typename Gemm::Warp product(
      weight_rows(p.params[kImageV] + static_cast<int64_t>(head) * d * p.dim, first_column, d, p.dim), p.dim,
      threadIdx.x / 32, Gemm::kWarps);
  product.prefetch();
  grid_dependency_wait();
  float acc[Gemm::kColumns / 8][4] = {};
  product.multiply(acc, [&](int m) {
    return p.pooled_rows + (static_cast<int64_t>(min(first_row + m, p.rows() - 1)) * p.heads + head) * p.dim;
  });
  const float2 sum = Gemm::add(acc, reinterpret_cast<float*>(dynamic_shared()));
  const int row = first_row + Gemm::row();
  if (!Gemm::has_pair() || row >= p.rows()) return;
  const float pair[2] = {sum.x, sum.y};
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // a head may begin at an odd column
    const int c = first_column + Gemm::column() + i;
    if (c >= d) continue;
    const float seen = pair[i] + static_cast<float>(p.params[kImageVBias][head * d + c]);
    const int64_t at = static_cast<int64_t>(row) * p.dim + head * d + c;
    p.seen_rows[at] = static_cast<T>(seen);
    if (p.seen != nullptr) p.seen[at] = seen;
  }
}

// Block (x, y): columns from 16 x of query rows from 16 y.
template <class T>
__global__ void __launch_bounds__(OutputGemm<T>::kThreads)
    embedded_query_up_kernel(const __grid_constant__ QueryParams<T> p) {
  using Gemm = OutputGemm<T>;
  grid_dependency_launch();
  const int first_column = blockIdx.x * Gemm::kColumns, first_row = blockIdx.y * Gemm::kRows;
  typename Gemm::Warp product(weight_rows(p.params[kUp], first_column, p.model, p.dim), p.dim, threadIdx.x / 32,
                              Gemm::kWarps);
  product.prefetch();
  grid_dependency_wait();
  float acc[Gemm::kColumns / 8][4] = {};
  product.multiply(acc,
                   [&](int m) { return p.seen_rows + static_cast<int64_t>(min(first_row + m, p.rows() - 1)) * p.dim; });
  const float2 sum = Gemm::add(acc, reinterpret_cast<float*>(dynamic_shared()));
  const int row = first_row + Gemm::row(), column = first_column + Gemm::column();
  if (!Gemm::has_pair() || row >= p.rows() || column >= p.model) return;
  const int64_t at = static_cast<int64_t>(row) * p.model + column;
  const float2 query = load_pair(p.query + at), bias = load_pair(p.params[kUpBias] + column);
  store_pair(p.out + at, {query.x + sum.x + bias.x, query.y + sum.y + bias.y});
}

}  // namespace flashsloth::cuda::query
