// Cases of csrc/cuda/instructions.cuh and primitives.cuh.
#include "cases.h"
#include "instructions.cuh"

namespace flashsloth::cuda::cases {
namespace {

constexpr int kTile = 64, kPitch = 144;  // bytes of a row of 64 elements, padded to other banks

// C (64 x 64, fp32) = A (64 x 64, [m][k]) B, B stored [k][n] (Transposed: loaded by ldmatrix.trans) or [n][k]; four
// slices of k, each its own group of copies. Without the wait, the products run on what the copies have not brought.
template <class T, bool Transposed, bool Wait>
__global__ void product(float* c, const T* a, const T* b) {
  const uint32_t a_tile = shared_address(dynamic_shared()), b_tile = a_tile + kTile * kPitch;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  for (int slice = 0; slice < 4; ++slice) {
    for (int i = thread; i < kTile * 2; i += 128) {
      const int row = i / 2, chunk = slice * 2 + i % 2;
      cp_async16(a_tile + row * kPitch + chunk * 16, a + row * kTile + chunk * 8);
      const int b_row = Transposed ? slice * 16 + i / 8 : row, b_chunk = Transposed ? i % 8 : chunk;
      cp_async16(b_tile + b_row * kPitch + b_chunk * 16, b + b_row * kTile + b_chunk * 8);
    }
    cp_async_commit();
  }
  float d[8][4] = {};
  auto multiply = [&](int slice) {
    uint32_t fa[4];
    ldmatrix_x4(fa, a_tile + (warp * 16 + lane % 16) * kPitch + (slice * 16 + lane / 16 * 8) * 2);
    for (int n = 0; n < 8; ++n) {
      uint32_t fb[2];
      if constexpr (Transposed) {
        ldmatrix_x2_trans(fb, b_tile + (slice * 16 + lane % 16) * kPitch + n * 16);
      } else {
        ldmatrix_x2(fb, b_tile + (n * 8 + lane % 8) * kPitch + (slice * 16 + lane / 8 % 2 * 8) * 2);
      }
      mma_m16n8k16<T>(d[n], fa, fb[0], fb[1]);
    }
  };
  if (Wait) cp_async_wait<2>();
  __syncthreads();
  multiply(0);
  multiply(1);
  if (Wait) cp_async_wait<0>();
  __syncthreads();
  multiply(2);
  multiply(3);
  cp_async_wait<0>();
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) c[(warp * 16 + lane / 4 + i / 2 * 8) * kTile + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
}

template <class T, bool Transposed, bool Wait>
void run_product(const Arguments& in) {
  launch_kernel("product", product<T, Transposed, Wait>,
                {.grid = {1}, .block = {128}, .shared_bytes = size_t{2} * kTile * kPitch}, in.array<float>(0),
                in.array<T>(1), in.array<T>(2));
}

const Registered product_bf16("product_bf16", run_product<bf16, false, true>);
const Registered product_fp16("product_fp16", run_product<fp16, false, true>);
const Registered product_bf16_trans("product_bf16_trans", run_product<bf16, true, true>);
const Registered product_fp16_trans("product_fp16_trans", run_product<fp16, true, true>);
const Registered product_without_wait("product_without_wait", run_product<bf16, false, false>);

// The x4 forms: out[matrix][lane] of four 8x8 matrices stored one after the other; plain, then transposed.
__global__ void load_matrices(uint32_t* out, const uint4* in) {
  auto* tile = reinterpret_cast<uint4*>(dynamic_shared());
  tile[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t plain[4], transposed[4];
  const uint32_t row = shared_address(tile + threadIdx.x);
  ldmatrix_x4(plain, row);
  ldmatrix_x4_trans(transposed, row);
  for (int m = 0; m < 4; ++m) {
    out[m * 32 + threadIdx.x] = plain[m];
    out[128 + m * 32 + threadIdx.x] = transposed[m];
  }
}

const Registered matrices("load_matrices", [](const Arguments& in) {
  launch_kernel("load_matrices", load_matrices, {.grid = {1}, .block = {32}, .shared_bytes = 512},
                in.array<uint32_t>(0), in.array<uint4>(1));
});

// C (16 x 8) = A (16 x 64) B (64 x 8) from fp32, by one tf32 product or by three.
template <bool Three>
__global__ void product_tf32(float* c, const float* a, const float* b) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  float d[4] = {};
  for (int k = 0; k < 64; k += 8) {
    const float fa[4] = {a[g * 64 + k + t], a[(g + 8) * 64 + k + t], a[g * 64 + k + t + 4],
                         a[(g + 8) * 64 + k + t + 4]};
    const float fb[2] = {b[(k + t) * 8 + g], b[(k + t + 4) * 8 + g]};
    if constexpr (Three) {
      mma_m16n8k8_3xtf32(d, fa, fb[0], fb[1]);
    } else {
      const uint32_t bits[4] = {__float_as_uint(fa[0]), __float_as_uint(fa[1]), __float_as_uint(fa[2]),
                                __float_as_uint(fa[3])};
      mma_m16n8k8_tf32(d, bits, __float_as_uint(fb[0]), __float_as_uint(fb[1]));
    }
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

template <bool Three>
void run_tf32(const Arguments& in) {
  launch_kernel("product_tf32", product_tf32<Three>, {.grid = {1}, .block = {32}}, in.array<float>(0),
                in.array<float>(1), in.array<float>(2));
}

const Registered tf32("product_tf32", run_tf32<false>);
const Registered three_tf32("product_3xtf32", run_tf32<true>);

// out rows: bf16 and fp16 round trips, 2^x, rounding to tf32.
__global__ void numbers(float* out, const float* in, int count) {
  for (int i = 2 * static_cast<int>(threadIdx.x); i < count; i += 2 * static_cast<int>(blockDim.x)) {
    const float2 b = unpack2<bf16>(pack2<bf16>(in[i], in[i + 1]));
    const float2 h = unpack2<fp16>(pack2<fp16>(in[i], in[i + 1]));
    out[i] = b.x;
    out[i + 1] = b.y;
    out[count + i] = h.x;
    out[count + i + 1] = h.y;
    for (int j = i; j < i + 2; ++j) {
      out[2 * count + j] = exp2_approx(in[j]);
      out[3 * count + j] = __uint_as_float(to_tf32(in[j]));
    }
  }
}

const Registered run_numbers("numbers", [](const Arguments& in) {
  launch_kernel("numbers", numbers, {.grid = {1}, .block = {64}}, in.array<float>(0), in.array<float>(1),
                in.numbers[0]);
});

// Each warp's row: sum, maximum, sums of 4, prefix sums by shuffles up, lanes that are positive.
__global__ void reductions(float* out, const float* in) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), lane = static_cast<int>(threadIdx.x) % 32;
  const int n = static_cast<int>(gridDim.x * blockDim.x);
  const float x = in[i];
  float prefix = x;
  for (int offset = 1; offset < 32; offset *= 2) {
    const float left = __shfl_up_sync(kFullWarp, prefix, offset);
    if (lane >= offset) prefix += left;
  }
  out[i] = warp_sum(x);
  out[n + i] = warp_max(x);
  out[2 * n + i] = warp_sum<4>(x);
  out[3 * n + i] = prefix;
  out[4 * n + i] = static_cast<float>(__popc(__ballot_sync(kFullWarp, x > 0.0f)));
  out[5 * n + i] = __shfl_down_sync(kFullWarp, x, 3, 8);
  out[6 * n + i] = __shfl_sync(kFullWarp, x, lane / 2);
}

const Registered run_reductions("reductions", [](const Arguments& in) {
  launch_kernel("reductions", reductions, {.grid = {3}, .block = {96}}, in.array<float>(0), in.array<float>(1));
});

// Sum of n numbers: a block adds its part, the last block adds the parts. Streaming loads and stores; zero fill past n.
__global__ void split_sum(float* out, float* parts, uint32_t* counter, const float* in, int n) {
  auto* tile = reinterpret_cast<float*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x), at = (static_cast<int>(blockIdx.x * blockDim.x) + thread) * 4;
  cp_async16(shared_address(tile + thread * 4), at < n ? in + at : in, at < n);
  cp_async_commit();
  cp_async_wait<0>();
  float sum = tile[thread * 4] + tile[thread * 4 + 1] + tile[thread * 4 + 2] + tile[thread * 4 + 3];
  sum = warp_sum(sum);
  __syncthreads();
  if (thread % 32 == 0) tile[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += tile[warp];
    store_streaming16(parts + blockIdx.x * 4, {__float_as_uint(sum), 0, 0, 0});
  }
  if (!last_block(counter, gridDim.x)) return;
  if (thread == 0) {
    sum = 0;
    for (int block = 0; block < static_cast<int>(gridDim.x); ++block) sum += __ldcg(parts + block * 4);
    *out += sum;
  }
}

const Registered run_split_sum("split_sum", [](const Arguments& in) {
  const int n = in.numbers[0];
  for (int times = 0; times < 3; ++times)
    launch_kernel("split_sum", split_sum,
                  {.grid = {static_cast<unsigned>((n + 511) / 512)}, .block = {128}, .shared_bytes = 2048},
                  in.array<float>(0), in.array<float>(1), in.array<uint32_t>(2), in.array<float>(3), n);
});

// Block b waits for block b - 1, whose result it needs: out[b] = out[b - 1] + in[b].
__global__ void chain(float* out, uint32_t* counter, const float* in) {
  if (threadIdx.x != 0) return;
  while (load_acquire(counter) < blockIdx.x) {
  }
  const float before = blockIdx.x == 0 ? 0.0f : __ldcg(out + blockIdx.x - 1);
  out[blockIdx.x] = before + in[blockIdx.x];
  add_release(counter, 1);
}

const Registered run_chain("chain", [](const Arguments& in) {
  launch_kernel("chain", chain, {.grid = {static_cast<unsigned>(in.numbers[0])}, .block = {64}}, in.array<float>(0),
                in.array<uint32_t>(1), in.array<float>(2));
});

// Warp 0 brings rows into two buffers, warp 1 doubles them out: a pair of named barriers a buffer, full and free.
__global__ void pipeline(float* out, const float* in, int rows) {
  auto* buffers = reinterpret_cast<float*>(dynamic_shared());
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int row = 0; row < rows; ++row) {
    const uint32_t full = 1 + row % 2, free = 3 + row % 2;
    float& place = buffers[row % 2 * 32 + (warp == 0 ? lane : 31 - lane)];
    if (warp == 0) {
      if (row >= 2) named_barrier_sync(free, 64);
      place = in[row * 32 + lane];
      named_barrier_arrive(full, 64);
    } else {
      named_barrier_sync(full, 64);
      out[row * 32 + 31 - lane] = 2 * place;
      if (row + 2 < rows) named_barrier_arrive(free, 64);
    }
  }
}

