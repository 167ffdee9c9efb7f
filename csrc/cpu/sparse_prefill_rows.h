// What the forward and backward pass of sparse_prefill share: which rows take part, and tiles of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "gemm.h"
#include "math.h"
#include "sparse_prefill.h"

namespace flashsloth::cpu::FLASHSLOTH_ISA {
namespace {  // not shared between files, see types.h

// Tall enough for the matrix product to reach its speed, though half of a causal tile's diagonal part is wasted.
constexpr int64_t kQueryTile = 128;

// Keys and values of a tile, and its scores, stay in L2.
inline int64_t largest_key_tile(int64_t dim) { return dim <= 128 ? 512 : 256; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The entries of a TokenRows that can be trusted: in range, ascending, each row once.
class KeptRows {
 public:
  KeptRows(const TokenRows& index, int64_t sequences, int64_t length, bool packed, int64_t first_position)
      : all_(index.cu_seqlens == nullptr),
        length_(length),
        first_position_(first_position),
        memory_(Scratch::padded<int64_t>(sequences + 1) +
                (all_ ? 0
                      : 2 * Scratch::padded<int64_t>(index.capacity) +
                            Scratch::padded<uint8_t>(packed ? length : sequences * length))),
        begin_(memory_.take<int64_t>(sequences + 1)) {
    begin_[0] = 0;
    if (all_) {
      for (int64_t s = 0; s < sequences; ++s) begin_[s + 1] = begin_[s] + length;
      return;
    }
    rows_ = memory_.take<int64_t>(index.capacity);
    positions_ = memory_.take<int64_t>(index.capacity);
    kept_ = memory_.take<uint8_t>(packed ? length : sequences * length);
    std::fill_n(kept_, packed ? length : sequences * length, uint8_t(0));
    int64_t count = 0, bound = 0;
    for (int64_t s = 0; s < sequences; ++s) {
      uint8_t* kept = kept_ + (packed ? 0 : s * length);
      const int64_t first = std::clamp<int64_t>(index.cu_seqlens[s], bound, index.capacity);
      bound = std::clamp<int64_t>(index.cu_seqlens[s + 1], first, index.capacity);
      int64_t last = -1;
      for (int64_t e = first; e < bound; ++e) {
        const int64_t row = index.indices[e];
        if (row <= last || row >= length || kept[row]) continue;
        kept[row] = 1;
        rows_[count] = last = row;
        positions_[count++] = index.positions != nullptr ? index.positions[e] : row;
      }
      begin_[s + 1] = count;
    }
  }

  bool all() const { return all_; }
  int64_t begin(int64_t s) const { return begin_[s]; }  // entries of all sequences are numbered through
  int64_t count(int64_t s) const { return begin_[s + 1] - begin_[s]; }
  int64_t row(int64_t s, int64_t i) const { return all_ ? i : rows_[begin_[s] + i]; }
  int64_t position(int64_t s, int64_t i) const { return all_ ? first_position_ + i : positions_[begin_[s] + i]; }
  bool is_run(int64_t s, int64_t i, int64_t n) const { return row(s, i + n - 1) - row(s, i) == n - 1; }
  bool kept(int64_t item, int64_t row) const { return all_ || kept_[item * length_ + row]; }

  // Entries of a sequence up to and including a position: what a query there may attend to.
  int64_t visible(int64_t s, int64_t position_) const {
    int64_t low = 0, high = count(s);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position(s, middle) <= position_)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  // Entry of a sequence that is this row, or -1.
  int64_t find(int64_t s, int64_t wanted) const {
    int64_t low = 0, high = count(s);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (row(s, middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low < count(s) && row(s, low) == wanted ? low : -1;
  }

 private:
  bool all_;
  int64_t length_, first_position_;
  Scratch memory_;
  int64_t* begin_;
  int64_t *rows_ = nullptr, *positions_ = nullptr;
  uint8_t* kept_ = nullptr;
};

// Queries, keys, and how many keys each query attends to: a prefix of its sequence's list, positions being ascending.
struct Plan {
  explicit Plan(const AttentionShape& s)
      : shape(s),
        group(s.kv_heads > 0 ? s.heads / s.kv_heads : 0),
        queries(s.q_index, s.sequences, s.q_rows, s.packed, s.k_rows - s.q_rows),
        keys(s.k_index, s.sequences, s.k_rows, s.packed, 0),
        memory(Scratch::padded<int64_t>(queries.begin(s.sequences))),
        visible(memory.take<int64_t>(queries.begin(s.sequences))) {
    for (int64_t q = 0; q < s.sequences; ++q)
      for (int64_t i = 0; i < queries.count(q); ++i)
        visible[queries.begin(q) + i] = s.causal ? keys.visible(q, queries.position(q, i)) : keys.count(q);
  }
  int64_t batch_item(int64_t sequence) const { return shape.packed ? 0 : sequence; }

  // The queries of a sequence that share a key/value head are one list: entry by entry, heads of the group inside,
  // so a tile of it has one key tile and a tight causal bound.
  int64_t list_length(int64_t sequence) const { return queries.count(sequence) * group; }
  int64_t list_entry(int64_t sequence, int64_t i) const { return queries.begin(sequence) + i / group; }
  template <class T>
  T* list_row(T* tensor, const RowStrides& strides, int64_t sequence, int64_t kv_head, int64_t i) const {
    return tensor + batch_item(sequence) * strides.batch + (kv_head * group + i % group) * strides.head +
           queries.row(sequence, i / group) * strides.row;
  }

  AttentionShape shape;
  int64_t group;
  KeptRows queries, keys;
  Scratch memory;
  int64_t* visible;
};

// Runs make_worker() once a thread and calls what it returns with item numbers until none are left. Dynamic, because
// causal items differ in cost; a result depends on its item alone, not on the thread that computes it.
template <class F>
void for_items(int64_t items, F&& make_worker) {
  int64_t next = 0;
  parallel_for(std::min<int64_t>(items, num_threads()), 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    auto worker = make_worker();
    for (int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); i < items;
         i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED))
      worker(i);
  });
}

// Keys or values first .. first + count of a sequence and head, for products with `queries` rows: in place where they
// lie as a matrix of the type of the arithmetic, else gathered and widened into `room`. With gaps between its rows a
// matrix makes slow products, so it stays in place for few queries only.
template <class T>
Matrix<const Acc<T>> key_tile(const Plan& plan, const void* tensor, const RowStrides& strides, int64_t sequence,
                              int64_t kv_head, int64_t first, int64_t count, int64_t queries, Acc<T>* room) {
  const int64_t dim = plan.shape.dim;
  const T* base = static_cast<const T*>(tensor) + plan.batch_item(sequence) * strides.batch + kv_head * strides.head;
  if constexpr (std::is_same_v<T, Acc<T>>) {
    const bool as_fast = strides.row == dim || (strides.row > dim && queries < 16);
    if (as_fast && plan.keys.is_run(sequence, first, count))
      return {base + plan.keys.row(sequence, first) * strides.row, count, dim, strides.row};
  }
  for (int64_t j = 0; j < count; ++j)
    widen(base + plan.keys.row(sequence, first + j) * strides.row, room + j * dim, dim);
  return {room, count, dim, dim};
}

// The first rows of a tile.
template <class A>
Matrix<const A> head_of(Matrix<const A> tile, int64_t rows, bool transposed = false) {
  tile.rows = rows;
  tile.transposed = transposed;
  return tile;
}

// Sets the rows that take no part to a value.
template <class T>
void fill_rows_not_kept(const KeptRows& rows, T* tensor, const RowStrides& strides, int64_t items, int64_t heads,
                        int64_t length, int64_t dim, T value) {
  if (rows.all()) return;
  parallel_for(items * length, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (rows.kept(i / length, i % length)) continue;
      T* row = tensor + i / length * strides.batch + i % length * strides.row;
      for (int64_t h = 0; h < heads; ++h) std::fill_n(row + h * strides.head, dim, value);
    }
  });
}

}  // namespace
}  // namespace flashsloth::cpu::FLASHSLOTH_ISA
