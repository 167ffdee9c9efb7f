// Attention over the tokens that are kept, on sm_90a: what is launched, and what must hold before.
//
// The kernel is persistent, one block a multiprocessor: a producer warpgroup gathers query, key and value rows into
// shared memory (sparse_prefill_producer.cuh), three consumer warpgroups compute (sparse_prefill_consumer.cuh), and
// both run ahead of each other as far as the stages allow, over the end of a query tile too.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "sparse_prefill.h"
#include "sparse_prefill_consumer.cuh"
#include "sparse_prefill_importance.cuh"
#include "sparse_prefill_producer.cuh"

namespace flashsloth::cuda {
namespace prefill {

// Registers a thread: 3 x 144 + 80 for four warpgroups is all that a multiprocessor has.
constexpr int kConsumerRegisters = 144, kProducerRegisters = 80;

template <class T, int Dim>
__global__ void __launch_bounds__(kThreads, 1) sparse_prefill_kernel(const __grid_constant__ PrefillArguments args) {
  if constexpr (kHasSm90a) {
    char* const memory = dynamic_shared();
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + kBarriersAt);
    if (threadIdx.x == 0) {
      // Full: every producer thread's copies, and its ordinary writes where there are any (of queries all threads,
      // of keys a lane of each warp). Empty: a lane of each consumer warp.
      for (int i = 0; i < kQueryStages; ++i) {
        mbarrier_init(shared_address(&barriers.query_full[i]), 2 * kWarpgroup);
        mbarrier_init(shared_address(&barriers.query_empty[i]), kConsumers * 4);
      }
      for (int i = 0; i < kKeyStages; ++i) {
        mbarrier_init(shared_address(&barriers.key_full[i]), kWarpgroup + 4);
        mbarrier_init(shared_address(&barriers.key_empty[i]), kConsumers * 4);
        mbarrier_init(shared_address(&barriers.value_full[i]), kWarpgroup);
        mbarrier_init(shared_address(&barriers.value_empty[i]), kConsumers * 4);
      }
      mbarrier_init_fence();
    }
    __syncthreads();
    grid_dependency_wait();
    const int warpgroup = __shfl_sync(kFullWarp, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
      decrease_registers<kProducerRegisters>();
      Producer<Dim>(args, memory).run();
    } else {
      increase_registers<kConsumerRegisters>();
      Consumer<T, Dim>(args, memory, warpgroup - 1).run();
    }
  }
}

constexpr int kFillThreads = 256;

// Packed sequences may lie in any order, so gaps are not known from one list: all rows get 0 and -inf first.
__global__ void __launch_bounds__(kFillThreads)
    fill_kernel(const __grid_constant__ PrefillArguments args, int64_t rows, int row_chunks) {
  grid_dependency_wait();
  const int64_t chunks = rows * args.heads * row_chunks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < chunks; i += step) {
    const int64_t row = i / row_chunks / args.heads;
    const int chunk = static_cast<int>(i % row_chunks), head = static_cast<int>(i / row_chunks % args.heads);
    *reinterpret_cast<uint4*>(args.out.at(0, head) + row * args.out.row + chunk * 16) = uint4{0, 0, 0, 0};
    if (chunk == 0) args.lse_at(0, head)[row * args.lse_row] = -INFINITY;
  }
}

__global__ void __launch_bounds__(kFillThreads) zero_kernel(float* values, int64_t count) {
  grid_dependency_wait();
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) values[i] = 0.0f;
}

}  // namespace prefill

