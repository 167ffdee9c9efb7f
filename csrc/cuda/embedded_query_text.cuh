// Embedded-query attention: the queries read the question, and what they then ask of the image.
#pragma once

#include "embedded_query_parts.cuh"
#include "skinny_gemm.cuh"

namespace flashsloth::cuda::query {

// ---- The queries read the question ----

// A block has a head of a question and up to 16 of its queries. Its warps share products along k: two take the keys and
// values of each of four tiles of 16 text rows, four the query rows. So a question of 64 rows is one round; longer ones
// take several, with a running maximum.
struct TextTile {
  static constexpr int kQueries = 16, kRows = 64, kTiles = kRows / 16;
  static constexpr int kParts = 2, kQueryParts = 4, kTextWarps = kTiles * kParts;
  static constexpr int kThreads = 32 * (kTextWarps + kQueryParts);
  static constexpr int kColumns = 24;                                                           // of a head at once
  static constexpr int kTextFloats = kRows * 2 * kColumns, kQueryFloats = kQueries * kColumns;  // of a part
  __host__ __device__ static constexpr int stride(int head_dim) { return head_dim | 1; }        // odd: all banks
  __host__ __device__ static constexpr int shared_bytes(int head_dim) {
    return 4 * (kParts * kTextFloats + kQueryParts * kQueryFloats + (kQueries + 2 * kRows) * stride(head_dim));
  }
};

namespace detail {

// The layer norm of two rows, of eight numbers from column k each.
template <class T>
__device__ inline void normalise(uint4 (&rows)[2], const float2 (&statistics)[2], const T* gain, const T* bias, int k) {
  const uint4 g = *reinterpret_cast<const uint4*>(gain + k), b = *reinterpret_cast<const uint4*>(bias + k);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float rstd = statistics[i].y, shift = -statistics[i].x * rstd;
    const auto apply = [&](uint32_t x_, uint32_t g_, uint32_t b_) {
      const float2 x = unpack2<T>(x_), scale = unpack2<T>(g_), offset = unpack2<T>(b_);
      return pack2<T>((x.x * rstd + shift) * scale.x + offset.x, (x.y * rstd + shift) * scale.y + offset.y);
    };
    rows[i] = {apply(rows[i].x, g.x, b.x), apply(rows[i].y, g.y, b.y), apply(rows[i].z, g.z, b.z),
               apply(rows[i].w, g.w, b.w)};
  }
}

// A warp's part of the product of 16 normalised rows of hidden with weights, to (16, 8 NTiles) numbers.
template <int NTiles, class T, class BRow, class HiddenRow>
__device__ inline void project_normalised(const QueryParams<T>& p, BRow b_row, int part, int parts,
                                          HiddenRow hidden_row, const T* gain, const T* bias, float* to) {
  SkinnyWarp<T, NTiles, 2> product(b_row, p.inner, part, parts);
  product.prefetch();
  grid_dependency_wait();
  const int lane = threadIdx.x % 32;
  const float2* const of_row = p.parts + hidden_row(lane % 16);
  const float2 own =
      row_statistics([&](int i) { return of_row[static_cast<int64_t>(i) * p.all_rows()]; }, p.inner, p.eps);
  const auto statistics_of = [&](int row) -> float2 {
    return {__shfl_sync(kFullWarp, own.x, row), __shfl_sync(kFullWarp, own.y, row)};
  };
  const float2 statistics[2] = {statistics_of(lane / 4), statistics_of(lane / 4 + 8)};
  float acc[NTiles][4] = {};
  product.multiply(
      acc, [&](int m) { return p.hidden_rows + static_cast<int64_t>(hidden_row(m)) * p.inner; },
      [&](uint4(&a)[2], int k) { normalise(a, statistics, gain, bias, k); });
  product.store(acc, to, product.kColumns);
}

// One query row of a warp in its attention to text rows.
struct TextRow {
  float peak = -INFINITY, total = 0.0f, sums[kMaxHeadDim / 32] = {};

  // Reads `count` more text rows, to 64, whose keys and values lie `stride` apart. Scores in base 2.
  __device__ void read(const float* q, const float* k, const float* v, int stride, int head_dim, int count,
                       float scale) {
    const int lane = threadIdx.x % 32;
    float score[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane + 32 * i;
      score[i] = 0.0f;
      for (int c = 0; row < count && c < head_dim; ++c) score[i] += q[c] * k[row * stride + c];
      score[i] = row < count ? score[i] * scale : -INFINITY;
    }
    const float higher = fmaxf(peak, warp_max(fmaxf(score[0], score[1])));
    const float factor = exp2_approx(peak - higher);
    const float p[2] = {exp2_approx(score[0] - higher), exp2_approx(score[1] - higher)};
    peak = higher;
    total = total * factor + warp_sum(p[0] + p[1]);
#pragma unroll
    for (float& sum : sums) sum *= factor;
    for (int row = 0; row < count; ++row) {
      const float weight = __shfl_sync(kFullWarp, row < 32 ? p[0] : p[1], row % 32);
#pragma unroll
      for (int i = 0; i < kMaxHeadDim / 32; ++i)
        if (lane + 32 * i < head_dim) sums[i] += weight * v[row * stride + lane + 32 * i];
    }
  }
};

}  // namespace detail

