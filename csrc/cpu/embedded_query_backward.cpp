// Embedded-query attention on a CPU: the backward pass.
//
// In the absorbed form, a row's pooled image is softmax(asked . y_n * rstd_n) image. With P recomputed a tile at a time
// from the saved maximum and sum, dP = dpooled image' and delta = sum over n of P dP / sum of P,
//
//   dS = P (dP - delta),   dimage = P' dpooled,   dasked = (dS rstd) y,
//   dy_n = rstd_n (dS' asked - y^_n mean(dS S)),   y^_n = (y_n - mean_n) rstd_n.
//
// asked is centred, so the layer norm's mean passes no gradient; its reciprocal deviation gives the second term of dy.
#include "embedded_query.h"
#include "embedded_query_parts.h"
#include "embedded_query_text.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {

// Tiles of the image: gradients of image, y and asked. Scores and dP of the images in work are kept, so that delta is
// the mean of the very dP it is subtracted from, under the very P: a row of dS then sums to zero within its own
// rounding. <dpooled, pooled> and the saved sum would leave there the rounding of other sums, in the same direction for
// all tokens, and the bias of the down-projection, a sum of dy over tokens, would collect it.
template <class T>
class ReaderBackward {
 public:
  using A = Acc<T>;
  ReaderBackward(const EmbeddedQueryBackward& args, const Scores<T>& scores, const A* asked, const A* dpooled,
                 A* dasked)
      : args_(args),
        sizes_(args.sizes),
        rows_(sizes_.image_rows() * sizes_.heads),
        split_(sizes_),
        at_once_(std::min<int64_t>(sizes_.images, num_threads())),
        scores_(scores),
        asked_(asked),
        dpooled_(dpooled),
        dasked_(dasked),
        kept_(2 * at_once_ * rows_ * sizes_.tokens),
        sums_(2 * sizes_.images * split_.splits * rows_) {}

  void run() const {
    const int64_t splits = split_.splits, size = rows_ * sizes_.inner;
    Buffer<A> partial(splits == 1 ? 0 : sizes_.images * splits * size);
    A* parts = splits == 1 ? dasked_ : static_cast<A*>(partial);
    for (int64_t first = 0; first < sizes_.images; first += at_once_) {
      const int64_t last = std::min(first + at_once_, sizes_.images);
      split_.each(sizes_, first, last, [&](int64_t image, int64_t split, int64_t begin, int64_t end) {
        compare(image, begin, end, sums_ + 2 * (image * splits + split) * rows_);
      });
      split_.each(sizes_, first, last, [&](int64_t image, int64_t split, int64_t begin, int64_t end) {
        piece(image, begin, end, parts + (image * splits + split) * size);
      });
    }
    if (splits == 1) return;
    for_rows(sizes_.images * rows_, sizes_.inner * splits, [&](int64_t row) {
      const int64_t e = sizes_.inner, first = row / rows_ * splits * rows_ + row % rows_;
      clear<A>(dasked_ + row * e, e);
      for (int64_t s = 0; s < splits; ++s) axpy(A(1), parts + (first + s * rows_) * e, dasked_ + row * e, e);
    });
  }

 private:
  // Scores before rstd and dP (rows, count) of the tile that starts at a token, while its image is in work.
  A* kept_scores(int64_t image, int64_t first) const {
    return kept_ + (image % at_once_ * sizes_.tokens + first) * rows_ * 2;
  }
  A* kept_dprobs(int64_t image, int64_t first, int64_t count) const {
    return kept_scores(image, first) + rows_ * count;
  }
  Matrix<const A> dpooled(int64_t image) const {
    return {dpooled_ + image * rows_ * sizes_.dim, rows_, sizes_.dim, sizes_.dim};
  }

