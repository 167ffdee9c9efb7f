// Cases of csrc/cuda/hopper.cuh: mbarriers, TMA, clusters, and the pipeline that joins them to wgmma.
#include "cases.h"
#include "hopper.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace flashsloth::cuda::cases {
namespace {

// ---- The pipeline of a warp-specialised product ----

constexpr int kRows = 64, kColumns = 128, kSlice = 64, kStages = 2;
constexpr uint32_t kABytes = kRows * 128, kBBytes = 2 * kSlice * 128, kStageBytes = kABytes + kBBytes;
constexpr size_t kPipelineBytes = kStages * kStageBytes + 2 * kStages * 8;

// C (m x 128) = A (m x k, k-major) B (k x 128, n-major): a warpgroup whose first thread brings slices by TMA, one that
// multiplies. Rows past m are zero in shared memory.
__global__ void __launch_bounds__(256, 1)
    tma_product(float* c, const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int m, int k) {
  if constexpr (kHasSm90a) {
    const uint32_t tiles = shared_address(dynamic_shared()), full = tiles + kStages * kStageBytes,
                   empty = full + kStages * 8, thread = threadIdx.x;
    if (thread == 0) {
      for (uint32_t stage = 0; stage < kStages; ++stage) {
        mbarrier_init(full + stage * 8, 1);
        mbarrier_init(empty + stage * 8, 128);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    const int slices = k / kSlice;
    if (thread >= 128) {
      decrease_registers<40>();
      if (thread != 128) return;
      tma_prefetch(a);
      for (int slice = 0; slice < slices; ++slice) {
        const uint32_t stage = slice % kStages, at = tiles + stage * kStageBytes;
        mbarrier_wait(empty + stage * 8, slice / kStages % 2 ^ 1);
        mbarrier_arrive_expect_tx(full + stage * 8, kStageBytes);
        tma_load(at, a, full + stage * 8, slice * kSlice, static_cast<int>(blockIdx.x) * kRows);
        for (int column = 0; column < 2; ++column)
          tma_load(at + kABytes + column * kSlice * 128, b, full + stage * 8, column * 64, slice * kSlice);
      }
      return;
    }
    increase_registers<232>();
    float d[kColumns / 2];
    for (int slice = 0; slice < slices; ++slice) {
      const uint32_t stage = slice % kStages, at = tiles + stage * kStageBytes;
      while (!mbarrier_try_wait(full + stage * 8, slice / kStages % 2)) {
      }
      const uint64_t a_tile = wgmma_descriptor(at, Swizzle::bytes128, 0, 1024);
      const uint64_t b_tile = wgmma_descriptor(at + kABytes, Swizzle::bytes128, kSlice * 128, 1024);
      wgmma_fence();
#pragma unroll
      for (uint32_t step = 0; step < kSlice / 16; ++step)
        wgmma_ss<bf16, Major::k, Major::mn>(d, wgmma_advance(a_tile, step * 32), wgmma_advance(b_tile, step * 16 * 128),
                                            slice > 0 || step > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (slice > 0) mbarrier_arrive(empty + (slice - 1) % kStages * 8);
    }
    wgmma_wait<0>();
    for (uint32_t i = 0; i < kColumns / 2; ++i) {
      const uint32_t row = blockIdx.x * kRows + thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
      if (row < static_cast<uint32_t>(m)) c[row * kColumns + i / 4 * 8 + thread % 4 * 2 + i % 2] = d[i];
    }
  }
}

const Registered run_tma_product("tma_product", [](const Arguments& in) {
  const auto m = static_cast<uint64_t>(in.numbers[0]), k = static_cast<uint64_t>(in.numbers[1]);
  const CUtensorMap a = tensor_map<bf16, 2>(in.array<bf16>(1), {k, m}, {k * 2}, {kSlice, kRows}, Swizzle::bytes128);
  const CUtensorMap b =
      tensor_map<bf16, 2>(in.array<bf16>(2), {kColumns, k}, {kColumns * 2}, {64, kSlice}, Swizzle::bytes128);
  launch_kernel(
      "tma_product", tma_product,
      {.grid = {static_cast<unsigned>((m + kRows - 1) / kRows)}, .block = {256}, .shared_bytes = kPipelineBytes},
      in.array<float>(0), a, b, in.numbers[0], in.numbers[1]);
});

// ---- Boxes ----

// Loads a box at the coordinates, gives its bytes as they lie in shared memory, and stores the box `shift` further.
template <int Rank>
__global__ void boxes(float* raw, const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to,
                      uint32_t bytes, int4 at, int shift) {
  if constexpr (kHasSm90a) {
    const uint32_t box = shared_address(dynamic_shared()), barrier = box + bytes;
    if (threadIdx.x == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect_tx(barrier, bytes);
      if constexpr (Rank == 2) tma_load(box, from, barrier, at.x, at.y);
      if constexpr (Rank == 3) tma_load(box, from, barrier, at.x, at.y, at.z);
      if constexpr (Rank == 4) tma_load(box, from, barrier, at.x, at.y, at.z, at.w);
      mbarrier_wait(barrier, 0);
      bulk_store(raw, box, bytes);
      bulk_commit();
      if constexpr (Rank == 2) tma_store(to, box, at.x + shift, at.y + shift);
      if constexpr (Rank == 3) tma_store(to, box, at.x + shift, at.y + shift, at.z + shift);
      bulk_commit();
      bulk_wait_read<1>();
      bulk_wait<0>();
    }
  }
}

// Arrays: raw, to, from; numbers: sizes, box, coordinates (innermost first), shift.
template <int Rank>
void run_boxes(const Arguments& in, Swizzle swizzle) {
  std::array<uint64_t, Rank> sizes;
  std::array<uint64_t, Rank - 1> strides;
  std::array<uint32_t, Rank> box;
  uint64_t stride = sizeof(float);
  uint32_t bytes = sizeof(float);
  for (int i = 0; i < Rank; ++i) {
    const auto at = static_cast<size_t>(i);
    sizes[at] = static_cast<uint64_t>(in.numbers[i]);
    box[at] = static_cast<uint32_t>(in.numbers[Rank + i]);
    bytes *= box[at];
    stride *= sizes[at];
    if (i < Rank - 1) strides[at] = stride;
  }
  const int* at = in.numbers + 2 * Rank;
  const CUtensorMap from = tensor_map<float, Rank>(in.array<float>(2), sizes, strides, box, swizzle);
  const CUtensorMap to = tensor_map<float, Rank>(in.array<float>(1), sizes, strides, box, swizzle);
  launch_kernel("boxes", boxes<Rank>, {.grid = {1}, .block = {32}, .shared_bytes = bytes + 8}, in.array<float>(0), from,
                to, bytes, int4{at[0], at[1], Rank > 2 ? at[2] : 0, Rank > 3 ? at[3] : 0}, at[Rank]);
}

const Registered boxes2("boxes2", [](const Arguments& in) { run_boxes<2>(in, Swizzle::none); });
const Registered boxes3("boxes3", [](const Arguments& in) { run_boxes<3>(in, Swizzle::none); });
const Registered boxes4("boxes4", [](const Arguments& in) { run_boxes<4>(in, Swizzle::none); });
const Registered boxes2_128("boxes2_128", [](const Arguments& in) { run_boxes<2>(in, Swizzle::bytes128); });
const Registered boxes2_64("boxes2_64", [](const Arguments& in) { run_boxes<2>(in, Swizzle::bytes64); });
const Registered boxes3_32("boxes3_32", [](const Arguments& in) { run_boxes<3>(in, Swizzle::bytes32); });

// ---- Barriers that copies arrive at ----

// Every thread copies 16 bytes twice around and counts on the barrier; bulk_load brings the same once more.
__global__ void arriving_copies(float* out, const float* in) {
  if constexpr (kHasSm90a) {
    const uint32_t memory = shared_address(dynamic_shared()), barrier = memory + 4096, thread = threadIdx.x;
    if (thread == 0) {
      mbarrier_init(barrier, 129);
      mbarrier_init_fence();
    }
    __syncthreads();
    for (uint32_t phase = 0; phase < 2; ++phase) {
      cp_async16(memory + thread * 16, in + phase * 512 + thread * 4);
      cp_async_mbarrier_arrive(barrier);
      if (thread == 5) {
        mbarrier_arrive_expect_tx(barrier, 2048);
        bulk_load(memory + 2048, in + phase * 512, 2048, barrier);
      }
      mbarrier_wait(barrier, phase);
      const auto* tile = reinterpret_cast<const float*>(dynamic_shared());
      for (uint32_t i = 0; i < 8; ++i) out[phase * 1024 + i * 128 + thread] = tile[i * 128 + 127 - thread];
      __syncthreads();
    }
  }
}

const Registered run_arriving("arriving_copies", [](const Arguments& in) {
  launch_kernel("arriving_copies", arriving_copies, {.grid = {1}, .block = {128}, .shared_bytes = 4096 + 8},
                in.array<float>(0), in.array<float>(1));
});

// ---- Clusters ----

// Blocks of a cluster write their numbers to block 0, which adds them once they have all arrived at its barrier; then
// everyone reads the sum there.
__global__ void cluster_sum(float* out, const float* in) {
  if constexpr (kHasSm90a) {
    auto* memory = reinterpret_cast<float*>(dynamic_shared());
    const uint32_t slots = shared_address(memory), barrier = slots + 8 * 512, thread = threadIdx.x;
    const uint32_t rank = cluster_rank(), size = cluster_size();
    if (thread == 0) {
      mbarrier_init(barrier, size * 128);
      mbarrier_init_fence();
    }
    cluster_sync();
    const float x = in[blockIdx.x * 128 + thread];
    const uint32_t root = cluster_address(slots, 0);
    if (rank % 2 == 0) {
      store_cluster(root + rank * 512 + thread * 4, x);
    } else {
      const float y = __shfl_down_sync(kFullWarp, x, 1), z = __shfl_down_sync(kFullWarp, x, 2),
                  w = __shfl_down_sync(kFullWarp, x, 3);
      if (thread % 4 == 0) store_cluster4(root + rank * 512 + thread * 4, {x, y, z, w});
    }
    mbarrier_arrive_cluster(cluster_address(barrier, 0));
    if (rank == 0) {
      mbarrier_wait_cluster(barrier, 0);
      float sum = 0;
      for (uint32_t block = 0; block < size; ++block) sum += memory[block * 128 + thread];
      __syncthreads();
      memory[thread] = sum;
    }
    cluster_sync();
    const float4 four = load_cluster4(root + thread / 4 * 16);
    const float one = load_cluster(root + thread * 4);
    const float same = thread % 4 == 0 ? four.x : thread % 4 == 1 ? four.y : thread % 4 == 2 ? four.z : four.w;
    out[blockIdx.x * 128 + thread] = one == same ? one : -1.0f;
    cluster_sync();
  }
}

const Registered run_cluster_sum("cluster_sum", [](const Arguments& in) {
  const auto size = static_cast<unsigned>(in.numbers[0]);
  launch_kernel("cluster_sum", cluster_sum,
                {.grid = {3 * size}, .block = {128}, .shared_bytes = 8 * 512 + 8, .cluster = {size}},
                in.array<float>(0), in.array<float>(1));
});

// One block of a pair brings a tile to both.
__global__ void multicast(float* out, const __grid_constant__ CUtensorMap from) {
  if constexpr (kHasSm90a) {
    const uint32_t tile = shared_address(dynamic_shared()), barrier = tile + 1024, thread = threadIdx.x;
    if (thread == 0) {
      mbarrier_init(barrier, 1);
      mbarrier_init_fence();
      mbarrier_arrive_expect_tx(barrier, 1024);
    }
    cluster_sync();
    if (thread == 0 && cluster_rank() == 1) tma_load_multicast(tile, from, barrier, 3, 0, 0);
    mbarrier_wait(barrier, 0);
    for (uint32_t i = thread; i < 256; i += 32)
      out[blockIdx.x * 256 + i] = reinterpret_cast<const float*>(dynamic_shared())[i];
    cluster_sync();
  }
}

const Registered run_multicast("multicast", [](const Arguments& in) {
  const CUtensorMap from = tensor_map<float, 2>(in.array<float>(1), {8, 32}, {32}, {8, 32}, Swizzle::none);
  launch_kernel("multicast", multicast, {.grid = {2}, .block = {32}, .shared_bytes = 1024 + 8, .cluster = {2}},
                in.array<float>(0), from);
});

const Registered run_refused("refused_map", [](const Arguments& in) {
  tensor_map<float, 2>(in.array<float>(0), {8, 32}, {20}, {8, 32}, Swizzle::none);
});

// ---- What is wrong, and must be said ----

#if defined(FLASHSLOTH_EMULATE)  // a GPU would not survive them
enum Mistake {
  uninitialised,
  too_many,
  no_cluster_sync,
  ended,
  under_way,
  unaligned,
  never_comes,
  unread,
  unfenced,
};

__global__ void wrong_hopper(int mistake, const __grid_constant__ CUtensorMap map) {
  const uint32_t memory = shared_address(dynamic_shared()), barrier = memory + 1024;
  const bool first = threadIdx.x == 0;
  if (first && mistake != uninitialised) mbarrier_init(barrier, 1);
  if (first && mistake != unfenced) mbarrier_init_fence();
  if (mistake != no_cluster_sync) cluster_sync();
  if (!first) return;
  switch (mistake) {
    case uninitialised: mbarrier_arrive(barrier); break;
    case too_many:
      mbarrier_arrive_expect_tx(barrier, 64);
      mbarrier_arrive(barrier);
      break;
    case no_cluster_sync: store_cluster(cluster_address(memory, cluster_rank() ^ 1), 1.0f); break;
    case ended:
      if (cluster_rank() == 0) {
        mbarrier_arrive_expect_tx(barrier, 1024);
        tma_load(memory, map, barrier, 0, 0);
        mbarrier_wait(barrier, 0);
        store_cluster(cluster_address(memory, 1), 1.0f);
      }
      break;
    case under_way:
      mbarrier_arrive_expect_tx(barrier, 1024);
      tma_load(memory, map, barrier, 0, 0);
      break;
    case unaligned: tma_load(memory + 64, map, barrier, 0, 0); break;
    case never_comes:
      mbarrier_arrive_expect_tx(barrier, 1040);
      tma_load(memory, map, barrier, 0, 0);
      mbarrier_wait(barrier, 0);
      break;
    case unfenced: tma_load(memory, map, barrier, 0, 0); break;
    case unread:
      tma_store(map, memory, 0, 0);
      bulk_commit();
      break;
    default: break;
  }
}

__global__ void too_many_registers(int) { increase_registers<240>(); }

const Registered run_registers("too_many_registers", [](const Arguments& in) {
  launch_kernel("too_many_registers", too_many_registers, {.grid = {1}, .block = {384}}, in.numbers[0]);
});

const Registered run_no_wait("overlap_without_wait", [](const Arguments&) {
  launch_kernel("overlap_without_wait", wrong_hopper,
                {.grid = {1}, .block = {32}, .shared_bytes = 2048, .overlap_previous = true}, -1, CUtensorMap{});
});

const Registered run_wrong("wrong_hopper", [](const Arguments& in) {
  const CUtensorMap map = tensor_map<float, 2>(in.array<float>(0), {8, 32}, {32}, {8, 32}, Swizzle::none);
  launch_kernel("wrong_hopper", wrong_hopper, {.grid = {2}, .block = {32}, .shared_bytes = 2048, .cluster = {2}},
                in.numbers[0], map);
});
#endif

}  // namespace
}  // namespace flashsloth::cuda::cases
