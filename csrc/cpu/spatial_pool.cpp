// Spatial attention pooling on a CPU.
//
// The idea: the hidden layer exists one tile of rows at a time. A tile's product with w1 stays in the cache while
// ReLU, dropout and the dot product with w2 reduce it to one score a token and one bit a hidden unit. The bits
// are all that backward needs (derivation in docs/kernels/spatial_pool.md):
//
//   da = <x, dy>, ds = a (da - sum a da) within windows,   m = bit / (1 - p),
//   G = sum_n ds_n m_n x_n',  g = sum_n ds_n m_n,
//   dw1 = w2 * G (row-wise),  db1 = w2 * g,  dw2 = rowsum(w1 * G) + b1 * g,  dx = a dy + (ds m * w2) w1.
#include "spatial_pool.h"

#include <algorithm>

#include "gemm.h"
#include "math.h"
#include "philox.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {

constexpr int64_t kForwardRows = 128;    // a 128 x 1152 fp32 tile of the hidden layer is 0.6 MB: it stays in L2
constexpr int64_t kBackwardRows = 1024;  // rows of ds * m at a time; each product then runs on all threads
constexpr int64_t kPartialRows = 128;    // rows summed into one partial of g, whatever the number of threads

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Walks the windows of a batch: where each image starts, and the tokens of a window.
class Windows {
 public:
  explicit Windows(const Grids& grids)
      : grids_(grids),
        memory_(2 * Scratch::padded<int64_t>(grids.images + 1)),
        first_token_(memory_.take<int64_t>(grids.images + 1)),
        first_window_(memory_.take<int64_t>(grids.images + 1)) {
    first_token_[0] = first_window_[0] = 0;
    for (int64_t i = 0; i < grids.images; ++i) {
      first_token_[i + 1] = first_token_[i] + grids.height(i) * grids.width(i);
      first_window_[i + 1] = first_window_[i] + grids.window_rows(i) * grids.window_columns(i);
    }
  }

  int64_t count() const { return first_window_[grids_.images]; }

  // visit(token) for every token of the window, row-major.
  template <class F>
  void for_tokens(int64_t window, F&& visit) const {
    const int64_t image =
        std::upper_bound(first_window_, first_window_ + grids_.images + 1, window) - first_window_ - 1;
    const int64_t within = window - first_window_[image], columns = grids_.window_columns(image);
    const int64_t height = grids_.height(image), width = grids_.width(image);
    const int64_t top = within / columns * grids_.window_height, left = within % columns * grids_.window_width;
    const int64_t bottom = std::min(top + grids_.window_height, height);
    const int64_t right = std::min(left + grids_.window_width, width);
    for (int64_t i = top; i < bottom; ++i)
      for (int64_t j = left; j < right; ++j) visit(first_token_[image] + i * width + j);
  }

 private:
  Grids grids_;
  Scratch memory_;
  int64_t *first_token_, *first_window_;
};

// `count` values in the type of the arithmetic: the input itself, or a widened copy in `room`.
template <class T>
const Acc<T>* widened(const T* from, int64_t count, Acc<T>* room) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return from;
  } else {
    parallel_for(divide_up(count, 4096), 8, [&](int64_t begin, int64_t end) {
      widen(from + begin * 4096, room + begin * 4096, std::min(end * 4096, count) - begin * 4096);
    });
    return room;
  }
}
template <class T>
constexpr int64_t room_for(int64_t count) {
  return std::is_same_v<T, Acc<T>> ? 0 : count;
}

// Score of one token from its pre-activations; packs [active and kept] into `bits` unless that is null.
template <class A>
A score_row(const A* pre, const A* b1, const A* w2, int64_t hidden, const uint8_t* keep, uint32_t* bits) {
  A score = 0;
  if (keep == nullptr) {
#pragma omp simd reduction(+ : score)
    for (int64_t j = 0; j < hidden; ++j) score += std::max(pre[j] + b1[j], A(0)) * w2[j];
  } else {
#pragma omp simd reduction(+ : score)
    for (int64_t j = 0; j < hidden; ++j) score += (keep[j] ? std::max(pre[j] + b1[j], A(0)) : A(0)) * w2[j];
  }
  for (int64_t word = 0; bits != nullptr && word < divide_up(hidden, 32); ++word) {
    const int64_t first = 32 * word, count = std::min<int64_t>(32, hidden - first);
    uint32_t packed = 0;
#pragma omp simd reduction(| : packed)
    for (int64_t j = 0; j < count; ++j)
      packed |= static_cast<uint32_t>(pre[first + j] + b1[first + j] > 0 && (keep == nullptr || keep[first + j])) << j;
    bits[word] = packed;
  }
  return score;
}

