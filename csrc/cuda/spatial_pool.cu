// Spatial attention pooling, forward: what the kernels assume, and which of them run.
#include <algorithm>
#include <string>

#include "launch.cuh"
#include "spatial_pool.h"
#include "spatial_pool_sm80.cuh"

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

template <class T>
void forward(const SpatialPoolForward& args, float* scratch, cudaStream_t stream) {
  const PoolParams<T> p = params<T>(args, scratch);
  const bool vector = args.dim % 8 == 0 && aligned(args.x) && aligned(args.w1) && aligned(args.y);
  vector ? two_kernels<T, true>(p, stream) : two_kernels<T, false>(p, stream);
}

}  // namespace

int64_t spatial_pool_scratch(const SpatialPoolForward& args) { return parts(args.hidden) * args.tokens; }

void spatial_pool_forward(const SpatialPoolForward& args, float* scratch, cudaStream_t stream) {
  check(args);
  if (args.tokens == 0) return;
  args.dtype == DType::bfloat16 ? forward<bf16>(args, scratch, stream) : forward<fp16>(args, scratch, stream);
}

}  // namespace flashsloth::cuda
