// The text side of embedded-query attention: the queries read the question. Shared by forward and backward.
#pragma once

#include "embedded_query_parts.h"

namespace flashsloth::cpu {
namespace {  // not shared between files, see types.h

// Which rows of text are no padding: of question b the `length(b)` that follow packed row `first(b)`.
class TextSpans {
 public:
  explicit TextSpans(const EmbeddedQuerySizes& sizes) : sizes_(sizes), first_(sizes.batch + 1) {
    first_[0] = 0;
    for (int64_t b = 0; b < sizes.batch; ++b)
      first_[b + 1] = first_[b] + (sizes.text_lengths ? sizes.text_lengths[b] : sizes.text);
  }
  int64_t first(int64_t b) const { return first_[b]; }
  int64_t length(int64_t b) const { return first_[b + 1] - first_[b]; }
  int64_t count() const { return first_[sizes_.batch]; }
  bool padded() const { return count() < sizes_.batch * sizes_.text; }
  int64_t longest() const {
    int64_t most = 0;
    for (int64_t b = 0; b < sizes_.batch; ++b) most = std::max(most, length(b));
    return most;
  }

 private:
  EmbeddedQuerySizes sizes_;
  Buffer<int64_t> first_;
};

// The text rows that are no padding, widened: the input itself where it is that already.
template <class T>
class TextRows {
 public:
  using A = Acc<T>;
  TextRows(const void* text, const TextSpans& spans, const EmbeddedQuerySizes& sizes)
      : copy_(kSame && !spans.padded() ? 0 : spans.count() * sizes.model), data_(copy_) {
    const int64_t width = sizes.model;
    if (kSame && !spans.padded()) {
      data_ = static_cast<const A*>(text);
      return;
    }
    for_rows(sizes.batch, sizes.text * width, [&](int64_t b) {
      widen(static_cast<const T*>(text) + b * sizes.text * width, copy_ + spans.first(b) * width,
            spans.length(b) * width);
    });
  }
  operator const A*() const { return data_; }

 private:
  static constexpr bool kSame = std::is_same_v<T, A>;
  Buffer<A> copy_;
  const A* data_;
};

// The queries read the question: attention of normalised query rows to normalised text rows, from `hidden`. The bias
// of the keys shifts all scores of a row alike, so the softmax does not see it and it is not added.
template <class T>
class TextSide {
 public:
  using A = Acc<T>;
  TextSide(const EmbeddedQuerySizes& sizes, const TextSpans& spans, const void* const* params, const A* hidden)
      : sizes_(sizes),
        spans_(spans),
        wq_(params[kTextQ], sizes.inner * sizes.inner),
        wk_(params[kTextK], sizes.inner * sizes.inner),
        wv_(params[kTextV], sizes.inner * sizes.inner),
        bq_(params[kTextQBias], sizes.inner),
        bv_(params[kTextVBias], sizes.inner),
        gain_q_(params[kNormQuery], sizes.inner),
        bias_q_(params[kNormQueryBias], sizes.inner),
        gain_t_(params[kNormText], sizes.inner),
        bias_t_(params[kNormTextBias], sizes.inner),
        norm_q_(hidden, sizes.rows(), sizes.inner, gain_q_, bias_q_, sizes.eps),
        norm_t_(hidden + sizes.rows() * sizes.inner, spans.count(), sizes.inner, gain_t_, bias_t_, sizes.eps),
        q_(sizes.rows() * sizes.inner),
        k_(spans.count() * sizes.inner),
        v_(spans.count() * sizes.inner) {
    const int64_t e = sizes.inner;
    linear<A>(norm_q_.out(), sizes.rows(), e, wq_, bq_, e, q_);
    linear<A>(norm_t_.out(), spans.count(), e, wk_, nullptr, e, k_);
    linear<A>(norm_t_.out(), spans.count(), e, wv_, bv_, e, v_);
  }

  // told (B*Q, E)
  void forward(A* told) const {
    each_head([&](int64_t b, int64_t column, A* probs, A*) {
      if (spans_.length(b) == 0) return fill(told, b, column);
      attend(b, column, probs);
      gemm<A>(1, square(probs, b), text(v_, b, column), 0, writable(query(told, b, column)));
    });
  }

