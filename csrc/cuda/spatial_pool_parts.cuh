// Spatial attention pooling: what its kernels share. Where windows lie, what the hidden layer adds to a score, and the
// weighted sum over a window.
#pragma once

#include "instructions.cuh"

namespace flashsloth::cuda {

// Parameters of the kernels; see spatial_pool.h. Windows are not larger than the grid here.
template <class T>
struct PoolParams {
  int64_t tokens;
  int windows, dim, hidden, mask_words;
  int images, height, width, window_height, window_width;
  int window_columns, image_windows;  // of an image, unless `grids`
  int tile_windows;                   // of a tile of the cluster kernel
  const int64_t* grids;
  const T *x, *w1, *b1, *w2;
  const int64_t* seed;
  uint32_t drop_below;  // a unit is dropped where its random word is less; 0: no dropout
  float keep_scale;     // 1 / (1 - p)
  T* y;
  float* weights;
  uint32_t* mask;
  float* partial;  // scratch: scores summed over a part of the hidden units, (parts, tokens)
};

// ---- Windows ----

struct Window {
  int64_t first;      // its first token
  int rows, columns;  // in tokens
  int width;          // of the image: from a token to the one below
};

__device__ inline int windows_along(int side, int window) { return side > 0 ? (side - 1) / window + 1 : 0; }

// Window `index` of an image, `columns` windows wide, whose first token is `first`.
template <class T>
__device__ inline Window window_in(const PoolParams<T>& p, int64_t first, int height, int width, int columns,
                                   int index) {
  const int row = index / columns * p.window_height, column = index % columns * p.window_width;
  return {first + static_cast<int64_t>(row) * width + column, min(height - row, p.window_height),
          min(width - column, p.window_width), width};
}

// Images of one size.
template <class T>
__device__ inline Window window_of_grid(const PoolParams<T>& p, int index) {
  const int image = index / p.image_windows;
  return window_in(p, static_cast<int64_t>(image) * p.height * p.width, p.height, p.width, p.window_columns,
                   index - image * p.image_windows);
}

// Packed images. Their sizes were not checked on the host: a window beyond the last, or that leaves x, counts as empty.
template <class T>
__device__ inline Window window_of_packed(const PoolParams<T>& p, int index) {
  int64_t first = 0;
  for (int image = 0; image < p.images; ++image) {  // batches are small
    const int height = static_cast<int>(p.grids[2 * image]), width = static_cast<int>(p.grids[2 * image + 1]);
    const int columns = windows_along(width, p.window_width);
    const int windows = windows_along(height, p.window_height) * columns;
    if (index < windows) {
      const Window w = window_in(p, first, height, width, columns, index);
      return w.first + static_cast<int64_t>(w.rows - 1) * width + w.columns > p.tokens ? Window{0, 0, 0, 0} : w;
    }
    index -= windows;
    first += static_cast<int64_t>(height) * width;
  }
  return {0, 0, 0, 0};
}

// ---- The hidden layer ----

// Bit i of the result: whether dropout keeps unit first_unit + i, for the units that a lane holds of an accumulator,
// 8j + 2t and 8j + 2t + 1 as bits 2j and 2j + 1. Philox4x32-10 as flashsloth_ops/reference/spatial_pool.py says.
template <class T>
__device__ inline uint64_t kept_units(const PoolParams<T>& p, int64_t token, int first_unit, int groups, int lane) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  uint64_t kept = 0;
#pragma unroll 1
  for (int j = 0; j < groups; ++j) {
    const int unit = first_unit + 8 * j + 2 * (lane % 4);
    uint32_t c0 = unit / 4, c1 = static_cast<uint32_t>(token), c2 = static_cast<uint32_t>(token >> 32), c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const bool upper = unit % 4 != 0;  // units 2, 3 of the four that share a counter
    kept |= static_cast<uint64_t>((upper ? c2 : c0) >= p.drop_below) << (2 * j);
    kept |= static_cast<uint64_t>((upper ? c3 : c1) >= p.drop_below) << (2 * j + 1);
  }
  return kept;
}