  // sums: of P dP and of P over tokens [begin, end), for each row.
  void compare(int64_t image, int64_t begin, int64_t end, double* sums) const {
    const int64_t dim = sizes_.dim;
    Buffer<A> room(scores_.room(split_.tile));
    clear<double>(sums, 2 * rows_);
    for (int64_t first = begin; first < end; first += split_.tile) {
      const int64_t count = std::min(split_.tile, end - first), token = image * sizes_.tokens + first;
      const Wide<T> x(static_cast<const T*>(args_.image) + token * dim, count * dim);
      const A* rstd = static_cast<const A*>(args_.rstd) + token;
      A *scores = kept_scores(image, first), *dprobs = kept_dprobs(image, first, count);
      scores_.tile(image, first, count, room, scores);
      gemm<A>(1, dpooled(image), {x, count, dim, dim, true}, 0, {dprobs, rows_, count, count});
      for (int64_t row = 0; row < rows_; ++row) {
        const A *score = scores + row * count, *d = dprobs + row * count;
        const A top = softmax(image, row)[0], share = 1 / softmax(image, row)[1];
        double sum = 0, total = 0;
#pragma omp simd reduction(+ : sum, total)
        for (int64_t n = 0; n < count; ++n) {
          const A p = fast_exp(score[n] * rstd[n] - top) * share;
          sum += p * d[n], total += p;
        }
        sums[2 * row] += sum, sums[2 * row + 1] += total;
      }
    }
  }

  void piece(int64_t image, int64_t begin, int64_t end, A* dasked) const {
    const int64_t e = sizes_.inner, dim = sizes_.dim;
    const Matrix<const A> asked{asked_ + image * rows_ * e, rows_, e, e};
    Buffer<A> delta(rows_), along(split_.tile);
    for (int64_t row = 0; row < rows_; ++row) {
      double sum = 0, total = 0;
      for (int64_t s = 0; s < split_.splits; ++s) {
        const double* part = sums_ + 2 * ((image * split_.splits + s) * rows_ + row);
        sum += part[0], total += part[1];
      }
      delta[row] = static_cast<A>(sum / total);
    }

    for (int64_t first = begin; first < end; first += split_.tile) {
      const int64_t count = std::min(split_.tile, end - first), token = image * sizes_.tokens + first;
      const Wide<T> y(static_cast<const T*>(args_.y) + token * e, count * e);
      const A *mean = static_cast<const A*>(args_.mean) + token, *rstd = static_cast<const A*>(args_.rstd) + token;
      A *probs = kept_scores(image, first), *ds = kept_dprobs(image, first, count);
      clear<A>(along, count);
      for (int64_t row = 0; row < rows_; ++row)
        scores_backward(softmax(image, row), delta[row], count, rstd, probs + row * count, ds + row * count, along);

      if (args_.dimage != nullptr) {
        const WideOut<T> dx(static_cast<T*>(args_.dimage) + token * dim, count * dim);
        gemm<A>(1, {probs, rows_, count, count, true}, dpooled(image), 0, {dx, count, dim, dim});
      }
      if (args_.dy != nullptr) {
        const WideOut<T> dy(static_cast<T*>(args_.dy) + token * e, count * e);
        gemm<A>(1, {ds, rows_, count, count, true}, asked, 0, {dy, count, e, e});
        for (int64_t n = 0; n < count; ++n) {
          const A factor = along[n] / static_cast<A>(e) * rstd[n] * rstd[n], center = mean[n];
          const A* row = y + n * e;
          A* out = dy + n * e;
#pragma omp simd
          for (int64_t i = 0; i < e; ++i) out[i] -= factor * (row[i] - center);
        }
      }
      gemm<A>(1, {ds, rows_, count, count}, {y, count, e, e}, first == begin ? 0 : 1, {dasked, rows_, e, e});
    }
  }

  const A* softmax(int64_t image, int64_t row) const {
    return static_cast<const A*>(args_.saved.softmax) + 2 * (image * rows_ + row);
  }

  // In: scores before rstd, and dP. Out: P, and dS rstd; `along` collects dS S of each token.
  static void scores_backward(const A* whole, A delta, int64_t count, const A* rstd, A* probs, A* ds, A* along) {
    const A top = whole[0], share = 1 / whole[1];
#pragma omp simd
    for (int64_t n = 0; n < count; ++n) {
      const A score = probs[n] * rstd[n];
      probs[n] = fast_exp(score - top) * share;
      const A d = probs[n] * (ds[n] - delta);
      along[n] += d * score;
      ds[n] = d * rstd[n];
    }
  }

