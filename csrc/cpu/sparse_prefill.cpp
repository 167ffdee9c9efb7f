// Attention over the tokens that are kept, on a CPU.
//
// The idea: a work item is a block of queries that share a key/value head. It goes through the kept keys a tile at a
// time; the tile is gathered once (or used in place), and every query tile of the block takes its product with it,
// an online softmax in place, and a second product into its accumulator. Positions ascend, so what a query may attend
// to is a prefix of the list of keys: masks are lengths, and tiles beyond the longest prefix are never touched.
#include "sparse_prefill.h"

#include "sparse_prefill_rows.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {

constexpr int64_t kQueryBlock = 512;  // queries that share a gathered key tile; their accumulators stay in L2
// The largest of some values and `highest`. By hand in lanes, because compilers vectorise a maximum only where they may
// ignore NaN. A NaN is passed over here and comes back in the sum.
template <class A>
A maximum(const A* value, int64_t count, A highest) {
  constexpr int64_t kLanes = 32;
  A lane[kLanes];
  std::fill_n(lane, kLanes, highest);
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] = value[j + l] > lane[l] ? value[j + l] : lane[l];
  for (; j < count; ++j) lane[0] = value[j] > lane[0] ? value[j] : lane[0];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
  return lane[0];
}

// Scores of one query to its probabilities, in place, relative to the running peak. Returns what earlier sums scale by.
template <class A>
A softmax_row(A* score, int64_t visible, int64_t count, A& peak, A& total) {
  if (visible > 0) {
    const A highest = maximum(score, visible, peak);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < visible; ++j) {
      score[j] = fast_exp(score[j] - highest);
      sum += score[j];
    }
    const A factor = highest == peak ? A(1) : fast_exp(peak - highest);
    total = total * factor + sum;
    peak = highest;
    std::fill(score + visible, score + count, A(0));
    return factor;
  }
  std::fill_n(score, count, A(0));
  return 1;
}

template <class A, class T>
void scaled_row(const T* from, A scale, A* to, int64_t count) {
#pragma omp simd
  for (int64_t d = 0; d < count; ++d) to[d] = scale * load(from[d]);
}

// One block of queries at a time, with the scratch memory for it.
template <class T>
class ForwardWorker {
  using A = Acc<T>;

 public:
  ForwardWorker(const SparsePrefillForward& args, const Plan& plan, int64_t block)
      : args_(args),
        plan_(plan),
        dim_(plan.shape.dim),
        tile_keys_(largest_key_tile(dim_)),
        memory_(2 * Scratch::padded<A>(block * dim_) + 2 * Scratch::padded<A>(block) +
                2 * Scratch::padded<A>(tile_keys_ * dim_) + Scratch::padded<A>(kQueryTile * tile_keys_)),
        query_(memory_.take<A>(block * dim_)),
        sum_(memory_.take<A>(block * dim_)),
        peak_(memory_.take<A>(block)),
        total_(memory_.take<A>(block)),
        key_room_(memory_.take<A>(tile_keys_ * dim_)),
        value_room_(memory_.take<A>(tile_keys_ * dim_)),
        score_(memory_.take<A>(kQueryTile * tile_keys_)) {}

  // Queries first .. first + rows of a sequence's list (Plan::list_length).
  void operator()(int64_t sequence, int64_t kv_head, int64_t first, int64_t rows) {
    const AttentionShape& shape = plan_.shape;
    int64_t reach = 0;
    for (int64_t i = 0; i < rows; ++i) {
      scaled_row(plan_.list_row(static_cast<const T*>(args_.q), shape.q_strides, sequence, kv_head, first + i),
                 static_cast<A>(shape.scale), query_ + i * dim_, dim_);
      peak_[i] = -INFINITY;
      total_[i] = 0;
      reach = std::max(reach, visible(sequence, first + i));
    }
    for (int64_t start = 0; start < reach; start += tile_keys_) {
      const int64_t count = std::min(tile_keys_, reach - start);
      const auto keys = key_tile<T>(plan_, args_.k, shape.k_strides, sequence, kv_head, start, count, rows, key_room_);
      const auto values =
          key_tile<T>(plan_, args_.v, shape.v_strides, sequence, kv_head, start, count, rows, value_room_);
      for (int64_t top = 0; top < rows; top += kQueryTile)
        tile(sequence, first, top, std::min(kQueryTile, rows - top), start, count, keys, values);
    }
    for (int64_t i = 0; i < rows; ++i) finish(sequence, kv_head, first, i);
  }