  // Gradients of `hidden` from those of told, written over `dhidden`; of the parameters of this side unless null.
  void backward(const A* dtold, A* dhidden, void* const* dparams) const {
    const int64_t e = sizes_.inner, queries = sizes_.queries, rows = sizes_.rows(), texts = spans_.count();
    Buffer<A> dq(rows * e), dk(texts * e), dv(texts * e);
    if (rows == 0) {  // no head of any question writes them
      clear<A>(dk, texts * e);
      clear<A>(dv, texts * e);
    }
    each_head([&](int64_t b, int64_t column, A* probs, A* ds) {
      const int64_t length = spans_.length(b);
      if (length == 0) return fill(dq, b, column);
      attend(b, column, probs);
      gemm<A>(1, query(dtold, b, column), transposed(text(v_, b, column)), 0, writable(square(ds, b)));
      gemm<A>(1, transposed(square(probs, b)), query(dtold, b, column), 0, writable(text(dv, b, column)));
      for (int64_t row = 0; row < queries; ++row) {
        A *d = ds + row * length, *p = probs + row * length;
        const A mean = dot(p, d, length);
        for (int64_t j = 0; j < length; ++j) d[j] = p[j] * (d[j] - mean) * scale();
      }
      gemm<A>(1, square(ds, b), text(k_, b, column), 0, writable(query(dq, b, column)));
      gemm<A>(1, transposed(square(ds, b)), query(q_, b, column), 0, writable(text(dk, b, column)));
    });

    A* dtext = dhidden + rows * e;
    linear_input<A>(dq, rows, e, wq_, e, 0, dhidden);
    linear_input<A>(dk, texts, e, wk_, e, 0, dtext);
    linear_input<A>(dv, texts, e, wv_, e, 1, dtext);
    if (dparams[kTextQ] == nullptr) {
      norm_q_.backward(dhidden, nullptr, nullptr);
      norm_t_.backward(dtext, nullptr, nullptr);
      return;
    }
    WideOut<T> dwq(dparams[kTextQ], e * e), dwk(dparams[kTextK], e * e), dwv(dparams[kTextV], e * e);
    WideOut<T> dbq(dparams[kTextQBias], e), dbk(dparams[kTextKBias], e), dbv(dparams[kTextVBias], e);
    WideOut<T> dgain_q(dparams[kNormQuery], e), dbias_q(dparams[kNormQueryBias], e);
    WideOut<T> dgain_t(dparams[kNormText], e), dbias_t(dparams[kNormTextBias], e);
    linear_weight<A>(dq, norm_q_.out(), rows, e, e, 0, dwq, dbq);
    linear_weight<A>(dk, norm_t_.out(), texts, e, e, 0, dwk, dbk);
    linear_weight<A>(dv, norm_t_.out(), texts, e, e, 0, dwv, dbv);
    clear<A>(dbk, e);  // exactly zero: the sums above are its rounding
    norm_q_.backward(dhidden, dgain_q, dbias_q);
    norm_t_.backward(dtext, dgain_t, dbias_t);
  }

 private:
  A scale() const { return A(1) / std::sqrt(static_cast<A>(sizes_.head_dim())); }

  // body(b, first column of a head, two rooms for probabilities) for every question and head.
  template <class F>
  void each_head(F&& body) const {
    const int64_t heads = sizes_.heads, room = sizes_.queries * spans_.longest();
    if (sizes_.queries == 0) return;
    parallel_for(sizes_.batch * heads, 1, [&](int64_t begin, int64_t end) {
      Buffer<A> probs(room), gradient(room);
      for (int64_t i = begin; i < end; ++i) body(i / heads, i % heads * sizes_.head_dim(), probs, gradient);
    });
  }

  // Operands of one head: its columns of the query rows and text rows of question b, and the weights between them.
  Matrix<const A> query(const A* x, int64_t b, int64_t column) const {
    return {x + b * sizes_.queries * sizes_.inner + column, sizes_.queries, sizes_.head_dim(), sizes_.inner};
  }
  Matrix<const A> text(const A* x, int64_t b, int64_t column) const {
    return {x + spans_.first(b) * sizes_.inner + column, spans_.length(b), sizes_.head_dim(), sizes_.inner};
  }
  Matrix<const A> square(const A* x, int64_t b) const {
    return {x, sizes_.queries, spans_.length(b), spans_.length(b)};
  }
  static Matrix<A> writable(Matrix<const A> m) { return {const_cast<A*>(m.data), m.rows, m.cols, m.stride}; }
  static Matrix<const A> transposed(Matrix<const A> m) { return {m.data, m.rows, m.cols, m.stride, true}; }

  void fill(A* x, int64_t b, int64_t column) const {
    const Matrix<A> m = writable(query(x, b, column));
    for (int64_t row = 0; row < m.rows; ++row) clear<A>(m.data + row * m.stride, m.cols);
  }

  void attend(int64_t b, int64_t column, A* probs) const {
    const int64_t length = spans_.length(b);
    gemm<A>(scale(), query(q_, b, column), transposed(text(k_, b, column)), 0, writable(square(probs, b)));
    for (int64_t row = 0; row < sizes_.queries; ++row) {
      A *p = probs + row * length, peak = -INFINITY, total = 0;
      for (int64_t j = 0; j < length; ++j) peak = std::max(peak, p[j]);
      for (int64_t j = 0; j < length; ++j) total += p[j] = fast_exp(p[j] - peak);
      for (int64_t j = 0; j < length; ++j) p[j] /= total;
    }
  }

  EmbeddedQuerySizes sizes_;
  const TextSpans& spans_;
  Wide<T> wq_, wk_, wv_, bq_, bv_, gain_q_, bias_q_, gain_t_, bias_t_;
  LayerNorm<A> norm_q_, norm_t_;
  Buffer<A> q_, k_, v_;
};

}  // namespace
}  // namespace flashsloth::cpu
