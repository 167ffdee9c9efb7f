// The part of the CUDA runtime that launchers use. Included by emulator.cpp.
#include <mutex>

#include "machine.h"

namespace flashsloth::emulator {

static std::mutex one_launch;
static std::string failure = "the emulated launch failed";
static cudaError_t last_error = cudaSuccess;

static cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

static std::unordered_map<const void*, int>& allowed_shared_bytes() {
  static std::unordered_map<const void*, int> allowed;
  return allowed;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void (*body)(const void*),
                   const void* arguments) noexcept {
  const std::lock_guard<std::mutex> lock(one_launch);
  dim3 cluster = {1, 1, 1};
  bool overlaps = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& size = config.attrs[i].val.clusterDim;
      cluster = {size.x, size.y, size.z};
    }
    if (config.attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization)
      overlaps = config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  constexpr size_t kWithoutAsking = 48 * 1024;
  const auto allowed = allowed_shared_bytes().find(function);
  const size_t limit = allowed == allowed_shared_bytes().end() ? kWithoutAsking : static_cast<size_t>(allowed->second);
  if (config.dynamicSmemBytes > std::max(kWithoutAsking, limit)) return remember(cudaErrorInvalidValue);
  try {
    machine().run(config, cluster, overlaps, body, arguments);
  } catch (const std::exception& error) {
    failure = error.what();
    return remember(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes) noexcept {
  *blocks = Architecture::get().resident_blocks(static_cast<size_t>(threads), shared_bytes);
  return cudaSuccess;
}

}  // namespace flashsloth::emulator

// Hidden, so that a CUDA runtime in the same process is neither disturbed nor called.
#pragma GCC visibility push(hidden)
extern "C" {

using namespace flashsloth::emulator;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "an error that the emulator does not give";
  }
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? failure.c_str() : cudaGetErrorName(error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Architecture& gpu = Architecture::get();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = gpu.multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = gpu.compute_capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = gpu.compute_capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = gpu.shared_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = gpu.shared_per_multiprocessor; return cudaSuccess;
    default: return remember(cudaErrorInvalidValue);
  }
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > Architecture::get().shared_per_block) return remember(cudaErrorInvalidValue);
  allowed_shared_bytes()[function] = value;
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = driver_entry_point(symbol);
  if (found != nullptr)
    *found = *function == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = std::aligned_alloc(256, (bytes + 256) / 256 * 256);
  return *address != nullptr ? cudaSuccess : remember(cudaErrorMemoryAllocation);
}
cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

}  // extern "C"
#pragma GCC visibility pop
