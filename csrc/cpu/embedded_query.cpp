// Embedded-query attention on a CPU: the image's state and the forward pass.
//
// A few query rows, R a head, read many image tokens. So instead of the tokens the queries are projected (absorbed):
//
//   score = (q Wk gamma, centred) . y_n * rstd_n,   pooled = softmax(score) image,   seen = pooled Wv' + bv,
//
// for R*h rows of E and of Di numbers; keys and values are never formed. Where many questions share an image, R*h
// exceeds E or Di and forming them, a tile at a time, is the lesser work; then that is done. Tokens are taken in tiles
// with a running maximum (flash attention), so memory does not grow with their number.
#include "embedded_query.h"

#include "embedded_query_parts.h"
#include "embedded_query_text.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {

constexpr int64_t kStateRows = 512;  // fewer, larger products: each copies the whole weight once more

template <class T>
void state(const ImageState& args) {
  using A = Acc<T>;
  const int64_t dim = args.dim, inner = args.inner;
  if (args.rows == 0) return;
  const Wide<T> weight(args.weight, inner * dim), bias(args.bias, inner);
  A *mean = static_cast<A*>(args.mean), *rstd = static_cast<A*>(args.rstd);

  // As many tiles as make the threads' shares equal.
  const int64_t rounds = divide_up(args.rows, num_threads() * kStateRows);
  const int64_t rows = divide_up(args.rows, rounds * num_threads());
  parallel_for(divide_up(args.rows, rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * rows, count = std::min(rows, args.rows - first);
      const Wide<T> image(static_cast<const T*>(args.image) + first * dim, count * dim);
      const WideOut<T> y(static_cast<T*>(args.y) + first * inner, count * inner);
      linear<A>(image, count, dim, weight, bias, inner, y);
      for (int64_t row = 0; row < count; ++row) {
        A* out = y + row * inner;
        for (int64_t i = 0; i < inner; ++i) out[i] = load(store<T>(out[i]));  // statistics of what is stored
        row_statistics<A>(out, inner, args.eps, mean + first + row, rstd + first + row);
      }
    }
  });
}

// The queries read the image.
template <class T>
class Reader {
 public:
  using A = Acc<T>;
  // q (B*Q, E): what the queries ask of the image. `softmax` may be null.
  Reader(const EmbeddedQueryForward& args, const A* q, A* seen, A* pooled, A* softmax)
      : args_(args),
        sizes_(args.sizes),
        rows_(sizes_.image_rows() * sizes_.heads),
        absorb_values_(args.save || rows_ < sizes_.dim),
        split_(sizes_),
        seen_(seen),
        result_(absorb_values_ ? pooled : seen),
        width_(absorb_values_ ? sizes_.dim : sizes_.value_dim()),
        softmax_(softmax),
        keys_(sizes_.inner * sizes_.inner),
        asked_(Scores<T>::absorbs(sizes_) ? sizes_.rows() * sizes_.heads * sizes_.inner : 0),
        scores_(sizes_, args.y, q, keys_, asked_),
        values_(args.params[kImageV], sizes_.dim * sizes_.dim) {
    const Wide<T> key(args.params[kImageK], sizes_.inner * sizes_.inner), gain(args.params[kNormImage], sizes_.inner);
    absorb_keys<A>(sizes_, key, gain, keys_);
    if (Scores<T>::absorbs(sizes_)) expand_heads<A>(sizes_, q, sizes_.head_dim(), keys_, sizes_.inner, asked_);
  }

  // Numbers that `pooled` must hold.
  static int64_t pooled_size(const EmbeddedQueryForward& args) {
    const EmbeddedQuerySizes& s = args.sizes;
    return args.save || s.image_rows() * s.heads < s.dim ? s.rows() * s.heads * s.dim : 0;
  }

  void read() const {
    const int64_t partial = split_.splits == 1 ? 0 : sizes_.images * split_.splits * rows_;
    Buffer<A> sums(partial * width_), peak(std::max(partial, sizes_.images * rows_)),
        total(std::max(partial, sizes_.images * rows_));
    split_.each(sizes_, 0, sizes_.images, [&](int64_t image, int64_t split, int64_t begin, int64_t end) {
      const int64_t first = (image * split_.splits + split) * rows_;
      piece(image, begin, end, (split_.splits == 1 ? result_ : static_cast<A*>(sums)) + first * width_, peak + first,
            total + first);
    });
    merge(sums, peak, total);
    if (absorb_values_) contract_heads<A>(sizes_, result_, sizes_.dim, values_, sizes_.value_dim(), seen_);
    const Wide<T> bias(args_.params[kImageVBias], sizes_.dim);
    for_rows(sizes_.rows(), sizes_.dim,
             [&](int64_t row) { axpy<A, A>(1, bias, seen_ + row * sizes_.dim, sizes_.dim); });
  }

