// Gradients of attention over the tokens that are kept, on a CPU.
//
//   P = exp(scale q k' - lse),  delta = rowsum(dout * out) - dlse,  dS = P * (dout v' - delta),
//   dq = scale dS k,  dk = scale dS' q,  dv = P' dout.
//
// An item is (sequence, key/value head, a range of keys). It gathers its queries once, then goes through its keys a
// tile at a time: dk and dv of the tile are complete when it leaves it, dq grows in the order of the tiles. Only when
// there are fewer heads than threads are keys split, and the partial sums of dq are then added in order. No atomics.
#include "sparse_prefill.h"
#include "sparse_prefill_rows.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {

template <class T>
class BackwardWorker {
  using A = Acc<T>;

 public:
  BackwardWorker(const SparsePrefillBackward& args, const Plan& plan, int64_t longest, int64_t tile_keys)
      : args_(args),
        plan_(plan),
        dim_(plan.shape.dim),
        tile_keys_(tile_keys),
        memory_(2 * Scratch::padded<A>(longest * dim_) + 2 * Scratch::padded<A>(longest) +
                4 * Scratch::padded<A>(tile_keys_ * dim_) + 2 * Scratch::padded<A>(kQueryTile * tile_keys_)),
        query_(memory_.take<A>(longest * dim_)),
        dout_(memory_.take<A>(longest * dim_)),
        lse_(memory_.take<A>(longest)),
        delta_(memory_.take<A>(longest)),
        key_room_(memory_.take<A>(tile_keys_ * dim_)),
        value_room_(memory_.take<A>(tile_keys_ * dim_)),
        dkey_(memory_.take<A>(tile_keys_ * dim_)),
        dvalue_(memory_.take<A>(tile_keys_ * dim_)),
        prob_(memory_.take<A>(kQueryTile * tile_keys_)),
        dscore_(memory_.take<A>(kQueryTile * tile_keys_)) {}

  // Keys first .. first + count of a sequence; dq / scale of the whole list of its queries goes to `dquery`.
  void operator()(int64_t sequence, int64_t kv_head, int64_t first, int64_t count, A* dquery) {
    const AttentionShape& shape = plan_.shape;
    const int64_t rows = plan_.list_length(sequence);
    std::fill_n(dquery, rows * dim_, A(0));
    for (int64_t i = 0; i < rows; ++i) load_query(sequence, kv_head, i);
    for (int64_t start = first; start < first + count; start += tile_keys_) {
      const int64_t keys = std::min(tile_keys_, first + count - start);
      const auto k = key_tile<T>(plan_, args_.k, shape.k_strides, sequence, kv_head, start, keys, rows, key_room_);
      const auto v = key_tile<T>(plan_, args_.v, shape.v_strides, sequence, kv_head, start, keys, rows, value_room_);
      std::fill_n(dkey_, keys * dim_, A(0));
      std::fill_n(dvalue_, keys * dim_, A(0));
      for (int64_t top = 0; top < rows; top += kQueryTile)
        tile(sequence, top, std::min(kQueryTile, rows - top), start, keys, k, v, dquery);
      for (int64_t j = 0; j < keys; ++j) {
        narrow<T>(dkey_ + j * dim_, key_row(args_.dk, args_.dk_strides, sequence, kv_head, start + j), dim_);
        narrow<T>(dvalue_ + j * dim_, key_row(args_.dv, args_.dv_strides, sequence, kv_head, start + j), dim_);
      }
    }
  }

 private:
  int64_t visible(int64_t sequence, int64_t i) const { return plan_.visible[plan_.list_entry(sequence, i)]; }

  T* key_row(void* tensor, const RowStrides& strides, int64_t sequence, int64_t kv_head, int64_t j) const {
    return static_cast<T*>(tensor) + plan_.batch_item(sequence) * strides.batch + kv_head * strides.head +
           plan_.keys.row(sequence, j) * strides.row;
  }

  void load_query(int64_t sequence, int64_t kv_head, int64_t i) {
    const AttentionShape& shape = plan_.shape;
    const T* q = plan_.list_row(static_cast<const T*>(args_.q), shape.q_strides, sequence, kv_head, i);
    const T* out = plan_.list_row(static_cast<const T*>(args_.out), shape.out_strides, sequence, kv_head, i);
    const T* dout = plan_.list_row(static_cast<const T*>(args_.dout), args_.dout_strides, sequence, kv_head, i);
    const A scale = static_cast<A>(shape.scale);
    A *query = query_ + i * dim_, *gradient = dout_ + i * dim_;
#pragma omp simd
    for (int64_t d = 0; d < dim_; ++d) query[d] = scale * load(q[d]);
    widen(dout, gradient, dim_);
    const auto scalar = [&](const void* tensor) {
      return *plan_.list_row(static_cast<const A*>(tensor), shape.lse_strides, sequence, kv_head, i);
    };
    lse_[i] = scalar(args_.lse);
    delta_[i] = dot(out, gradient, dim_) - (args_.dlse != nullptr ? scalar(args_.dlse) : A(0));
  }

