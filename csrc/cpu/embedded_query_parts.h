// Parts that the forward and backward of embedded-query attention share: widened operands, row-wise layer norm, the
// text side and the absorbed key projection. Derivations are in docs/kernels/embedded_query.md.
#pragma once

#include <algorithm>

#include "embedded_query.h"
#include "gemm.h"
#include "math.h"

namespace flashsloth::cpu {
namespace {  // not shared between files, see types.h

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(row) for every row, a thread taking at least `work` elements at a time.
template <class F>
void for_rows(int64_t rows, int64_t width, F&& body, int64_t work = 16384) {
  parallel_for(rows, std::max<int64_t>(1, work / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row);
  });
}

template <class A>
void clear(A* x, int64_t count) {
  std::fill_n(x, count, A(0));
}

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(Scratch::padded<A>(count)), data_(memory_.template take<A>(count)) {}
  operator A*() const { return data_; }

 private:
  Scratch memory_;
  A* data_;
};

// An input in the type of the arithmetic: itself, or a widened copy.
template <class T>
class Wide {
 public:
  using A = Acc<T>;
  Wide(const void* from, int64_t count) : copy_(kSame ? 0 : count), data_(copy_) {
    if constexpr (kSame) {
      data_ = static_cast<const A*>(from);
    } else {
      for_rows(divide_up(count, 4096), 4096, [&](int64_t block) {
        const int64_t first = block * 4096;
        widen(static_cast<const T*>(from) + first, copy_ + first, std::min<int64_t>(4096, count - first));
      });
    }
  }
  operator const A*() const { return data_; }

 private:
  static constexpr bool kSame = std::is_same_v<T, A>;
  Buffer<A> copy_;
  const A* data_;
};

// An output in the type of the arithmetic: itself, or a buffer that is rounded into it on scope exit.
template <class T>
class WideOut {
 public:
  using A = Acc<T>;
  WideOut(void* to, int64_t count)
      : to_(static_cast<T*>(to)), count_(count), buffer_(kSame ? 0 : count), data_(buffer_) {
    if constexpr (kSame) data_ = static_cast<A*>(to);
  }
  ~WideOut() {
    if constexpr (!kSame)
      for_rows(divide_up(count_, 4096), 4096, [&](int64_t block) {
        const int64_t first = block * 4096;
        narrow<T>(data_ + first, to_ + first, std::min<int64_t>(4096, count_ - first));
      });
  }
  WideOut(const WideOut&) = delete;
  WideOut& operator=(const WideOut&) = delete;
  operator A*() const { return data_; }

 private:
  static constexpr bool kSame = std::is_same_v<T, A>;
  T* to_;
  int64_t count_;
  Buffer<A> buffer_;
  A* data_;
};

// out = x weight' + bias, for `rows` rows; no bias when null.
template <class A>
void linear(const A* x, int64_t rows, int64_t in, const A* weight, const A* bias, int64_t out_size, A* out) {
  if (rows == 0) return;
  gemm<A>(1, {x, rows, in, in}, {weight, out_size, in, in, true}, 0, {out, rows, out_size, out_size});
  if (bias != nullptr) for_rows(rows, out_size, [&](int64_t row) { axpy(A(1), bias, out + row * out_size, out_size); });
}

// dx = d weight, the gradient of the input of linear().
template <class A>
void linear_input(const A* d, int64_t rows, int64_t out_size, const A* weight, int64_t in, A beta, A* dx) {
  if (rows > 0) gemm<A>(1, {d, rows, out_size, out_size}, {weight, out_size, in, in}, beta, {dx, rows, in, in});
}

// out = beta out + column sums of d. Rounded once: for many rows a running sum in fp32 loses what a cascade keeps.
template <class A>
void column_sums(const A* d, int64_t rows, int64_t width, A beta, A* out) {
  constexpr int64_t kColumns = 256;
  for_rows(divide_up(width, kColumns), rows * kColumns, [&](int64_t block) {
    const int64_t first = block * kColumns, count = std::min(kColumns, width - first);
    double sums[kColumns];
    for (int64_t i = 0; i < count; ++i) sums[i] = beta == 0 ? 0 : static_cast<double>(beta * out[first + i]);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(d[row * width + first + i]);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<A>(sums[i]);
  });
}