const Registered run_pipeline("pipeline", [](const Arguments& in) {
  launch_kernel("pipeline", pipeline, {.grid = {1}, .block = {64}, .shared_bytes = 256}, in.array<float>(0),
                in.array<float>(1), in.numbers[0]);
});

// Threads hand their numbers to the next one, round after round, through one buffer: a barrier after the write and one
// after the read, of the block or, in a block of one warp, of the warp. Leaving one out is a race.
enum class Leave { nothing, after_write, after_read };

template <Leave Out>
__global__ void hand_on(float* out, const float* in, int rounds) {
  auto* buffer = reinterpret_cast<float*>(dynamic_shared());
  const unsigned thread = threadIdx.x, next = (thread + 1) % blockDim.x;
  const auto barrier = [] {
    if (blockDim.x == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
  float x = in[thread];
  for (int round = 0; round < rounds; ++round) {
    buffer[next] = x;
    if constexpr (Out != Leave::after_write) barrier();
    x = buffer[thread];
    if constexpr (Out != Leave::after_read) barrier();
  }
  out[thread] = x;
}

template <Leave Out>
void run_hand_on(const Arguments& in) {
  const auto threads = static_cast<unsigned>(in.numbers[0]);
  launch_kernel("hand_on", hand_on<Out>, {.grid = {1}, .block = {threads}, .shared_bytes = threads * sizeof(float)},
                in.array<float>(0), in.array<float>(1), in.numbers[1]);
}

const Registered hand_on_right("hand_on", run_hand_on<Leave::nothing>);
const Registered hand_on_write("hand_on_no_barrier_after_write", run_hand_on<Leave::after_write>);
const Registered hand_on_read("hand_on_no_barrier_after_read", run_hand_on<Leave::after_read>);

// Two launches, the second of which may start before the first has ended.
__global__ void add_one(float* out, const float* in) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  grid_dependency_wait();
  out[i] = in[i] + 1.0f;
  grid_dependency_launch();
}

const Registered run_add_one("add_one_twice", [](const Arguments& in) {
  const Launch launch{.grid = {4}, .block = {64}, .overlap_previous = true};
  launch_kernel("add_one", add_one, launch, in.array<float>(1), in.array<float>(2));
  launch_kernel("add_one", add_one, launch, in.array<float>(0), in.array<float>(1));
});

// ---- What is wrong, and must be said ----

enum Mistake { lost_barrier, lost_lane, misaligned, out_of_bounds, past_the_end, no_wait, other_collective, no_spin };

__global__ void wrong(int mistake) {
  const uint32_t tile = shared_address(dynamic_shared());
  const unsigned thread = threadIdx.x;
  uint32_t r[4];
  switch (mistake) {
    case lost_barrier:
      if (thread < 32) named_barrier_sync(1, 64);
      break;
    case lost_lane:
      if (thread != 7) __syncwarp();
      break;
    case misaligned: ldmatrix_x4(r, tile + thread % 32 * 16 + 8); break;
    case out_of_bounds: ldmatrix_x4(r, tile + thread % 32 * 16 + 256); break;
    case past_the_end: dynamic_shared()[512 + thread] = 0; break;
    case no_wait: cp_async16(tile, dynamic_shared(), false); break;
    case other_collective:
      if (thread % 32 < 16) {
        ldmatrix_x4(r, tile);
      } else {
        __syncwarp();
      }
      break;
    case no_spin:
      if (thread == 0) {
        auto* never = reinterpret_cast<uint32_t*>(dynamic_shared());
        *never = 0;
        while (load_acquire(never) == 0) {
        }
      }
      break;
    default: break;
  }
}

#if defined(FLASHSLOTH_EMULATE)  // a GPU would not survive them
const Registered run_wrong("wrong", [](const Arguments& in) {
  launch_kernel("wrong", wrong, {.grid = {2}, .block = {64}, .shared_bytes = 512}, in.numbers[0]);
});
#endif

const Registered run_limits("limits", [](const Arguments& in) {
  Launch launch{.grid = {1}, .block = {64}, .shared_bytes = 512};
  if (in.numbers[0] == 0) launch.grid = {1, 65536};
  if (in.numbers[0] == 1) launch.block = {1025};
  if (in.numbers[0] == 2) launch.shared_bytes = 400 * 1024;
  if (in.numbers[0] == 3) launch.cluster = {2};
  if (in.numbers[0] == 4) launch.grid = {0};
  launch_kernel("limits", wrong, launch, -1);
});

}  // namespace
}  // namespace flashsloth::cuda::cases
