// Spatial attention pooling, forward: what the kernels assume, and which of them run.
#include <algorithm>
#include <string>

#include "launch.cuh"
#include "spatial_pool.h"
#include "spatial_pool_sm80.cuh"
#include "spatial_pool_sm90.cuh"
#include "tensor_map.cuh"

namespace flashsloth::cuda {
namespace {

void expect(bool fits, const char* argument, const std::string& expected, int64_t got) {
  if (!fits)
    throw std::runtime_error(std::string("spatial_pool: ") + argument + ": expected " + expected + ", got " +
                             std::to_string(got));
}

void check(const SpatialPoolForward& args) {
  constexpr int64_t kLargest = 0x7FFFFFFF;
  if (args.dtype != DType::bfloat16 && args.dtype != DType::float16)
    throw std::runtime_error("spatial_pool: x: the CUDA kernels serve bfloat16 and float16");
  const int capability = device().compute_capability;
  expect(capability >= 80, "GPU", "compute capability 8.0 or more (80)", capability);
  expect(args.dim <= 65535 * kWindowColumns, "x", "D to " + std::to_string(65535 * kWindowColumns), args.dim);
  expect(args.hidden <= 65535 * ScoresTile::kUnits, "w1", "Dh to " + std::to_string(65535 * ScoresTile::kUnits),
         args.hidden);
  expect(args.images <= kLargest, "x", "images to 2147483647", args.images);
  expect(args.windows <= kLargest, "num_windows", "2147483647 in all images together", args.windows);
  expect(args.height <= kLargest && args.width <= kLargest, "grid", "sides to 2147483647",
         std::max(args.height, args.width));
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
PoolParams<T> params(const SpatialPoolForward& args, float* scratch) {
  // A window larger than every grid is the whole of it. Packed grids are known on the device only.
  const int64_t height = args.grids ? args.tokens : args.height, width = args.grids ? args.tokens : args.width;
  constexpr int64_t kLargest = 0x7FFFFFFF;
  PoolParams<T> p{};
  p.tokens = args.tokens;
  p.windows = static_cast<int>(args.windows);
  p.dim = static_cast<int>(args.dim);
  p.hidden = static_cast<int>(args.hidden);
  p.mask_words = (p.hidden + 31) / 32;
  p.images = static_cast<int>(args.images);
  p.height = static_cast<int>(args.height);
  p.width = static_cast<int>(args.width);
  p.window_height = static_cast<int>(std::min({args.window_height, std::max<int64_t>(height, 1), kLargest}));
  p.window_width = static_cast<int>(std::min({args.window_width, std::max<int64_t>(width, 1), kLargest}));
  p.window_columns = (p.width - 1) / p.window_width + 1;
  p.image_windows = ((p.height - 1) / p.window_height + 1) * p.window_columns;
  p.grids = args.grids;
  p.x = static_cast<const T*>(args.x);
  p.w1 = static_cast<const T*>(args.w1);
  p.b1 = static_cast<const T*>(args.b1);
  p.w2 = static_cast<const T*>(args.w2);
  p.seed = args.seed;
  p.drop_below = static_cast<uint32_t>(args.dropout_p * 4294967296.0);
  p.keep_scale = static_cast<float>(1.0 / (1.0 - args.dropout_p));
  p.y = static_cast<T*>(args.y);
  p.weights = args.weights;
  p.mask = args.mask;
  p.partial = scratch;
  return p;
}

int parts(int64_t hidden) { return static_cast<int>((hidden + ScoresTile::kUnits - 1) / ScoresTile::kUnits); }

template <class T, bool Vector>
void two_kernels(const PoolParams<T>& p, cudaStream_t stream) {
  if (p.hidden > 0) {
    const unsigned blocks = static_cast<unsigned>((p.tokens + ScoresTile::kTokens - 1) / ScoresTile::kTokens);
    launch_kernel("spatial_pool_scores_kernel", spatial_pool_scores_kernel<T, Vector>,
                  {dim3(blocks, parts(p.hidden)), dim3(ScoresTile::kThreads), ScoresTile::kSharedBytes, stream}, p);
  }
  if (p.windows == 0) return;
  const int warps = kWindowsThreads / 32;
  Launch launch{dim3((p.windows - 1) / warps + 1, std::max((p.dim + kWindowColumns - 1) / kWindowColumns, 1)),
                dim3(kWindowsThreads), 0, stream};
  launch.overlap_previous = p.hidden > 0;
  launch_kernel("spatial_pool_windows_kernel", spatial_pool_windows_kernel<T, Vector>, launch, p, parts(p.hidden));
}

template <class T, int Units, int Groups>
void one_kernel(PoolParams<T> p, cudaStream_t stream) {
  using Tile = ClusterTile<Units, Groups>;
  const uint64_t row_bytes = sizeof(T) * static_cast<uint64_t>(p.dim);
  const uint64_t dim = p.dim, tokens = p.tokens, hidden = p.hidden;
  const uint32_t depth = Tile::kDepth, row = p.window_width;
  const CUtensorMap x = tensor_map<T, 2>(p.x, {dim, tokens}, {row_bytes}, {depth, row}, Swizzle::bytes128);
  const CUtensorMap w1 = tensor_map<T, 2>(p.w1, {dim, hidden}, {row_bytes}, {depth, Units}, Swizzle::bytes128);
  p.tile_windows = Tile::kTokens / (p.window_height * p.window_width);
  const int tiles = (p.windows - 1) / p.tile_windows + 1;
  launch_kernel("spatial_pool_cluster_kernel", spatial_pool_cluster_kernel<T, Units, Groups>,
                {dim3(Tile::kBlocks * tiles), dim3(Tile::kThreads), Tile::kSharedBytes, stream, dim3(Tile::kBlocks)}, p,
                x, w1);
}

// The tile that computes the fewest units for nothing; and the larger one, which reads w1 half as often, once smaller
// ones would not all run at once.
template <class T>
void one_kernel(const PoolParams<T>& p, cudaStream_t stream) {
  const auto computed = [&](int units) { return (p.hidden + 8 * units - 1) / (8 * units) * units; };
  const int per_tile = 64 / (p.window_height * p.window_width);
  const bool large = per_tile == 0 || 8 * ((p.windows - 1) / per_tile + 1) > device().multiprocessors;
  if (computed(96) < computed(144)) {
    large ? one_kernel<T, 96, 2>(p, stream) : one_kernel<T, 96, 1>(p, stream);
  } else {
    large ? one_kernel<T, 144, 2>(p, stream) : one_kernel<T, 144, 1>(p, stream);
  }
}

bool vectors(const SpatialPoolForward& args) {
  return args.dim % 8 == 0 && aligned(args.x) && aligned(args.w1) && aligned(args.y);
}

// What the cluster kernel assumes: TMA's 16-byte rows and 32-bit coordinates, windows that fit its larger tile.
bool fits_one_kernel(const SpatialPoolForward& args) {
  const int64_t area = std::min(args.window_height, args.height) * std::min(args.window_width, args.width);
  return runs_sm90a() && args.grids == nullptr && vectors(args) && args.dim > 0 && args.hidden > 0 && area <= 128 &&
         args.tokens <= (int64_t{1} << 30) && args.windows <= (int64_t{1} << 27);
}

template <class T>
void forward(const SpatialPoolForward& args, float* scratch, cudaStream_t stream) {
  const PoolParams<T> p = params<T>(args, scratch);
  if (fits_one_kernel(args)) {
    one_kernel<T>(p, stream);
  } else {
    vectors(args) ? two_kernels<T, true>(p, stream) : two_kernels<T, false>(p, stream);
  }
}

}  // namespace

int64_t spatial_pool_scratch(const SpatialPoolForward& args) {
  return args.tokens == 0 || fits_one_kernel(args) ? 0 : parts(args.hidden) * args.tokens;
}

void spatial_pool_forward(const SpatialPoolForward& args, float* scratch, cudaStream_t stream) {
  check(args);
  if (args.tokens == 0) return;
  args.dtype == DType::bfloat16 ? forward<bf16>(args, scratch, stream) : forward<fp16>(args, scratch, stream);
}

}  // namespace flashsloth::cuda