template <class T>
void scores(const SpatialPoolForward& args, Acc<T>* score) {
  using A = Acc<T>;
  const int64_t dim = args.dim, hidden = args.hidden, words = divide_up(hidden, 32);
  Scratch memory(Scratch::padded<A>(room_for<T>(hidden * dim)) + 2 * Scratch::padded<A>(hidden));
  const A* w1 = widened(static_cast<const T*>(args.w1), hidden * dim, memory.take<A>(room_for<T>(hidden * dim)));
  A *b1 = memory.take<A>(hidden), *w2 = memory.take<A>(hidden);
  widen(static_cast<const T*>(args.b1), b1, hidden);
  widen(static_cast<const T*>(args.w2), w2, hidden);
  const A b2 = load(*static_cast<const T*>(args.b2)), scale = args.dropout_p > 0 ? A(1 / (1 - args.dropout_p)) : A(1);

  // As many tiles as make the threads' shares equal.
  const int64_t rounds = divide_up(args.tokens, num_threads() * kForwardRows);
  const int64_t rows = divide_up(args.tokens, rounds * num_threads());
  parallel_for(divide_up(args.tokens, rows), 1, [&](int64_t begin, int64_t end) {
    Scratch tile(Scratch::padded<A>(rows * hidden) + Scratch::padded<A>(room_for<T>(rows * dim)) +
                 Scratch::padded<uint8_t>(hidden + 3));
    A *pre = tile.take<A>(rows * hidden), *wide = tile.take<A>(room_for<T>(rows * dim));
    uint8_t* keep = tile.take<uint8_t>(hidden + 3);
    for (int64_t first = begin * rows; first < std::min(end * rows, args.tokens); first += rows) {
      const int64_t count = std::min(rows, args.tokens - first);
      const A* x = widened(static_cast<const T*>(args.x) + first * dim, count * dim, wide);
      gemm<A>(1, {x, count, dim, dim}, {w1, hidden, dim, dim, true}, 0, {pre, count, hidden, hidden});
      for (int64_t n = 0; n < count; ++n) {
        if (args.dropout_p > 0) dropout_keep_row(args.seed, first + n, hidden, args.dropout_p, keep);
        score[first + n] = b2 + scale * score_row(pre + n * hidden, b1, w2, hidden, args.dropout_p > 0 ? keep : nullptr,
                                                  args.mask ? args.mask + (first + n) * words : nullptr);
      }
    }
  });
}

template <class T>
void forward(const SpatialPoolForward& args) {
  using A = Acc<T>;
  A* weights = static_cast<A*>(args.weights);
  if (args.tokens > 0) scores<T>(args, weights);

  const Windows windows(args.grids);
  const int64_t dim = args.dim;
  parallel_for(windows.count(), 4, [&](int64_t begin, int64_t end) {
    Scratch memory(Scratch::padded<A>(dim));
    A* sum = memory.take<A>(dim);
    for (int64_t window = begin; window < end; ++window) {
      A peak = -INFINITY, total = 0;
      windows.for_tokens(window, [&](int64_t n) { peak = std::max(peak, weights[n]); });
      windows.for_tokens(window, [&](int64_t n) { total += weights[n] = fast_exp(weights[n] - peak); });
      std::fill_n(sum, dim, A(0));
      windows.for_tokens(window, [&](int64_t n) {
        weights[n] /= total;
        axpy(weights[n], static_cast<const T*>(args.x) + n * dim, sum, dim);
      });
      narrow<T>(sum, static_cast<T*>(args.y) + window * dim, dim);
    }
  });
}

// ds of every token, and the first term of dx.
template <class T>
void score_gradient(const SpatialPoolBackward& args, Acc<T>* ds, Acc<T>* dx) {
  using A = Acc<T>;
  const A *weights = static_cast<const A*>(args.weights), *dweights = static_cast<const A*>(args.dweights);
  const Windows windows(args.grids);
  const int64_t dim = args.dim;
  parallel_for(windows.count(), 4, [&](int64_t begin, int64_t end) {
    Scratch memory(Scratch::padded<A>(dim));
    A* dy = memory.take<A>(dim);
    for (int64_t window = begin; window < end; ++window) {
      widen(static_cast<const T*>(args.dy) + window * dim, dy, dim);
      A mean = 0;
      windows.for_tokens(window, [&](int64_t n) {
        ds[n] = dot(static_cast<const T*>(args.x) + n * dim, dy, dim) + (dweights ? dweights[n] : A(0));
        mean += weights[n] * ds[n];
      });
      windows.for_tokens(window, [&](int64_t n) {
        ds[n] = weights[n] * (ds[n] - mean);
        for (int64_t d = 0; dx != nullptr && d < dim; ++d) dx[n * dim + d] = weights[n] * dy[d];
      });
    }
  });
}

