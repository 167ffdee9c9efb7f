// Embedded-query attention, forward: what the kernels assume, and which of them run. Each is launched over the tail of
// the one before, and has its weights on their way while it waits.
#include <algorithm>
#include <string>

#include "embedded_query.h"
#include "embedded_query_image.cuh"
#include "embedded_query_output.cuh"
#include "embedded_query_rows.cuh"
#include "embedded_query_text.cuh"
#include "launch.cuh"

namespace flashsloth::cuda {

using namespace query;

namespace {

constexpr int64_t kLargest = 0x7FFFFFFF;
constexpr int kFewRows = 160;  // from here on rows of text fill tiles of 64

void expect(bool fits, const char* op, const char* argument, const std::string& expected, int64_t got) {
  if (!fits)
    throw std::runtime_error(std::string(op) + ": " + argument + ": expected " + expected + ", got " +
                             std::to_string(got));
}

void check_common(const char* op, DType dtype, int64_t dim, int64_t inner) {
  if (dtype != DType::bfloat16 && dtype != DType::float16)
    throw std::runtime_error(std::string(op) + ": the CUDA kernels serve bfloat16 and float16");
  const int capability = device().compute_capability;
  expect(capability >= 80, op, "GPU", "compute capability 8.0 or more (80)", capability);
  const auto size = [&](const char* argument, int64_t got) {
    expect(got > 0 && got % 8 == 0 && got <= kLargest / 2, op, argument, "a multiple of 8 in the CUDA kernels", got);
  };
  size("Di", dim);
  size("E", inner);
}

void check(const ImageState& args) {
  check_common("image_state", args.dtype, args.dim, args.inner);
  expect(args.rows <= 65535 * 64, "image_state", "image", "tokens in all to " + std::to_string(65535 * 64), args.rows);
}

void check(const EmbeddedQueryForward& args) {
  const char* const op = "embedded_query";
  check_common(op, args.dtype, args.dim, args.inner);
  expect(args.model > 0 && args.model % 8 == 0 && args.model <= kLargest / 2, op, "Dm",
         "a multiple of 8 in the CUDA kernels", args.model);
  expect(args.inner / args.heads <= kMaxHeadDim, op, "num_heads", "E / heads to " + std::to_string(kMaxHeadDim),
         args.inner / args.heads);
  expect(args.batch <= 65535, op, "query", "batches to 65535", args.batch);
  expect(args.batch * args.queries <= 65535, op, "query", "rows in all to 65535", args.batch * args.queries);
  expect(args.batch * args.queries * args.heads <= 65535 * 32, op, "num_heads",
         "attention rows in all to " + std::to_string(65535 * 32), args.batch * args.queries * args.heads);
  expect(args.batch * (args.queries + args.text) <= 65535 * 64, op, "text",
         "rows in all to " + std::to_string(65535 * 64), args.batch * (args.queries + args.text));
  expect(args.images * args.tokens <= kLargest, op, "image", "tokens in all to 2147483647", args.images * args.tokens);
}

// Hands out scratch memory. Without a base it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class A>
  A* take(int64_t count) {
    A* const at = reinterpret_cast<A*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(A)) + 255) / 256 * 256;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// One kernel after another: all but the first overlap the one before.
class Chain {
 public:
  explicit Chain(cudaStream_t stream) : stream_(stream) {}

  template <class P>
  void run(const char* name, void (*kernel)(P), dim3 grid, int threads, size_t shared_bytes, const P& params,
           dim3 cluster = {1, 1, 1}) {
    Launch launch{grid, dim3(threads), shared_bytes, stream_, cluster};
    launch.overlap_previous = overlap_;
    launch_kernel(name, kernel, launch, params);
    overlap_ = true;
  }

  void clear(void* memory, int64_t bytes) {
    if (memory == nullptr || bytes == 0) return;
    if (const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, stream_)) {
      cudaGetLastError();
      throw std::runtime_error(std::string("embedded_query: cudaMemsetAsync failed: ") + cudaGetErrorString(error));
    }
    overlap_ = false;
  }

 private:
  cudaStream_t stream_;
  bool overlap_ = false;
};

// ---- The image ----

template <class T>
StateParams<T> params(const ImageState& args, Scratch& scratch) {
  const int rows = static_cast<int>(args.rows), inner = static_cast<int>(args.inner);
  return {rows,
          static_cast<int>(args.dim),
          inner,
          static_cast<float>(args.eps),
          static_cast<const T*>(args.image),
          static_cast<const T*>(args.weight),
          static_cast<const T*>(args.bias),
          static_cast<T*>(args.y),
          args.mean,
          args.rstd,
          scratch.take<float2>(args.rows * divide_up(inner, kPartColumns))};
}

