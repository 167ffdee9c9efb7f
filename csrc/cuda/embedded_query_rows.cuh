// Embedded-query attention: rows projected to E, with what their layer norm needs. The image's rows (its state), and
// the query and text rows.
//
// No block sees a whole row of the result, so each leaves mean and squares of its 32 columns, and whoever normalises
// the row puts the parts together: exact to rounding, unlike a sum of squares.
#pragma once

#include "embedded_query_parts.cuh"
#include "hopper.cuh"
#include "skinny_gemm.cuh"
#include "tile_gemm.cuh"

namespace flashsloth::cuda::query {

template <class T>
struct StateParams {
  int rows, dim, inner;
  float eps;
  const T *image, *weight, *bias;
  T* y;
  float *mean, *rstd;
  float2* parts;  // (parts, rows)
};

// Rows in tiles of 64 x 64: images, and many text rows.
template <class T>
using RowsTile = TileGemm<T, 64, 64, BLayout::columns_by_k>;

namespace detail {

// y = A weight' + bias for a tile. rows: what is stored; those from `count` on are zeros and belong to nobody.
// leave(part, row, v): takes mean and squares of a part of a row, numbered as in the whole of y.
template <class Tile, class T, class ARow, class Leave>
__device__ inline void project_tile(const T* weight, const T* bias, int depth, int inner, int rows, int count,
                                    ARow a_row, T* y, float* wide, Leave leave) {
  const int first_row = blockIdx.y * Tile::kRows, first_column = blockIdx.x * Tile::kColumns;
  typename Tile::Accumulator acc = {};
  Tile::run(
      acc, depth, 0, [&](int m) { return first_row + m < count ? a_row(first_row + m) : nullptr; },
      [&](int n) {
        return first_column + n < inner ? weight + static_cast<int64_t>(first_column + n) * depth : nullptr;
      },
      [](int) {});

  const int part = (first_column + Tile::column(0)) / kPartColumns,
            size = min(kPartColumns, inner - part * kPartColumns);
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int row = first_row + Tile::row() + 8 * upper;
    float v[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + Tile::column(j);
      float2 sum = {0.0f, 0.0f};
      if (column < inner && row < count) {
        const float2 b = load_pair(bias + column);
        sum = {acc[j][2 * upper] + b.x, acc[j][2 * upper + 1] + b.y};
      }
      const float2 rounded = unpack2<T>(pack2<T>(sum.x, sum.y));
      v[2 * j] = rounded.x;
      v[2 * j + 1] = rounded.y;
      if (column >= inner || row >= rows) continue;
      store_pair(y + static_cast<int64_t>(row) * inner + column, rounded);
      if (wide != nullptr) *reinterpret_cast<float2*>(wide + static_cast<int64_t>(row) * inner + column) = sum;
    }
    const float2 own = part_statistics<4>(v, size, [&](int i) { return first_column + Tile::column(i / 2) < inner; });
    if (threadIdx.x % 4 == 0 && row < rows && size > 0) leave(part, row, own);
  }
}

}  // namespace detail

// ---- The image ----

// In one launch, where a row's columns fit a cluster: its blocks show each other mean and squares of their columns.
template <class T>
struct StateTile : TileGemm<T, 64, 96, BLayout::columns_by_k> {
  using Gemm = TileGemm<T, 64, 96, BLayout::columns_by_k>;
  static constexpr int kParts = Gemm::kColumns / kPartColumns, kMostBlocks = 8;
  static constexpr int kSharedBytes = Gemm::kSharedBytes + kParts * Gemm::kRows * static_cast<int>(sizeof(float2));
};