 private:
  int64_t visible(int64_t sequence, int64_t i) const { return plan_.visible[plan_.list_entry(sequence, i)]; }

  void tile(int64_t sequence, int64_t first, int64_t top, int64_t rows, int64_t start, int64_t count,
            const Matrix<const A>& keys, const Matrix<const A>& values) {
    int64_t reach = 0;
    for (int64_t i = top; i < top + rows; ++i) reach = std::max(reach, visible(sequence, first + i) - start);
    reach = std::min(reach, count);
    if (reach <= 0) return;
    A* sum = sum_ + top * dim_;
    gemm<A>(1, {query_ + top * dim_, rows, dim_, dim_}, head_of(keys, reach, true), 0, {score_, rows, reach, reach});
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t seen = std::clamp<int64_t>(visible(sequence, first + top + i) - start, 0, reach);
      const A factor = softmax_row(score_ + i * reach, seen, reach, peak_[top + i], total_[top + i]);
      if (start > 0 && factor != 1)
        for (int64_t d = 0; d < dim_; ++d) sum[i * dim_ + d] *= factor;
    }
    gemm<A>(1, {score_, rows, reach, reach}, head_of(values, reach), start > 0, {sum, rows, dim_, dim_});
  }

  void finish(int64_t sequence, int64_t kv_head, int64_t first, int64_t i) {
    const AttentionShape& shape = plan_.shape;
    T* out = plan_.list_row(static_cast<T*>(args_.out), shape.out_strides, sequence, kv_head, first + i);
    A* lse = plan_.list_row(static_cast<A*>(args_.lse), shape.lse_strides, sequence, kv_head, first + i);
    if (visible(sequence, first + i) == 0) {
      std::fill_n(out, dim_, T());
      *lse = -INFINITY;
      return;
    }
    const A inverse = 1 / total_[i], *sum = sum_ + i * dim_;
#pragma omp simd
    for (int64_t d = 0; d < dim_; ++d) out[d] = store<T>(sum[d] * inverse);
    *lse = peak_[i] + std::log(total_[i]);
  }

  const SparsePrefillForward& args_;
  const Plan& plan_;
  int64_t dim_, tile_keys_;
  Scratch memory_;
  A *query_, *sum_, *peak_, *total_, *key_room_, *value_room_, *score_;
};

// Blocks of queries of all sequences and heads as one list of items, the longest (under causality the last) first.
template <class T>
void attend(const SparsePrefillForward& args, const Plan& plan) {
  const AttentionShape& shape = plan.shape;
  int64_t lists = 0;
  for (int64_t s = 0; s < shape.sequences; ++s) lists += plan.list_length(s) * shape.kv_heads;
  // Large blocks share gathered keys, several blocks a thread share the work evenly.
  const int64_t even = divide_up(divide_up(lists, 4 * num_threads()), kQueryTile) * kQueryTile;
  const int64_t block = std::clamp(even, kQueryTile, kQueryBlock);

  Scratch memory(Scratch::padded<int64_t>(shape.sequences + 1));
  int64_t* first_block = memory.take<int64_t>(shape.sequences + 1);
  first_block[0] = 0;
  for (int64_t s = 0; s < shape.sequences; ++s)
    first_block[s + 1] = first_block[s] + divide_up(plan.list_length(s), block);
  const int64_t blocks = first_block[shape.sequences];

  for_items(blocks * shape.kv_heads, [&] {
    return [&, worker = ForwardWorker<T>(args, plan, block)](int64_t item) mutable {
      const int64_t which = blocks - 1 - item / shape.kv_heads;
      int64_t s = 0;
      while (first_block[s + 1] <= which) ++s;
      const int64_t first = (which - first_block[s]) * block;
      worker(s, item % shape.kv_heads, first, std::min(block, plan.list_length(s) - first));
    };
  });
}