// Adds two neighbouring units of a token to its score. `kept` has a bit for each; so has the result, for the mask.
// NaN is not at most zero, so it reaches the score.
__device__ inline uint32_t add_units(float& score, float a, float b, float2 b1, float2 w2, uint32_t kept) {
  a += b1.x;
  b += b1.y;
  const bool first = !(a <= 0.0f) && (kept & 1) != 0, second = !(b <= 0.0f) && (kept & 2) != 0;
  if (first) score += a * w2.x;
  if (second) score += b * w2.y;
  return static_cast<uint32_t>(first) | static_cast<uint32_t>(second) << 1;
}

// Or over the four lanes that share a row of an accumulator.
__device__ inline uint32_t or_of_row(uint32_t bits) {
  bits |= __shfl_xor_sync(kFullWarp, bits, 1);
  return bits | __shfl_xor_sync(kFullWarp, bits, 2);
}

// Elements index and index + 1 of a vector, zero past its end.
template <class T>
__device__ inline float2 load_pair(const T* vector, int index, int size) {
  return {index < size ? static_cast<float>(vector[index]) : 0.0f,
          index + 1 < size ? static_cast<float>(vector[index + 1]) : 0.0f};
}

// ---- Eight columns of a row ----

// `Vector`: rows are 16-byte aligned and columns a multiple of eight. Else element by element, zeros past the end.
template <class T, bool Vector>
__device__ inline uint4 load8(const T* row, int column, int dim) {
  if constexpr (Vector) {
    return load_streaming16(row + column);
  } else {
    const auto packed = [&](int i) {
      const float2 pair = load_pair(row, column + i, dim);
      return pack2<T>(pair.x, pair.y);
    };
    return {packed(0), packed(2), packed(4), packed(6)};
  }
}

template <class T, bool Vector>
__device__ inline void store8(T* row, int column, int dim, const float (&v)[8]) {
  if constexpr (Vector) {
    *reinterpret_cast<uint4*>(row + column) = {pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]), pack2<T>(v[4], v[5]),
                                               pack2<T>(v[6], v[7])};
  } else {
    for (int i = 0; i < 8; ++i)
      if (column + i < dim) row[column + i] = static_cast<T>(v[i]);
  }
}

// The weighted sum of eight columns over a window. x does not depend on the weights, so the first tokens can be on
// their way while the weights are still being computed: start(), then finish().
template <class T, bool Vector>
struct WindowSum {
  static constexpr int kAhead = 9;
  uint4 ahead[kAhead];

  __device__ static const T* row(const PoolParams<T>& p, const Window& w, int r, int c) {
    return p.x + (w.first + static_cast<int64_t>(r) * w.width + c) * p.dim;
  }

  __device__ void start(const PoolParams<T>& p, const Window& w, int column) {
    int r = 0, c = 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const bool there = r < w.rows && column < p.dim;
      ahead[i] = there ? load8<T, Vector>(row(p, w, r, c), column, p.dim) : uint4{0, 0, 0, 0};
      if (++c >= w.columns) c = 0, ++r;
    }
  }

  // weight(r, c) is called for the window's tokens in order, by all lanes that have the same window.
  template <class Weight>
  __device__ void finish(const PoolParams<T>& p, const Window& w, int column, float (&sum)[8], Weight weight) const {
    int r = 0, c = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (r < w.rows) add(sum, weight(r, c), ahead[i]);
      if (++c >= w.columns) c = 0, ++r;
    }
    for (; r < w.rows; ++r, c = 0) {
      for (; c < w.columns; ++c) {
        const float a = weight(r, c);
        if (column < p.dim) add(sum, a, load8<T, Vector>(row(p, w, r, c), column, p.dim));
      }
    }
  }

 private:
  __device__ static void add(float (&sum)[8], float a, uint4 packed) {
    const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack2<T>(pairs[i]);
      sum[2 * i] += a * x.x;
      sum[2 * i + 1] += a * x.y;
    }
  }
};

constexpr float kLog2E = 1.44269504f;

}  // namespace flashsloth::cuda