// Block (x, y, z): head x of question y, queries from 16 z.
template <class T>
__global__ void __launch_bounds__(TextTile::kThreads)
    embedded_query_text_kernel(const __grid_constant__ QueryParams<T> p) {
  using Tile = TextTile;
  grid_dependency_launch();
  const int head = blockIdx.x, question = blockIdx.y, first_query = blockIdx.z * Tile::kQueries;
  const int warp = threadIdx.x / 32, d = p.head_dim(), stride = Tile::stride(d), length = text_length(p, question);
  const int queries = min(Tile::kQueries, p.queries - first_query);
  const int query_row = question * p.queries + first_query, text_row = first_text_row(p, question);
  float* const text_parts = reinterpret_cast<float*>(dynamic_shared());
  float* const query_parts = text_parts + Tile::kParts * Tile::kTextFloats;
  float* const q = query_parts + Tile::kQueryParts * Tile::kQueryFloats;
  float* const k = q + Tile::kQueries * stride;
  float* const v = k + Tile::kRows * stride;
  const auto head_rows = [&](EmbeddedQueryParam weight, int column) {
    return weight_rows(p.params[weight] + static_cast<int64_t>(head) * d * p.inner, column, d, p.inner);
  };

  detail::TextRow reader[2];  // a warp has query rows `warp` and `warp` + 12
  constexpr int kWarps = Tile::kThreads / 32;
  int first = 0;  // text row of the round
  do {
    const int count = min(Tile::kRows, length - first);
    for (int column = 0; column < d; column += Tile::kColumns) {
      const int tile = warp / Tile::kParts, part = warp % Tile::kParts;
      if (warp >= Tile::kTextWarps) {
        if (first == 0)
          detail::project_normalised<Tile::kColumns / 8>(
              p, head_rows(kTextQ, column), warp - Tile::kTextWarps, Tile::kQueryParts,
              [&](int m) { return query_row + min(m, queries - 1); }, p.params[kNormQuery], p.params[kNormQueryBias],
              query_parts + (warp - Tile::kTextWarps) * Tile::kQueryFloats);
      } else if (16 * tile < count) {
        const auto keys = head_rows(kTextK, column), values = head_rows(kTextV, column);
        detail::project_normalised<2 * Tile::kColumns / 8>(
            p, [&](int n) { return n < Tile::kColumns ? keys(n) : values(n - Tile::kColumns); }, part, Tile::kParts,
            [&](int m) { return text_row + first + min(16 * tile + m, count - 1); }, p.params[kNormText],
            p.params[kNormTextBias], text_parts + part * Tile::kTextFloats + tile * 16 * 2 * Tile::kColumns);
      }
      __syncthreads();
      // The bias of the keys shifts all scores of a row alike, and the softmax does not see it.
      for (int i = threadIdx.x; first == 0 && i < Tile::kQueryFloats; i += Tile::kThreads) {
        const int c = column + i % Tile::kColumns;
        if (c >= d) continue;
        float sum = static_cast<float>(p.params[kTextQBias][head * d + c]);
#pragma unroll
        for (int part = 0; part < Tile::kQueryParts; ++part) sum += query_parts[part * Tile::kQueryFloats + i];
        q[i / Tile::kColumns * stride + c] = sum;
      }
      for (int i = threadIdx.x; i < max(count, 0) * 2 * Tile::kColumns; i += Tile::kThreads) {
        const int row = i / (2 * Tile::kColumns), c = column + i % Tile::kColumns;
        if (c >= d) continue;
        const float sum = text_parts[i] + text_parts[Tile::kTextFloats + i];
        if (i % (2 * Tile::kColumns) < Tile::kColumns) {
          k[row * stride + c] = sum;
        } else {
          v[row * stride + c] = sum + static_cast<float>(p.params[kTextVBias][head * d + c]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (warp + kWarps * i < queries && count > 0)
        reader[i].read(q + (warp + kWarps * i) * stride, k, v, stride, d, count,
                       kLog2E * rsqrtf(static_cast<float>(d)));
    first += Tile::kRows;
    __syncthreads();  // the next round writes keys and values
  } while (first < length);

  grid_dependency_wait();  // warps that had no product have not
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = warp + kWarps * i;
    if (query >= queries) continue;
    const float share = length > 0 ? 1.0f / reader[i].total : 0.0f;  // without text: zeros
#pragma unroll
    for (int j = 0; j < kMaxHeadDim / 32; ++j) {
      const int c = threadIdx.x % 32 + 32 * j;
      if (c >= d) continue;
      const int64_t at = static_cast<int64_t>(query_row + query) * p.inner + head * d + c;
      const float told = reader[i].sums[j] * share;
      p.told_rows[at] = static_cast<T>(told);
      if (p.told != nullptr) p.told[at] = told;
    }
  }
}

// ---- What they ask of the image ----

template <class T>
struct AskedTile {
  using Gemm = SkinnyGemm<T, 3>;
  static constexpr int kThreads = Gemm::kThreads, kRowsAtOnce = 8;
  static constexpr int kSharedBytes = Gemm::kSharedBytes + 4 * (Gemm::kRows + 1) * kMaxHeadDim;
};

// Block (x, y): head x of query rows from 16 y. asked = q_h K_h: q_h = told Wq_h' + bq_h, and K_h the key weights times
// the image norm's gain, their row mean taken off, over sqrt(d). The bias of the keys and of the norm shift all
// scores of a row alike.
template <class T>
__global__ void __launch_bounds__(AskedTile<T>::kThreads)
    embedded_query_asked_kernel(const __grid_constant__ QueryParams<T> p) {
  using Tile = AskedTile<T>;
  using Gemm = typename Tile::Gemm;
  grid_dependency_launch();
  const int head = blockIdx.x, first_row = blockIdx.y * Gemm::kRows, d = p.head_dim();
  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  float* const q = shared + Gemm::kSharedBytes / 4;  // (d, 16)
  float* const mean = q + Gemm::kRows * kMaxHeadDim;
  const T* const keys = p.params[kImageK] + static_cast<int64_t>(head) * d * p.inner;

  for (int j = threadIdx.x / 32; j < d; j += Gemm::kWarps) {
    float sum = 0.0f;
    for (int e = threadIdx.x % 32 * 8; e < p.inner; e += 256) {
      float key[8], gain[8];
      unpack8<T>(*reinterpret_cast<const uint4*>(keys + static_cast<int64_t>(j) * p.inner + e), key);
      unpack8<T>(*reinterpret_cast<const uint4*>(p.params[kNormImage] + e), gain);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += key[i] * gain[i];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) mean[j] = sum / static_cast<float>(p.inner);
  }

  for (int column = 0; column < d; column += Gemm::kColumns) {
    typename Gemm::Warp product(
        weight_rows(p.params[kImageQ] + static_cast<int64_t>(head) * d * p.inner, column, d, p.inner), p.inner,
        threadIdx.x / 32, Gemm::kWarps);
    product.prefetch();
    if (column == 0) grid_dependency_wait();
    float acc[Gemm::kColumns / 8][4] = {};
    product.multiply(
        acc, [&](int m) { return p.told_rows + static_cast<int64_t>(min(first_row + m, p.rows() - 1)) * p.inner; });
    const float2 sum = Gemm::add(acc, shared);
    if (Gemm::has_pair()) {
      const float scale = rsqrtf(static_cast<float>(d)), pair[2] = {sum.x, sum.y};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + Gemm::column() + i;
        if (c < d)
          q[c * Gemm::kRows + Gemm::row()] =
              (pair[i] + static_cast<float>(p.params[kImageQBias][head * d + c])) * scale;
      }
    }
    __syncthreads();
  }

  // Two columns of eight rows a thread.
  for (int i = threadIdx.x; i < p.inner; i += Tile::kThreads) {
    const int e = i % (p.inner / 2) * 2, row = i / (p.inner / 2) * Tile::kRowsAtOnce;
    const float2 gain = load_pair(p.params[kNormImage] + e);
    float2 asked[Tile::kRowsAtOnce] = {};
#pragma unroll 6
    for (int j = 0; j < d; ++j) {
      float2 key = load_pair(keys + static_cast<int64_t>(j) * p.inner + e);
      key = {key.x * gain.x - mean[j], key.y * gain.y - mean[j]};
#pragma unroll
      for (int m = 0; m < Tile::kRowsAtOnce; ++m) {
        const float own = q[j * Gemm::kRows + row + m];
        asked[m].x += own * key.x;
        asked[m].y += own * key.y;
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRowsAtOnce; ++m) {
      const int at = first_row + row + m;
      if (at < p.rows()) store_pair(p.asked + (static_cast<int64_t>(at) * p.heads + head) * p.inner + e, asked[m]);
    }
  }
}

}  // namespace flashsloth::cuda::query