// The attention that keys receive from a few queries, once their log-sum-exp is known. Items are (sequence, key/value
// head); each sums over its queries, and a last step takes the mean over heads, in a fixed order.
template <class T>
void importance(const SparsePrefillForward& args, const Plan& plan) {
  using A = Acc<T>;
  const AttentionShape& shape = plan.shape;
  const int64_t sequences = shape.sequences, heads = shape.kv_heads, group = plan.group, dim = shape.dim;
  A* result = static_cast<A*>(args.importance);
  std::fill_n(result, (shape.packed ? 1 : sequences) * shape.k_rows, A(0));

  // Which entries of each sequence are listed; what is not kept there is ignored.
  Scratch lists(Scratch::padded<int64_t>(sequences * args.listed) + Scratch::padded<int64_t>(sequences) +
                Scratch::padded<A>(plan.keys.begin(sequences) * heads));
  int64_t *entries = lists.take<int64_t>(sequences * args.listed), *counts = lists.take<int64_t>(sequences);
  A* received = lists.take<A>(plan.keys.begin(sequences) * heads);  // (sequence, head, key)
  for (int64_t s = 0; s < sequences; ++s) {
    counts[s] = 0;
    for (int64_t r = 0; r < args.listed; ++r) {
      const int64_t entry =
          plan.queries.find(s, args.importance_rows[args.listed_per_sequence ? s * args.listed + r : r]);
      if (entry >= 0) entries[s * args.listed + counts[s]++] = entry;
    }
  }

  const int64_t tile_keys = largest_key_tile(dim);
  for_items(sequences * heads, [&] {
    return [&, memory = Scratch(Scratch::padded<A>(tile_keys * dim) + Scratch::padded<A>(kQueryTile * dim) +
                                Scratch::padded<A>(kQueryTile * tile_keys))](int64_t item) mutable {
      memory.rewind();
      A *room = memory.take<A>(tile_keys * dim), *query = memory.take<A>(kQueryTile * dim);
      A* score = memory.take<A>(kQueryTile * tile_keys);
      const int64_t s = item / heads, head = item % heads, all = plan.keys.count(s), queries = counts[s] * group;
      const int64_t* listed = entries + s * args.listed;
      const auto list_index = [&](int64_t i) { return listed[i / group] * group + i % group; };
      A* sum = received + plan.keys.begin(s) * heads + head * all;
      std::fill_n(sum, all, A(0));
      if (queries == 0) return;
      for (int64_t start = 0; start < all; start += tile_keys) {
        const int64_t count = std::min(tile_keys, all - start);
        const auto keys = key_tile<T>(plan, args.k, shape.k_strides, s, head, start, count, queries, room);
        for (int64_t top = 0; top < queries; top += kQueryTile) {
          const int64_t rows = std::min(kQueryTile, queries - top);
          for (int64_t i = 0; i < rows; ++i)
            scaled_row(plan.list_row(static_cast<const T*>(args.q), shape.q_strides, s, head, list_index(top + i)),
                       static_cast<A>(shape.scale), query + i * dim, dim);
          gemm<A>(1, {query, rows, dim, dim}, head_of(keys, count, true), 0, {score, rows, count, count});
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = list_index(top + i), visible = plan.visible[plan.list_entry(s, at)];
            const A lse = *plan.list_row(static_cast<A*>(args.lse), shape.lse_strides, s, head, at);
            const A* row = score + i * count;
            const int64_t seen = std::clamp<int64_t>(visible - start, 0, count);
#pragma omp simd
            for (int64_t j = 0; j < seen; ++j) sum[start + j] += fast_exp(row[j] - lse);
          }
        }
      }
    };
  });

  for (int64_t s = 0; s < sequences; ++s) {
    if (counts[s] == 0) continue;
    const int64_t all = plan.keys.count(s);
    const A mean = A(1) / static_cast<A>(counts[s] * shape.heads), *sum = received + plan.keys.begin(s) * heads;
    parallel_for(all, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t h = 1; h < heads; ++h) axpy(A(1), sum + h * all + begin, const_cast<A*>(sum) + begin, end - begin);
      for (int64_t j = begin; j < end; ++j)
        result[plan.batch_item(s) * shape.k_rows + plan.keys.row(s, j)] = mean * sum[j];
    });
  }
}

}  // namespace

void sparse_prefill_forward(const SparsePrefillForward& args) {
  with_type(args.shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const AttentionShape& shape = args.shape;
    const Plan plan(shape);
    const int64_t items = shape.packed ? 1 : shape.sequences;
    fill_rows_not_kept(plan.queries, static_cast<T*>(args.out), shape.out_strides, items, shape.heads, shape.q_rows,
                       shape.dim, T());
    fill_rows_not_kept(plan.queries, static_cast<Acc<T>*>(args.lse), shape.lse_strides, items, shape.heads,
                       shape.q_rows, 1, Acc<T>(-INFINITY));
    attend<T>(args, plan);
    if (args.importance != nullptr) importance<T>(args, plan);
  });
}

}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