template <class T>
void backward(const SpatialPoolBackward& args) {
  using A = Acc<T>;
  const int64_t tokens = args.tokens, dim = args.dim, hidden = args.hidden, words = divide_up(hidden, 32);
  const bool want_x = args.dx != nullptr, want_w = args.dw1 != nullptr;
  const int64_t chunk = std::min(kBackwardRows, tokens), partials = divide_up(chunk, kPartialRows);
  const A scale = A(1 / (1 - args.dropout_p));

  Scratch memory(2 * Scratch::padded<A>(hidden * dim) + Scratch::padded<A>(room_for<T>(hidden * dim)) +
                 Scratch::padded<A>(room_for<T>(tokens * dim)) + Scratch::padded<A>(tokens) +
                 Scratch::padded<A>(chunk * hidden) + Scratch::padded<A>(room_for<T>(chunk * dim)) +
                 Scratch::padded<A>(partials * hidden) + 3 * Scratch::padded<A>(hidden));
  A *G = memory.take<A>(hidden * dim), *g = memory.take<A>(hidden), *scaled_w1 = memory.take<A>(hidden * dim);
  A *b1 = memory.take<A>(hidden), *w2 = memory.take<A>(hidden), *ds = memory.take<A>(tokens);
  A *masked = memory.take<A>(chunk * hidden), *partial = memory.take<A>(partials * hidden);
  A* wide_x = memory.take<A>(room_for<T>(chunk * dim));
  const A* w1 = widened(static_cast<const T*>(args.w1), hidden * dim, memory.take<A>(room_for<T>(hidden * dim)));
  A* dx = nullptr;
  if (want_x) dx = std::is_same_v<T, A> ? static_cast<A*>(args.dx) : memory.take<A>(room_for<T>(tokens * dim));
  widen(static_cast<const T*>(args.b1), b1, hidden);
  widen(static_cast<const T*>(args.w2), w2, hidden);

  score_gradient<T>(args, ds, dx);
  if (want_x)
    parallel_for(hidden, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t d = 0; d < dim; ++d) scaled_w1[j * dim + d] = scale * w2[j] * w1[j * dim + d];
    });
  std::fill_n(g, hidden, A(0));
  if (tokens == 0) std::fill_n(G, hidden * dim, A(0));

  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t rows = std::min(chunk, tokens - first);
    // ds * m, expanded from the bits, and its column sums.
    parallel_for(divide_up(rows, kPartialRows), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        A* sum = partial + part * hidden;
        std::fill_n(sum, hidden, A(0));
        for (int64_t n = part * kPartialRows; n < std::min((part + 1) * kPartialRows, rows); ++n) {
          const uint32_t* bits = args.mask + (first + n) * words;
          A *row = masked + n * hidden, value = ds[first + n];
          for (int64_t word = 0; word < words; ++word) {
            const int64_t count = std::min<int64_t>(32, hidden - 32 * word);
            const uint32_t packed = bits[word];
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) {
              row[32 * word + j] = (packed >> j) & 1u ? value : A(0);
              sum[32 * word + j] += row[32 * word + j];
            }
          }
        }
      }
    });
    for (int64_t part = 0; part < divide_up(rows, kPartialRows); ++part) axpy(A(1), partial + part * hidden, g, hidden);
    const A* x = widened(static_cast<const T*>(args.x) + first * dim, rows * dim, wide_x);
    if (want_w)
      gemm<A>(1, {masked, rows, hidden, hidden, true}, {x, rows, dim, dim}, first == 0 ? 0 : 1, {G, hidden, dim, dim});
    if (want_x) {
      gemm<A>(1, {masked, rows, hidden, hidden}, {scaled_w1, hidden, dim, dim}, 1, {dx + first * dim, rows, dim, dim});
      if constexpr (!std::is_same_v<T, A>)
        narrow<T>(dx + first * dim, static_cast<T*>(args.dx) + first * dim, rows * dim);
    }
  }

  if (want_w)
    parallel_for(hidden, 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        A *row = G + j * dim, along = dot(row, w1 + j * dim, dim);
        static_cast<T*>(args.dw2)[j] = store<T>(scale * (along + b1[j] * g[j]));
        static_cast<T*>(args.db1)[j] = store<T>(scale * w2[j] * g[j]);
        for (int64_t d = 0; d < dim; ++d) row[d] *= scale * w2[j];
        narrow<T>(row, static_cast<T*>(args.dw1) + j * dim, dim);
      }
    });
}

}  // namespace

void spatial_pool_forward(const SpatialPoolForward& args) {
  with_type(args.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(args); });
}
void spatial_pool_backward(const SpatialPoolBackward& args) {
  with_type(args.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