// dweight = d' x and dbias = column sums of d, added to what is there with beta = 1.
template <class A>
void linear_weight(const A* d, const A* x, int64_t rows, int64_t out_size, int64_t in, A beta, A* dweight, A* dbias) {
  column_sums<A>(d, rows, out_size, beta, dbias);
  if (rows == 0) {
    if (beta == 0) clear<A>(dweight, out_size * in);
  } else {
    gemm<A>(1, {d, rows, out_size, out_size, true}, {x, rows, in, in}, beta, {dweight, out_size, in, in});
  }
}

template <class A>
void row_statistics(const A* x, int64_t count, double eps, A* mean, A* rstd) {
  A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += x[i];
  const A center = sum / static_cast<A>(count);
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) squares += (x[i] - center) * (x[i] - center);
  *mean = center;
  *rstd = 1 / std::sqrt(squares / static_cast<A>(count) + static_cast<A>(eps));
}

// Layer norm of rows, with what its backward needs.
template <class A>
class LayerNorm {
 public:
  LayerNorm(const A* x, int64_t rows, int64_t width, const A* gain, const A* bias, double eps)
      : x_(x), gain_(gain), rows_(rows), width_(width), out_(rows * width), mean_(rows), rstd_(rows) {
    for_rows(rows, width, [&](int64_t row) {
      row_statistics(x + row * width, width, eps, mean_ + row, rstd_ + row);
      const A mean = mean_[row], rstd = rstd_[row];
      A* out = out_ + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) out[i] = (x[row * width + i] - mean) * rstd * gain[i] + bias[i];
    });
  }
  const A* out() const { return out_; }

  // Gradient of x in place of the gradient of out; of gain and bias unless null.
  void backward(A* d, A* dgain, A* dbias) const {
    if (dgain != nullptr) {
      clear<A>(dgain, width_);
      clear<A>(dbias, width_);
      for (int64_t row = 0; row < rows_; ++row) {
        const A *x = x_ + row * width_, *dout = d + row * width_, mean = mean_[row], rstd = rstd_[row];
#pragma omp simd
        for (int64_t i = 0; i < width_; ++i) {
          dgain[i] += dout[i] * (x[i] - mean) * rstd;
          dbias[i] += dout[i];
        }
      }
    }
    for_rows(rows_, width_, [&](int64_t row) {
      const A *x = x_ + row * width_, mean = mean_[row], rstd = rstd_[row];
      A *dx = d + row * width_, sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
      for (int64_t i = 0; i < width_; ++i) {
        dx[i] *= gain_[i];
        sum += dx[i];
        along += dx[i] * (x[i] - mean) * rstd;
      }
      sum /= static_cast<A>(width_);
      along /= static_cast<A>(width_);
#pragma omp simd
      for (int64_t i = 0; i < width_; ++i) dx[i] = (dx[i] - sum - (x[i] - mean) * rstd * along) * rstd;
    });
  }

 private:
  const A *x_, *gain_;
  int64_t rows_, width_;
  Buffer<A> out_, mean_, rstd_;
};

// The key projection with the layer norm's gain and the softmax's scale in it. Its rows are centred, so that they meet
// only the centred part of y: with k = key(row) . y * rstd neither mean, bias nor gain is left to apply.
template <class A>
void absorb_keys(const EmbeddedQuerySizes& sizes, const A* weight, const A* gain, A* keys) {
  const int64_t e = sizes.inner;
  const A scale = A(1) / std::sqrt(static_cast<A>(sizes.head_dim()));
  for_rows(e, e, [&](int64_t row) {
    const A mean = dot(weight + row * e, gain, e) / static_cast<A>(e);
    for (int64_t i = 0; i < e; ++i) keys[row * e + i] = (weight[row * e + i] * gain[i] - mean) * scale;
  });
}

// Rows in the order (question, query, head). x (B*Q, h*from) times a (from, to) block of weight rows a head gives
// (B*Q, h, to).
template <class A>
void expand_heads(const EmbeddedQuerySizes& sizes, const A* x, int64_t from, const A* weight, int64_t to, A* out) {
  const int64_t heads = sizes.heads, rows = sizes.rows();
  if (rows == 0) return;
  parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      gemm<A>(1, {x + h * from, rows, from, heads * from}, {weight + h * from * to, from, to, to}, 0,
              {out + h * to, rows, to, heads * to});
  });
}