  // Attention averaged over heads, from `softmax`.
  void weights(A* out) const {
    const int64_t heads = sizes_.heads, tokens = sizes_.tokens, questions = sizes_.image_rows();
    split_.each(sizes_, 0, sizes_.images, [&](int64_t image, int64_t, int64_t begin, int64_t end) {
      Buffer<A> room(scores_.room(split_.tile)), scores(rows_ * split_.tile);
      for (int64_t first = begin; first < end; first += split_.tile) {
        const int64_t count = std::min(split_.tile, end - first);
        scores_.tile(image, first, count, room, scores);
        const A* rstd = static_cast<const A*>(args_.rstd) + image * tokens + first;
        for (int64_t row = 0; row < questions; ++row) {
          A* sum = out + (image * questions + row) * tokens + first;
          clear<A>(sum, count);
          for (int64_t h = 0; h < heads; ++h) {
            const A* score = scores + (row * heads + h) * count;
            const A* whole = softmax_ + 2 * (image * rows_ + row * heads + h);
            const A top = whole[0], share = 1 / (whole[1] * static_cast<A>(heads));
#pragma omp simd
            for (int64_t n = 0; n < count; ++n) sum[n] += fast_exp(score[n] * rstd[n] - top) * share;
          }
        }
      }
    });
  }

 private:
  // sums = exp(score - peak) values over tokens [begin, end) of an image, total = sum exp(score - peak).
  void piece(int64_t image, int64_t begin, int64_t end, A* sums, A* peak, A* total) const {
    const int64_t dim = sizes_.dim, heads = sizes_.heads, tokens = sizes_.tokens, queries = sizes_.image_rows();
    const int64_t d = sizes_.value_dim();
    Buffer<A> room(scores_.room(split_.tile)), scores(rows_ * split_.tile);
    Buffer<A> formed(absorb_values_ ? 0 : split_.tile * dim);
    std::fill_n(peak, rows_, -INFINITY);
    clear<A>(total, rows_);
    for (int64_t first = begin; first < end; first += split_.tile) {
      const int64_t count = std::min(split_.tile, end - first);
      const A beta = first == begin ? 0 : 1;
      scores_.tile(image, first, count, room, scores);
      const A* rstd = static_cast<const A*>(args_.rstd) + image * tokens + first;
      for (int64_t row = 0; row < rows_; ++row)
        accumulate(scores + row * count, rstd, count, peak + row, total + row,
                   beta == 0 ? nullptr : sums + row * width_);

      const Wide<T> x(static_cast<const T*>(args_.image) + (image * tokens + first) * dim, count * dim);
      if (absorb_values_) {
        gemm<A>(1, {scores, rows_, count, count}, {x, count, dim, dim}, beta, {sums, rows_, dim, dim});
        continue;
      }
      gemm<A>(1, {x, count, dim, dim}, {values_, dim, dim, dim, true}, 0, {formed, count, dim, dim});
      for (int64_t h = 0; h < heads; ++h)
        gemm<A>(1, {scores + h * count, queries, count, heads * count}, {formed + h * d, count, d, dim}, beta,
                {sums + h * d, queries, d, dim});
    }
  }