template <class T>
void run(const ImageState& args, void* memory, cudaStream_t stream) {
  Scratch scratch(memory);
  const StateParams<T> p = params<T>(args, scratch);
  Chain chain(stream);
  const int blocks = divide_up(p.inner, StateTile<T>::kColumns);
  if (runs_sm90a() && blocks <= StateTile<T>::kMostBlocks) {
    chain.run("image_state_cluster_kernel", image_state_cluster_kernel<T>,
              dim3(blocks, divide_up(p.rows, StateTile<T>::kRows)), StateTile<T>::kThreads, StateTile<T>::kSharedBytes,
              p, dim3(blocks));
    return;
  }
  using Tile = RowsTile<T>;
  chain.run("image_state_project_kernel", image_state_project_kernel<T>,
            dim3(divide_up(p.inner, Tile::kColumns), divide_up(p.rows, Tile::kRows)), Tile::kThreads,
            Tile::kSharedBytes, p);
  chain.run("image_state_statistics_kernel", image_state_statistics_kernel<T>,
            dim3(divide_up(p.rows, kStatisticsThreads / 2)), kStatisticsThreads, 0, p);
}

// ---- The queries ----

template <class T>
QueryParams<T> params(const EmbeddedQueryForward& args, Scratch& scratch) {
  QueryParams<T> p{};
  p.batch = static_cast<int>(args.batch);
  p.queries = static_cast<int>(args.queries);
  p.text = static_cast<int>(args.text);
  p.model = static_cast<int>(args.model);
  p.images = static_cast<int>(args.images);
  p.tokens = static_cast<int>(args.tokens);
  p.dim = static_cast<int>(args.dim);
  p.inner = static_cast<int>(args.inner);
  p.heads = static_cast<int>(args.heads);
  p.eps = static_cast<float>(args.eps);
  p.text_lengths = args.text_lengths;
  p.query = static_cast<const T*>(args.query);
  p.text_rows = static_cast<const T*>(args.text_rows);
  p.image = static_cast<const T*>(args.image);
  p.y = static_cast<const T*>(args.y);
  p.rstd = args.rstd;
  for (int i = 0; i < kEmbeddedQueryParams; ++i) p.params[i] = static_cast<const T*>(args.params[i]);
  p.out = static_cast<T*>(args.out);
  p.weights = args.weights;
  p.hidden = args.hidden;
  p.told = args.told;
  p.pooled = args.pooled;
  p.seen = args.seen;

  const int64_t rows = args.batch * args.queries, heads = rows * args.heads, all = p.all_rows();
  p.hidden_rows = scratch.take<T>(all * args.inner);
  p.parts = scratch.take<float2>(all * divide_up(p.inner, kPartColumns));
  p.told_rows = scratch.take<T>(rows * args.inner);
  p.asked = scratch.take<T>(heads * args.inner);
  p.probs = scratch.take<T>(heads * p.tiles() * kKeyTile);
  p.peaks = scratch.take<float2>(heads * p.tiles());
  p.pooled_rows = scratch.take<T>(heads * args.dim);
  p.seen_rows = scratch.take<T>(rows * args.dim);
  float2* const softmax = scratch.take<float2>(heads);
  p.softmax = args.softmax != nullptr ? reinterpret_cast<float2*>(args.softmax) : softmax;
  return p;
}

template <class T>
void read_text(Chain& chain, const QueryParams<T>& p) {
  using Cluster = RowsClusterTile<T>;
  if (p.all_rows() <= 2 * Cluster::kRows && runs_sm90a()) {
    chain.run("embedded_query_rows_cluster_kernel", embedded_query_rows_cluster_kernel<T>,
              dim3(Cluster::kParts, divide_up(p.inner, Cluster::kColumns), divide_up(p.all_rows(), Cluster::kRows)),
              Cluster::kThreads, Cluster::kSharedBytes, p, dim3(Cluster::kParts));
  } else if (p.all_rows() <= kFewRows) {
    using Gemm = RowsGemm<T>;
    chain.run("embedded_query_rows_kernel", embedded_query_rows_kernel<T>,
              dim3(divide_up(p.inner, Gemm::kColumns), divide_up(p.all_rows(), Gemm::kRows)), Gemm::kThreads,
              Gemm::kSharedBytes, p);
  } else {
    using Tile = RowsTile<T>;
    chain.run("embedded_query_many_rows_kernel", embedded_query_many_rows_kernel<T>,
              dim3(divide_up(p.inner, Tile::kColumns), divide_up(p.all_rows(), Tile::kRows)), Tile::kThreads,
              Tile::kSharedBytes, p);
  }
  chain.run("embedded_query_text_kernel", embedded_query_text_kernel<T>,
            dim3(p.heads, p.batch, divide_up(p.queries, TextTile::kQueries)), TextTile::kThreads,
            TextTile::shared_bytes(p.head_dim()), p);
}