// Block (x, y): columns from 96 x of rows from 64 y; a cluster is all x.
template <class T>
__global__ void __launch_bounds__(StateTile<T>::kThreads)
    image_state_cluster_kernel(const __grid_constant__ StateParams<T> p) {
  if constexpr (kHasSm90a) {
    using Tile = StateTile<T>;
    float2* const parts = reinterpret_cast<float2*>(dynamic_shared() + Tile::Gemm::kSharedBytes);  // (parts, rows)
    const int first_row = blockIdx.y * Tile::kRows, rank = blockIdx.x, blocks = gridDim.x;
    detail::project_tile<typename Tile::Gemm>(
        p.weight, p.bias, p.dim, p.inner, p.rows, p.rows,
        [&](int row) { return p.image + static_cast<int64_t>(row) * p.dim; }, p.y, static_cast<float*>(nullptr),
        [&](int part, int row, float2 own) {
          parts[(part - rank * Tile::kParts) * Tile::kRows + row - first_row] = own;
        });
    __syncwarp();  // the barrier of a cluster takes whole warps
    cluster_sync();
    // 16 rows a warp, of as many blocks as it takes.
    const int group = rank + static_cast<int>(threadIdx.x) / 32 * blocks, in_tile = 16 * group + threadIdx.x % 16;
    if (group < Tile::kRows / 16) {
      const float2 statistics = row_statistics(
          [&](int part) -> float2 {
            const uint32_t at = shared_address(parts + part % Tile::kParts * Tile::kRows + in_tile);
            const uint32_t remote = cluster_address(at, part / Tile::kParts);
            return {load_cluster(remote), load_cluster(remote + 4)};
          },
          p.inner, p.eps);
      const int row = first_row + in_tile;
      if (row < p.rows && threadIdx.x % 32 < 16) {
        p.mean[row] = statistics.x;
        p.rstd[row] = statistics.y;
      }
    }
    __syncwarp();
    cluster_sync();  // nobody ends while its parts are read
  }
}

// In two, on every GPU. Block (x, y): columns from 64 x of rows from 64 y.
template <class T>
__global__ void __launch_bounds__(RowsTile<T>::kThreads)
    image_state_project_kernel(const __grid_constant__ StateParams<T> p) {
  grid_dependency_launch();
  detail::project_tile<RowsTile<T>>(
      p.weight, p.bias, p.dim, p.inner, p.rows, p.rows,
      [&](int row) { return p.image + static_cast<int64_t>(row) * p.dim; }, p.y, static_cast<float*>(nullptr),
      [&](int part, int row, float2 own) { p.parts[static_cast<int64_t>(part) * p.rows + row] = own; });
}

constexpr int kStatisticsThreads = 128;

// A row a pair of lanes.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads)
    image_state_statistics_kernel(const __grid_constant__ StateParams<T> p) {
  grid_dependency_wait();
  const int row = (blockIdx.x * kStatisticsThreads + threadIdx.x) / 32 * 16 + threadIdx.x % 16;
  const float2* const parts = p.parts + min(row, p.rows - 1);
  const float2 statistics =
      row_statistics([&](int i) { return parts[static_cast<int64_t>(i) * p.rows]; }, p.inner, p.eps);
  if (row >= p.rows || threadIdx.x % 32 >= 16) return;
  p.mean[row] = statistics.x;
  p.rstd[row] = statistics.y;
}

// ---- Query and text ----

namespace detail {

// Two columns of a row of hidden, without their bias, from the 16 lanes that have the row's columns from `first`.
template <class T>
__device__ inline void store_projected(const QueryParams<T>& p, int row, int first, float2 sum) {
  const int column = first + threadIdx.x % 16 * 2;
  const bool there = row < p.all_rows() && column < p.inner;
  if (there && source_row(p, row) != nullptr) {
    const float2 bias = load_pair(p.params[kDownBias] + column);
    sum.x += bias.x;
    sum.y += bias.y;
  } else {
    sum = {0.0f, 0.0f};
  }
  const float2 rounded = unpack2<T>(pack2<T>(sum.x, sum.y));
  const float v[2] = {rounded.x, rounded.y};
  const float2 own = part_statistics<16>(v, min(kPartColumns, p.inner - first), [&](int) { return column < p.inner; });
  if (!there) return;
  const int64_t at = static_cast<int64_t>(row) * p.inner + column;
  store_pair(p.hidden_rows + at, rounded);
  if (p.hidden != nullptr) *reinterpret_cast<float2*>(p.hidden + at) = sum;
  if (column == first) p.parts[static_cast<int64_t>(first / kPartColumns) * p.all_rows() + row] = own;
}

}  // namespace detail

// Few rows on sm_90: a tile has them all, or half, so that their weights are read once or twice. The blocks of a
// cluster split the product along k, and add up in shared memory.
template <class T>
struct RowsClusterTile : TileGemm<T, 80, kPartColumns, BLayout::columns_by_k> {
  using Gemm = TileGemm<T, 80, kPartColumns, BLayout::columns_by_k>;
  static constexpr int kParts = 8, kOwnRows = Gemm::kRows / kParts;
  static constexpr int kSharedBytes = Gemm::kSharedBytes + 4 * Gemm::kRows * Gemm::kColumns;
  static_assert(Gemm::kThreads == 16 * kOwnRows, "a pair of columns a thread");
};