  void tile(int64_t sequence, int64_t top, int64_t rows, int64_t start, int64_t keys, const Matrix<const A>& k,
            const Matrix<const A>& v, A* dquery) {
    int64_t reach = 0;
    for (int64_t i = top; i < top + rows; ++i) reach = std::max(reach, visible(sequence, i) - start);
    reach = std::min(reach, keys);
    if (reach <= 0) return;
    const Matrix<const A> query{query_ + top * dim_, rows, dim_, dim_}, dout{dout_ + top * dim_, rows, dim_, dim_};
    gemm<A>(1, query, head_of(k, reach, true), 0, {prob_, rows, reach, reach});
    gemm<A>(1, dout, head_of(v, reach, true), 0, {dscore_, rows, reach, reach});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = std::clamp<int64_t>(visible(sequence, top + i) - start, 0, reach);
      const A lse = lse_[top + i], delta = delta_[top + i];
      A *prob = prob_ + i * reach, *dscore = dscore_ + i * reach;
#pragma omp simd
      for (int64_t j = 0; j < seen; ++j) {
        prob[j] = fast_exp(prob[j] - lse);
        dscore[j] = prob[j] * (dscore[j] - delta);
      }
      std::fill(prob + seen, prob + reach, A(0));
      std::fill(dscore + seen, dscore + reach, A(0));
    }
    const Matrix<const A> prob{prob_, rows, reach, reach, true}, dscore{dscore_, rows, reach, reach};
    gemm<A>(1, prob, dout, 1, {dvalue_, reach, dim_, dim_});
    gemm<A>(1, {dscore_, rows, reach, reach, true}, query, 1, {dkey_, reach, dim_, dim_});
    gemm<A>(1, dscore, head_of(k, reach), 1, {dquery + top * dim_, rows, dim_, dim_});
  }

  const SparsePrefillBackward& args_;
  const Plan& plan_;
  int64_t dim_, tile_keys_;
  Scratch memory_;
  A *query_, *dout_, *lse_, *delta_, *key_room_, *value_room_, *dkey_, *dvalue_, *prob_, *dscore_;
};

template <class T>
void store_dq(const SparsePrefillBackward& args, const Plan& plan, int64_t sequence, int64_t kv_head, int64_t i,
              const Acc<T>* dquery) {
  const Acc<T> scale = static_cast<Acc<T>>(plan.shape.scale);
  T* to = plan.list_row(static_cast<T*>(args.dq), args.dq_strides, sequence, kv_head, i);
#pragma omp simd
  for (int64_t d = 0; d < plan.shape.dim; ++d) to[d] = store<T>(scale * dquery[d]);
}

template <class T>
void backward(const SparsePrefillBackward& args) {
  using A = Acc<T>;
  const AttentionShape& shape = args.shape;
  const Plan plan(shape);
  const int64_t sequences = shape.sequences, kv_heads = shape.kv_heads, dim = shape.dim;
  const int64_t items = shape.packed ? 1 : sequences;
  fill_rows_not_kept(plan.queries, static_cast<T*>(args.dq), args.dq_strides, items, shape.heads, shape.q_rows, dim,
                     T());
  fill_rows_not_kept(plan.keys, static_cast<T*>(args.dk), args.dk_strides, items, kv_heads, shape.k_rows, dim, T());
  fill_rows_not_kept(plan.keys, static_cast<T*>(args.dv), args.dv_strides, items, kv_heads, shape.k_rows, dim, T());

  int64_t longest = 0, most_keys = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    longest = std::max(longest, plan.list_length(s));
    most_keys = std::max(most_keys, plan.keys.count(s));
  }
  const int64_t lists = sequences * kv_heads;
  if (lists == 0) return;
  const int64_t wanted = divide_up(3 * num_threads(), lists);  // splits, to give every thread some items
  const int64_t tile = std::clamp<int64_t>(divide_up(divide_up(most_keys, wanted), 64) * 64, 64, largest_key_tile(dim));
  const int64_t tiles = std::max<int64_t>(divide_up(most_keys, tile), 1);
  const int64_t keys_per_split = divide_up(tiles, std::min(wanted, tiles)) * tile;
  const int64_t splits = std::max<int64_t>(divide_up(most_keys, keys_per_split), 1);
  const bool shared = splits > 1;

  Scratch partial(shared ? Scratch::padded<A>(lists * splits * longest * dim) : 0);
  A* const dquery = partial.take<A>(0);
  for_items(lists * splits, [&] {
    return [&, worker = BackwardWorker<T>(args, plan, longest, tile),
            own = Scratch(shared ? 0 : Scratch::padded<A>(longest * dim))](int64_t item) mutable {
      const int64_t s = item / splits / kv_heads, head = item / splits % kv_heads;
      own.rewind();
      A* to = shared ? dquery + item * longest * dim : own.take<A>(longest * dim);
      const int64_t first = std::min(item % splits * keys_per_split, plan.keys.count(s));
      worker(s, head, first, std::min(keys_per_split, plan.keys.count(s) - first), to);
      for (int64_t i = 0; !shared && i < plan.list_length(s); ++i) store_dq<T>(args, plan, s, head, i, to + i * dim);
    };
  });
  if (!shared) return;
  parallel_for(lists * longest, 16, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t list = n / longest, i = n % longest;
      if (i >= plan.list_length(list / kv_heads)) continue;
      A* sum = dquery + (list * splits * longest + i) * dim;
      for (int64_t part = 1; part < splits; ++part) axpy(A(1), sum + part * longest * dim, sum, dim);
      store_dq<T>(args, plan, list / kv_heads, list % kv_heads, i, sum);
    }
  });
}

}  // namespace

void sparse_prefill_backward(const SparsePrefillBackward& args) {
  with_type(args.shape.dtype, [&](auto* type) { backward<std::remove_pointer_t<decltype(type)>>(args); });
}

}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