template <class T>
void read_image(Chain& chain, const QueryParams<T>& p) {
  const int row_tiles = divide_up(p.rows(), 16);
  chain.run("embedded_query_asked_kernel", embedded_query_asked_kernel<T>, dim3(p.heads, row_tiles),
            AskedTile<T>::kThreads, AskedTile<T>::kSharedBytes, p);
  chain.run("embedded_query_scores_kernel", embedded_query_scores_kernel<T>,
            dim3(p.tiles(), divide_up(p.image_rows(), ScoresTile<T>::kRows), p.images), ScoresTile<T>::kThreads,
            ScoresTile<T>::kSharedBytes, p);
  using Pooled = PooledTile<T>;
  chain.run("embedded_query_pooled_kernel", embedded_query_pooled_kernel<T>,
            dim3(divide_up(p.dim, Pooled::kColumns), divide_up(p.image_rows(), Pooled::kRows), p.images),
            Pooled::kThreads, Pooled::kSharedBytes, p);
  using Values = OutputGemm<T>;
  chain.run("embedded_query_values_kernel", embedded_query_values_kernel<T>,
            dim3(p.heads, divide_up(p.value_dim(), Values::kColumns), row_tiles), Values::kThreads,
            Values::kSharedBytes, p);
}

template <class T>
void run(const EmbeddedQueryForward& args, void* memory, cudaStream_t stream) {
  Scratch scratch(memory);
  const QueryParams<T> p = params<T>(args, scratch);
  Chain chain(stream);
  if (p.rows() == 0) {
    chain.clear(p.hidden, 4 * static_cast<int64_t>(p.all_rows()) * p.inner);
    return;
  }
  const int64_t rows = p.rows(), heads = rows * p.heads;
  if (p.tokens > 0) {
    read_text(chain, p);
    read_image(chain, p);
  } else {  // nothing to see, not even the bias of the values
    if (p.hidden != nullptr) read_text(chain, p);
    chain.clear(p.pooled, 4 * heads * p.dim);
    chain.clear(args.softmax, 8 * heads);
    chain.clear(p.seen, 4 * rows * p.dim);
    chain.clear(p.seen_rows, static_cast<int64_t>(sizeof(T)) * rows * p.dim);
  }
  using Up = OutputGemm<T>;
  chain.run("embedded_query_up_kernel", embedded_query_up_kernel<T>,
            dim3(divide_up(p.model, Up::kColumns), divide_up(p.rows(), Up::kRows)), Up::kThreads, Up::kSharedBytes, p);
  if (p.weights != nullptr && p.tokens > 0)
    chain.run("embedded_query_weights_kernel", embedded_query_weights_kernel<T>, dim3(p.tiles(), p.rows()), kKeyTile, 0,
              p);
}

}  // namespace

int64_t image_state_scratch(const ImageState& args) {
  check(args);
  Scratch scratch(nullptr);
  params<bf16>(args, scratch);
  return scratch.used();
}

void image_state(const ImageState& args, void* scratch, cudaStream_t stream) {
  check(args);
  if (args.rows == 0) return;
  args.dtype == DType::bfloat16 ? run<bf16>(args, scratch, stream) : run<fp16>(args, scratch, stream);
}

int64_t embedded_query_scratch(const EmbeddedQueryForward& args) {
  check(args);
  Scratch scratch(nullptr);
  params<bf16>(args, scratch);
  return scratch.used();
}

void embedded_query_forward(const EmbeddedQueryForward& args, void* scratch, cudaStream_t stream) {
  check(args);
  if (args.batch == 0) return;
  args.dtype == DType::bfloat16 ? run<bf16>(args, scratch, stream) : run<fp16>(args, scratch, stream);
}

}  // namespace flashsloth::cuda