// Block (x, y, z): part x along k of columns from 32 y of rows from 80 z of hidden. Rows past the last text row become
// zeros.
template <class T>
__global__ void __launch_bounds__(RowsClusterTile<T>::kThreads)
    embedded_query_rows_cluster_kernel(const __grid_constant__ QueryParams<T> p) {
  if constexpr (kHasSm90a) {
    using Tile = RowsClusterTile<T>;
    grid_dependency_launch();
    const int rank = blockIdx.x, first_column = blockIdx.y * Tile::kColumns, first_row = blockIdx.z * Tile::kRows;
    const int size = divide_up(divide_up(p.model, Tile::kParts), Tile::kDepth) * Tile::kDepth, first = rank * size;
    float acc[4][4] = {};
    Tile::run(
        acc, min(size, p.model - first), 0,
        [&](int m) {
          const T* const row = source_row(p, first_row + m);
          return row == nullptr ? nullptr : row + first;
        },
        [&](int n) -> const T* {
          const int column = first_column + n;
          return column < p.inner ? p.params[kDown] + static_cast<int64_t>(column) * p.model + first : nullptr;
        },
        [](int) {});

    float* const sums = reinterpret_cast<float*>(dynamic_shared() + Tile::Gemm::kSharedBytes);  // (rows, columns)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
        *reinterpret_cast<float2*>(sums + (Tile::row() + 8 * upper) * Tile::kColumns + Tile::column(j)) = {
            acc[j][2 * upper], acc[j][2 * upper + 1]};
    }
    cluster_sync();
    const int row = rank * Tile::kOwnRows + static_cast<int>(threadIdx.x) / 16;
    const uint32_t own = shared_address(sums + row * Tile::kColumns + threadIdx.x % 16 * 2);
    float2 sum = {0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const uint32_t remote = cluster_address(own, part);
      sum.x += load_cluster(remote);
      sum.y += load_cluster(remote + 4);
    }
    detail::store_projected(p, first_row + row, first_column, sum);
    __syncwarp();
    cluster_sync();  // nobody ends while its sums are read
  }
}

// Few rows on every GPU.
template <class T>
using RowsGemm = SkinnyGemm<T, kPartColumns / 8>;

// Block (x, y): columns from 32 x of rows from 16 y of hidden. Rows past the last text row become zeros.
template <class T>
__global__ void __launch_bounds__(RowsGemm<T>::kThreads)
    embedded_query_rows_kernel(const __grid_constant__ QueryParams<T> p) {
  using Gemm = RowsGemm<T>;
  grid_dependency_launch();
  const int first_column = blockIdx.x * Gemm::kColumns, first_row = blockIdx.y * Gemm::kRows;
  typename Gemm::Warp product(weight_rows(p.params[kDown], first_column, p.inner, p.model), p.model, threadIdx.x / 32,
                              Gemm::kWarps);
  product.prefetch();
  grid_dependency_wait();
  float acc[Gemm::kColumns / 8][4] = {};
  product.multiply(acc, [&](int m) {
    const T* const row = source_row(p, first_row + m);
    return row != nullptr ? row : p.query;
  });

  const float2 sum = Gemm::add(acc, reinterpret_cast<float*>(dynamic_shared()));
  detail::store_projected(p, first_row + Gemm::row(), first_column, sum);
}

// Many rows.
template <class T>
__global__ void __launch_bounds__(RowsTile<T>::kThreads)
    embedded_query_many_rows_kernel(const __grid_constant__ QueryParams<T> p) {
  grid_dependency_launch();
  detail::project_tile<RowsTile<T>>(
      p.params[kDown], p.params[kDownBias], p.model, p.inner, p.all_rows(), first_text_row(p, p.batch),
      [&](int row) { return source_row(p, row); }, p.hidden_rows, p.hidden,
      [&](int part, int row, float2 own) { p.parts[static_cast<int64_t>(part) * p.all_rows() + row] = own; });
}

}  // namespace flashsloth::cuda::query