// The way back: (B*Q, h, from) times the transposed block (to, from) of each head gives (B*Q, h*to).
template <class A>
void contract_heads(const EmbeddedQuerySizes& sizes, const A* x, int64_t from, const A* weight, int64_t to, A* out) {
  const int64_t heads = sizes.heads, rows = sizes.rows();
  if (rows == 0) return;
  parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      gemm<A>(1, {x + h * from, rows, from, heads * from}, {weight + h * to * from, to, from, from, true}, 0,
              {out + h * to, rows, to, heads * to});
  });
}

// How the tokens of an image are divided: `splits` pieces, each on one thread, each taken in tiles of `tile` tokens.
struct KeySplit {
  int64_t splits, piece, tile;

  explicit KeySplit(const EmbeddedQuerySizes& sizes) {
    const int64_t rows = sizes.image_rows() * sizes.heads;
    const int64_t tokens = std::max<int64_t>(1, sizes.tokens), images = std::max<int64_t>(1, sizes.images);
    const int64_t threads = num_threads(), most = divide_up(tokens, 128);
    splits = 1;
    // The fewest pieces that keep the threads busy: a piece costs its share of an image, and a little for merging.
    double best = 0;
    for (int64_t s = 1; s <= std::min(most, threads); ++s) {
      const double cost =
          static_cast<double>(divide_up(images * s, threads)) / static_cast<double>(s) * (1 + 0.03 * (s - 1));
      if (s == 1 || cost < best) best = cost, splits = s;
    }
    piece = divide_up(tokens, splits);
    splits = divide_up(tokens, piece);
    const int64_t largest = std::clamp<int64_t>(kScores / std::max<int64_t>(1, rows), 256, 1024);
    tile = divide_up(piece, divide_up(piece, largest));
  }

  // body(image, split, first token, end) for every piece of images [first, last), on all threads.
  template <class F>
  void each(const EmbeddedQuerySizes& sizes, int64_t first, int64_t last, F&& body) const {
    parallel_for((last - first) * splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = first * splits + begin; i < first * splits + end; ++i) {
        const int64_t split = i % splits;
        body(i / splits, split, split * piece, std::min((split + 1) * piece, sizes.tokens));
      }
    });
  }

 private:
  static constexpr int64_t kScores = 1 << 20;  // products are faster in large tiles, which need not fit into L2
};

// Scores of queries against a tile of tokens, before rstd; forward and backward take the same way and so agree to the
// bit.
template <class T>
class Scores {
 public:
  using A = Acc<T>;
  // Whether projecting the queries is less work than projecting the tokens.
  static bool absorbs(const EmbeddedQuerySizes& sizes) { return sizes.image_rows() * sizes.heads <= sizes.inner; }

  // q (B*Q, E), keys from absorb_keys(); asked (B*Q, h, E), q times keys, unused unless absorbs().
  Scores(const EmbeddedQuerySizes& sizes, const void* y, const A* q, const A* keys, const A* asked)
      : sizes_(sizes), y_(static_cast<const T*>(y)), q_(q), keys_(keys), asked_(asked) {}

  // Numbers of `room` that a tile of `count` tokens needs.
  int64_t room(int64_t count) const { return absorbs(sizes_) ? 0 : count * sizes_.inner; }

  // out (queries of the image, h, count)
  void tile(int64_t image, int64_t first, int64_t count, A* room, A* out) const {
    const int64_t e = sizes_.inner, heads = sizes_.heads, d = sizes_.head_dim(), queries = sizes_.image_rows();
    const int64_t rows = queries * heads;
    const Wide<T> y(y_ + (image * sizes_.tokens + first) * e, count * e);
    if (absorbs(sizes_)) {
      gemm<A>(1, {asked_ + image * rows * e, rows, e, e}, {y, count, e, e, true}, 0, {out, rows, count, count});
      return;
    }
    gemm<A>(1, {y, count, e, e}, {keys_, e, e, e, true}, 0, {room, count, e, e});
    for (int64_t h = 0; h < heads; ++h)
      gemm<A>(1, {q_ + image * queries * e + h * d, queries, d, e}, {room + h * d, count, d, e, true}, 0,
              {out + h * count, queries, count, heads * count});
  }

 private:
  const EmbeddedQuerySizes& sizes_;
  const T* y_;
  const A *q_, *keys_, *asked_;
};

}  // namespace
}  // namespace flashsloth::cpu