  const EmbeddedQueryBackward& args_;
  const EmbeddedQuerySizes& sizes_;
  int64_t rows_;  // R*h, score rows of one image
  KeySplit split_;
  int64_t at_once_;  // images in work
  const Scores<T>& scores_;
  const A *asked_, *dpooled_;
  A* dasked_;
  Buffer<A> kept_;
  Buffer<double> sums_;
};

// Gradient of the weight blocks in expand_heads(x, weight): (h*from, to) from x (B*Q, h*from), d (B*Q, h, to).
template <class A>
void expand_heads_weight(const EmbeddedQuerySizes& sizes, const A* x, int64_t from, const A* d, int64_t to,
                         A* dweight) {
  const int64_t heads = sizes.heads, rows = sizes.rows();
  parallel_for(heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      gemm<A>(1, {x + h * from, rows, from, heads * from, true}, {d + h * to, rows, to, heads * to}, 0,
              {dweight + h * from * to, from, to, to});
  });
}

// Key projection and gain from the gradient of what absorb_keys() made of them, which is overwritten.
template <class T>
void absorb_keys_backward(const EmbeddedQueryBackward& args, const Acc<T>* weight, const Acc<T>* gain, Acc<T>* dkeys) {
  using A = Acc<T>;
  const EmbeddedQuerySizes& sizes = args.sizes;
  const int64_t e = sizes.inner;
  const A scale = A(1) / std::sqrt(static_cast<A>(sizes.head_dim()));
  const WideOut<T> dweight(args.dparams[kImageK], e * e), dgain(args.dparams[kNormImage], e);
  for_rows(e, e, [&](int64_t row) {
    A *d = dkeys + row * e, sum = 0;
    for (int64_t i = 0; i < e; ++i) sum += d[i];
    const A mean = sum / static_cast<A>(e);
    for (int64_t i = 0; i < e; ++i) {
      d[i] = (d[i] - mean) * scale;
      dweight[row * e + i] = d[i] * gain[i];
    }
  });
  clear<A>(dgain, e);
  for (int64_t row = 0; row < e; ++row)
    for (int64_t i = 0; i < e; ++i) dgain[i] += dkeys[row * e + i] * weight[row * e + i];
}

template <class T>
void zero(void* to, int64_t count) {
  if (to != nullptr) std::memset(to, 0, static_cast<size_t>(count) * sizeof(T));
}

// From dseen to dtold, by way of the image.
template <class T>
void read_backward(const EmbeddedQueryBackward& args, const Acc<T>* dseen, Acc<T>* dtold) {
  using A = Acc<T>;
  const EmbeddedQuerySizes& sizes = args.sizes;
  const int64_t rows = sizes.rows(), e = sizes.inner, dim = sizes.dim, heads = sizes.heads;
  const A *told = static_cast<const A*>(args.saved.told), *pooled = static_cast<const A*>(args.saved.pooled);
  const bool want_params = args.dparams[kImageV] != nullptr;

  const Wide<T> wq(args.params[kImageQ], e * e), bq(args.params[kImageQBias], e);
  const Wide<T> key(args.params[kImageK], e * e), gain(args.params[kNormImage], e);
  Buffer<A> keys(e * e), q(rows * e), dq(rows * e), dasked(rows * heads * e);
  absorb_keys<A>(sizes, key, gain, keys);
  linear<A>(told, rows, e, wq, bq, e, q);
  {
    const Wide<T> value(args.params[kImageV], dim * dim);
    Buffer<A> asked(rows * heads * e), dpooled(rows * heads * dim);
    expand_heads<A>(sizes, q, sizes.head_dim(), keys, e, asked);
    expand_heads<A>(sizes, dseen, sizes.value_dim(), value, dim, dpooled);
    const Scores<T> scores(sizes, args.y, q, keys, asked);
    ReaderBackward<T>(args, scores, asked, dpooled, dasked).run();
  }
  contract_heads<A>(sizes, dasked, e, keys, sizes.head_dim(), dq);
  linear_input<A>(dq, rows, e, wq, e, 0, dtold);
  if (!want_params) return;

  {
    const WideOut<T> dvalue(args.dparams[kImageV], dim * dim), dbias(args.dparams[kImageVBias], dim);
    expand_heads_weight<A>(sizes, dseen, sizes.value_dim(), pooled, dim, dvalue);
    column_sums<A>(dseen, rows, dim, 0, dbias);
  }
  expand_heads_weight<A>(sizes, q, sizes.head_dim(), dasked, e, keys);
  absorb_keys_backward<T>(args, key, gain, keys);
  const WideOut<T> dwq(args.dparams[kImageQ], e * e), dbq(args.dparams[kImageQBias], e);
  linear_weight<A>(dq, told, rows, e, e, 0, dwq, dbq);
}