namespace {

void expect(bool fits, const std::string& what) {
  if (!fits) throw std::runtime_error("sparse_prefill: expected " + what);
}

std::string got(int64_t value) { return ", got " + std::to_string(value); }

constexpr int64_t kMost = 0x7FFFFFFF;  // of what the kernels count in 32 bits

DeviceTensor device_tensor(const char* name, const void* data, const RowStrides& strides, int64_t rows) {
  constexpr int64_t kChunk = 8;  // elements in 16 bytes
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.batch % kChunk == 0 &&
                       strides.head % kChunk == 0 && strides.row % kChunk == 0;
  expect(rows == 0 || aligned, std::string(name) + " that starts on, and is strided by, multiples of 16 bytes");
  expect(strides.row >= 0 && strides.row < kMost,
         std::string(name) + " with less than 2^31 elements from row to row" + got(strides.row));
  return {static_cast<char*>(const_cast<void*>(data)), strides.batch * 2, strides.head * 2,
          static_cast<uint32_t>(strides.row * 2)};
}

DeviceRows device_rows(const char* name, const TokenRows& index, int64_t rows, int64_t first_position) {
  expect(rows <= kMost, std::string("fewer than 2^31 rows of ") + name + got(rows));
  expect(index.capacity <= kMost, std::string("an index of fewer than 2^31 entries for ") + name + got(index.capacity));
  const int64_t max_seqlen = index.max_seqlen < 0 ? 0 : index.max_seqlen < rows ? index.max_seqlen : rows;
  return {index.indices,
          index.cu_seqlens,
          index.positions,
          static_cast<int>(index.capacity),
          static_cast<int>(max_seqlen),
          static_cast<int>(rows),
          static_cast<int>(first_position)};
}

PrefillArguments prefill_arguments(const SparsePrefillForward& args) {
  PrefillArguments device{};
  device.q = device_tensor("q", args.q, args.q_strides, args.q_rows);
  device.k = device_tensor("k", args.k, args.k_strides, args.k_rows);
  device.v = device_tensor("v", args.v, args.v_strides, args.k_rows);
  device.out = device_tensor("out", args.out, args.out_strides, args.q_rows);
  if (args.packed) device.q.batch = device.k.batch = device.v.batch = device.out.batch = 0;
  device.lse = args.lse;
  device.lse_batch = args.packed ? 0 : args.lse_strides.batch;
  device.lse_head = args.lse_strides.head;
  device.lse_row = args.lse_strides.row;
  device.queries = device_rows("q", args.q_index, args.q_rows, args.k_rows - args.q_rows);
  device.keys = device_rows("k", args.k_index, args.k_rows, 0);

  const int64_t lists = args.sequences * args.heads;
  const bool indexed = args.q_index.cu_seqlens != nullptr;
  const int64_t longest = indexed ? device.queries.max_seqlen : args.q_rows;
  // Where every row is to be filled but none is kept, one tile a list still does that.
  const int64_t tiles = longest > 0 ? (longest + prefill::kQueryRows - 1) / prefill::kQueryRows : args.q_rows > 0;
  expect(lists <= kMost, "fewer than 2^31 sequences times heads" + got(lists));
  expect(tiles * prefill::kListsTogether <= kMost && tiles * lists <= kMost,
         "fewer than 2^31 tiles of 192 query rows" + got(tiles * lists));
  device.lists = static_cast<int>(lists);
  device.heads = static_cast<int>(args.heads);
  device.group = args.kv_heads > 0 ? static_cast<int>(args.heads / args.kv_heads) : 1;
  device.query_tiles = static_cast<int>(tiles);
  device.tiles = static_cast<int>(tiles * lists);
  device.causal = args.causal;
  device.fill_gaps = indexed && !args.packed;

  // The kernel multiplies by the absolute value, and -inf, which masks, must stay -inf: a scale of zero is a tiny one.
  constexpr double kTiny = 1e-30, kLog2e = 1.4426950408889634;
  const double scale = std::max(std::fabs(args.scale), kTiny);
  device.negative = args.scale < 0;
  device.scale = static_cast<float>(scale);
  device.scale_log2 = static_cast<float>(scale * kLog2e);
  return device;
}

dim3 grid_of(int64_t threads_wanted, int threads, int multiprocessors) {
  const int64_t blocks = (threads_wanted + threads - 1) / threads, most = 8 * static_cast<int64_t>(multiprocessors);
  return dim3(static_cast<unsigned>(std::min(blocks, most)));
}

template <class T, int Dim>
void launch(const SparsePrefillForward& args, const PrefillArguments& device, int multiprocessors,
            cudaStream_t stream) {
  Launch one;
  one.stream = stream;
  one.overlap_previous = true;
  if (args.packed && args.q_index.cu_seqlens != nullptr && args.q_rows * args.heads > 0) {
    one.block = dim3(prefill::kFillThreads);
    one.grid = grid_of(args.q_rows * args.heads * (Dim / 8), prefill::kFillThreads, multiprocessors);
    launch_kernel("sparse_prefill fill_kernel", prefill::fill_kernel, one, device, args.q_rows, Dim / 8);
  }
  if (device.tiles > 0) {
    one.block = dim3(prefill::kThreads);
    one.grid = dim3(static_cast<unsigned>(std::min(device.tiles, multiprocessors)));
    one.shared_bytes = prefill::kSharedBytes;
    launch_kernel("sparse_prefill_kernel", prefill::sparse_prefill_kernel<T, Dim>, one, device);
  }
  if (args.importance == nullptr) return;

  const int64_t received = (args.packed ? 1 : args.sequences) * args.k_rows;
  if (received == 0) return;
  one.shared_bytes = 0;
  one.block = dim3(prefill::kFillThreads);
  one.grid = grid_of(received, prefill::kFillThreads, multiprocessors);
  launch_kernel("sparse_prefill zero_kernel", prefill::zero_kernel, one, args.importance, received);
  const int64_t longest = args.k_index.cu_seqlens != nullptr ? device.keys.max_seqlen : args.k_rows;
  const int64_t key_tiles = (longest + importance::kKeys - 1) / importance::kKeys;
  if (args.listed == 0 || args.heads == 0 || args.q_rows == 0 || key_tiles * args.sequences == 0) return;
  expect(key_tiles * args.sequences * importance::kBlocks <= kMost,
         "fewer than 2^28 tiles of 128 keys" + got(key_tiles * args.sequences));
  const importance::Arguments wanted{args.importance_rows,
                                     args.listed,
                                     args.listed_per_sequence ? args.listed : 0,
                                     args.importance,
                                     args.packed ? 0 : args.k_rows,
                                     static_cast<int>(key_tiles)};
  one.shared_bytes = importance::kSharedBytes;
  one.block = dim3(importance::kThreads);
  one.grid = dim3(static_cast<unsigned>(key_tiles * args.sequences * importance::kBlocks));
  one.cluster = dim3(importance::kBlocks);
  launch_kernel("sparse_prefill importance_kernel", importance::importance_kernel<T, Dim>, one, device, wanted);
}

}  // namespace

void sparse_prefill_forward(const SparsePrefillForward& args, cudaStream_t stream) {
  expect(args.dim == 72 || args.dim == 80, "a head size of 72 or 80" + got(args.dim));
  expect(args.dtype == DType::bfloat16 || args.dtype == DType::float16, "bfloat16 or float16");
  const Device now = device();
  expect(now.compute_capability == 90, "a GPU of compute capability 9.0, got " +
                                           std::to_string(now.compute_capability / 10) + "." +
                                           std::to_string(now.compute_capability % 10));
  const PrefillArguments arguments = prefill_arguments(args);
  const bool bfloat = args.dtype == DType::bfloat16;
  if (args.dim == 80) {
    (bfloat ? launch<bf16, 80> : launch<fp16, 80>)(args, arguments, now.multiprocessors, stream);
  } else {
    (bfloat ? launch<bf16, 72> : launch<fp16, 72>)(args, arguments, now.multiprocessors, stream);
  }
}

}  // namespace flashsloth::cuda