  // Scores of a row to exp(score - peak); what was summed under a lower peak is scaled to the new one.
  void accumulate(A* score, const A* rstd, int64_t count, A* peak, A* total, A* sums) const {
    A highest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t n = 0; n < count; ++n) {
      score[n] *= rstd[n];
      highest = std::max(highest, score[n]);
    }
    if (highest > *peak) {
      const A factor = fast_exp(*peak - highest);
      for (int64_t i = 0; sums != nullptr && i < width_; ++i) sums[i] *= factor;
      *total *= factor;
      *peak = highest;
    }
    const A top = *peak;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < count; ++n) sum += score[n] = fast_exp(score[n] - top);
    *total += sum;
  }

  // Pieces of an image into one, divided by the softmax's denominator.
  void merge(const A* sums, const A* peak, const A* total) const {
    const int64_t splits = split_.splits;
    for_rows(sizes_.images * rows_, width_ * splits, [&](int64_t row) {
      const int64_t image = row / rows_, first = image * splits * rows_ + row % rows_;
      A top = -INFINITY, all = 0;
      for (int64_t s = 0; s < splits; ++s) top = std::max(top, peak[first + s * rows_]);
      for (int64_t s = 0; s < splits; ++s) all += fast_exp(peak[first + s * rows_] - top) * total[first + s * rows_];
      if (softmax_ != nullptr) softmax_[2 * row] = top, softmax_[2 * row + 1] = all;
      A* out = result_ + row * width_;
      if (splits == 1) {
        for (int64_t i = 0; i < width_; ++i) out[i] /= all;
        return;
      }
      clear<A>(out, width_);
      for (int64_t s = 0; s < splits; ++s)
        axpy(fast_exp(peak[first + s * rows_] - top) / all, sums + (first + s * rows_) * width_, out, width_);
    });
  }

  const EmbeddedQueryForward& args_;
  const EmbeddedQuerySizes& sizes_;
  int64_t rows_;  // R*h, score rows of one image
  bool absorb_values_;
  KeySplit split_;
  A *seen_, *result_;  // result_: pooled, or seen itself where values are formed
  int64_t width_;
  A* softmax_;
  Buffer<A> keys_, asked_;
  Scores<T> scores_;
  Wide<T> values_;
};

template <class T>
void forward(const EmbeddedQueryForward& args) {
  using A = Acc<T>;
  const EmbeddedQuerySizes& sizes = args.sizes;
  const int64_t rows = sizes.rows(), model = sizes.model, e = sizes.inner, dim = sizes.dim;
  if (rows == 0) {
    if (args.save) clear<A>(static_cast<A*>(args.saved.hidden), sizes.batch * sizes.text * e);
    return;
  }

  const TextSpans spans(sizes);
  const int64_t hidden_size = (rows + spans.count()) * e, pooled_size = Reader<T>::pooled_size(args);
  Buffer<A> hidden_room(args.save ? 0 : hidden_size), told_room(args.save ? 0 : rows * e);
  Buffer<A> pooled_room(args.save ? 0 : pooled_size), seen_room(args.save ? 0 : rows * dim);
  Buffer<A> softmax_room(args.save || args.weights == nullptr ? 0 : 2 * rows * sizes.heads), q(rows * e);
  const auto pick = [&](void* saved, A* room) { return args.save ? static_cast<A*>(saved) : room; };
  A *hidden = pick(args.saved.hidden, hidden_room), *told = pick(args.saved.told, told_room);
  A *pooled = pick(args.saved.pooled, pooled_room), *seen = pick(args.saved.seen, seen_room);
  A* softmax = pick(args.saved.softmax, args.weights == nullptr ? nullptr : static_cast<A*>(softmax_room));

  const Wide<T> query(args.query, rows * model);
  {
    const Wide<T> down(args.params[kDown], e * model), bias(args.params[kDownBias], e);
    const TextRows<T> text(args.text, spans, sizes);
    linear<A>(query, rows, model, down, bias, e, hidden);
    linear<A>(text, spans.count(), model, down, bias, e, hidden + rows * e);
    if (args.save) clear<A>(hidden + hidden_size, (sizes.batch * sizes.text - spans.count()) * e);
  }
  TextSide<T>(sizes, spans, args.params, hidden).forward(told);
  {
    const Wide<T> weight(args.params[kImageQ], e * e), bias(args.params[kImageQBias], e);
    linear<A>(told, rows, e, weight, bias, e, q);
  }
  if (sizes.tokens == 0) {  // nothing to see, not even the bias of the values
    if (args.save) clear<A>(pooled, pooled_size);
    if (args.save) clear<A>(softmax, 2 * rows * sizes.heads);
    clear<A>(seen, rows * dim);
  } else {
    const Reader<T> reader(args, q, seen, pooled, softmax);
    reader.read();
    if (args.weights != nullptr) reader.weights(static_cast<A*>(args.weights));
  }

  const Wide<T> up(args.params[kUp], model * dim), bias(args.params[kUpBias], model);
  const WideOut<T> out(args.out, rows * model);
  linear<A>(seen, rows, dim, up, bias, model, out);
  for_rows(rows, model, [&](int64_t row) { axpy<A, A>(1, query + row * model, out + row * model, model); });
}

}  // namespace

void image_state(const ImageState& args) {
  with_type(args.dtype, [&](auto* type) { state<std::remove_pointer_t<decltype(type)>>(args); });
}
void embedded_query_forward(const EmbeddedQueryForward& args) {
  with_type(args.sizes.dtype, [&](auto* type) { forward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
