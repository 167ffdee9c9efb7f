// Launching kernels: every launch passes the checks here, and an error says what was launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#ifndef FLASHSLOTH_SM90A
#define FLASHSLOTH_SM90A 1
#endif

namespace flashsloth::cuda {

// What launchers ask of the current device; read once a device.
struct Device {
  int index;
  int multiprocessors;
  int compute_capability;  // major * 10 + minor
  int shared_bytes;        // the most dynamic shared memory that a block may opt in to
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  dim3 cluster = {1, 1, 1};
  bool overlap_previous = false;  // programmatic dependent launch: the kernel calls grid_dependency_wait (sm_90)
};

namespace detail {

inline std::string describe(dim3 d) {
  return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

[[noreturn]] inline void fail(const char* kernel, const Launch& launch, const std::string& why) {
  throw std::runtime_error(std::string(kernel) + ": " + why + " (grid " + describe(launch.grid) + ", block " +
                           describe(launch.block) + ", " + std::to_string(launch.shared_bytes) +
                           " bytes of dynamic shared memory, cluster " + describe(launch.cluster) + ")");
}

inline void check(cudaError_t error, const char* kernel, const Launch& launch, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // this error is reported here, and should not appear again at the next call
  fail(kernel, launch, std::string(call) + " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string("cudaDeviceGetAttribute: ") + cudaGetErrorString(error));
  }
  return value;
}

// Above 48 KiB a kernel must be told; the driver is asked once for each larger size.
inline void allow_shared_bytes(const void* function, const char* kernel, const Launch& launch, int device) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (launch.shared_bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& bytes = allowed[{function, device}];
  if (launch.shared_bytes <= bytes) return;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(launch.shared_bytes)),
        kernel, launch, "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  bytes = launch.shared_bytes;
}

}  // namespace detail

inline Device device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error(std::string("cudaGetDevice: ") + cudaGetErrorString(error));
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  const Device device{index, detail::attribute(cudaDevAttrMultiProcessorCount, index),
                      detail::attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                          detail::attribute(cudaDevAttrComputeCapabilityMinor, index),
                      detail::attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  known.emplace(index, device);
  return device;
}

// Whether kernels with sm_90a instructions run here. Their code runs on no other architecture, newer ones included, and
// setup.py may have left it out (FLASHSLOTH_CUDA_ARCHS).
inline bool runs_sm90a() { return FLASHSLOTH_SM90A != 0 && device().compute_capability == 90; }

// Launches `function` with `arguments`, which convert to its parameters. Throws std::runtime_error naming the kernel,
// the launch and what is wrong with it.
template <class... Parameters, class... Arguments>
void launch_kernel(const char* kernel, void (*function)(Parameters...), const Launch& launch,
                   Arguments&&... arguments) {
  const Device now = device();
  const dim3 grid = launch.grid, block = launch.block, cluster = launch.cluster;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const uint64_t clustered = static_cast<uint64_t>(cluster.x) * cluster.y * cluster.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) detail::fail(kernel, launch, "the grid is empty");
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    detail::fail(kernel, launch, "the grid is too large: at most 2147483647 x 65535 x 65535");
  if (threads == 0 || threads > 1024 || block.z > 64)
    detail::fail(kernel, launch, "a block has 1 to 1024 threads, at most 64 deep");
  if (launch.shared_bytes > static_cast<size_t>(now.shared_bytes))
    detail::fail(kernel, launch, "too much shared memory: the device allows " + std::to_string(now.shared_bytes));
  if (clustered == 0 || clustered > 8 || grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0)
    detail::fail(kernel, launch, "a cluster has 1 to 8 blocks and divides the grid");
  if (clustered > 1 && now.compute_capability < 90)
    detail::fail(kernel, launch,
                 "clusters need compute capability 9.0, the device has " + std::to_string(now.compute_capability / 10) +
                     "." + std::to_string(now.compute_capability % 10));

  detail::allow_shared_bytes(reinterpret_cast<const void*>(function), kernel, launch, now.index);

  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (clustered > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = cluster.x;
    attributes[count].val.clusterDim.y = cluster.y;
    attributes[count].val.clusterDim.z = cluster.z;
    ++count;
  }
  if (launch.overlap_previous && now.compute_capability >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  detail::check(cudaLaunchKernelEx(&config, function, std::forward<Arguments>(arguments)...), kernel, launch,
                "cudaLaunchKernelEx");
}

}  // namespace flashsloth::cuda