template <class T>
void backward(const EmbeddedQueryBackward& args) {
  using A = Acc<T>;
  const EmbeddedQuerySizes& sizes = args.sizes;
  const int64_t rows = sizes.rows(), model = sizes.model, e = sizes.inner, dim = sizes.dim;
  const bool want_params = args.dparams[kUp] != nullptr;
  const TextSpans spans(sizes);
  const Wide<T> dout(args.dout, rows * model);

  // What no row reads has no gradient; the softmax sees neither the bias of the keys nor that of their norm.
  if (rows == 0 || sizes.tokens == 0) {
    zero<T>(args.dimage, sizes.images * sizes.tokens * dim);
    zero<T>(args.dy, sizes.images * sizes.tokens * e);
    zero<T>(args.dparams[kImageQ], e * e);
    zero<T>(args.dparams[kImageQBias], e);
    zero<T>(args.dparams[kImageK], e * e);
    zero<T>(args.dparams[kNormImage], e);
    zero<T>(args.dparams[kImageV], dim * dim);
    zero<T>(args.dparams[kImageVBias], dim);
  }
  zero<T>(args.dparams[kImageKBias], e);
  zero<T>(args.dparams[kNormImageBias], e);

  const A* seen = static_cast<const A*>(args.saved.seen);
  Buffer<A> dseen(rows * dim), dtold(rows * e), dhidden((rows + spans.count()) * e);
  {
    const Wide<T> up(args.params[kUp], model * dim);
    linear_input<A>(dout, rows, model, up, dim, 0, dseen);
    if (want_params) {
      const WideOut<T> dup(args.dparams[kUp], model * dim), dbias(args.dparams[kUpBias], model);
      linear_weight<A>(dout, seen, rows, model, dim, 0, dup, dbias);
    }
  }
  if (rows > 0 && sizes.tokens > 0) {
    read_backward<T>(args, dseen, dtold);
  } else {
    clear<A>(dtold, rows * e);
  }
  TextSide<T>(sizes, spans, args.params, static_cast<const A*>(args.saved.hidden))
      .backward(dtold, dhidden, args.dparams);

  const Wide<T> down(args.params[kDown], e * model);
  const A* dtext_hidden = dhidden + rows * e;
  if (want_params) {
    const Wide<T> query(args.query, rows * model);
    const TextRows<T> text(args.text, spans, sizes);
    const WideOut<T> ddown(args.dparams[kDown], e * model), dbias(args.dparams[kDownBias], e);
    linear_weight<A>(dhidden, query, rows, e, model, 0, ddown, dbias);
    linear_weight<A>(dtext_hidden, text, spans.count(), e, model, 1, ddown, dbias);
  }
  {
    const WideOut<T> dquery(args.dquery, rows * model);
    linear_input<A>(dhidden, rows, e, down, model, 0, dquery);
    for_rows(rows, model, [&](int64_t row) { axpy<A, A>(1, dout + row * model, dquery + row * model, model); });
  }
  // Rows of padding between those of questions have no gradient.
  Buffer<A> packed(spans.count() * model);
  linear_input<A>(dtext_hidden, spans.count(), e, down, model, 0, packed);
  for_rows(sizes.batch, sizes.text * model, [&](int64_t b) {
    T* to = static_cast<T*>(args.dtext) + b * sizes.text * model;
    narrow<T>(packed + spans.first(b) * model, to, spans.length(b) * model);
    zero<T>(to + spans.length(b) * model, (sizes.text - spans.length(b)) * model);
  });
}

}  // namespace

void embedded_query_backward(const EmbeddedQueryBackward& args) {
  with_type(args.sizes.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
