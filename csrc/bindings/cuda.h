// What the bindings of CUDA kernels share: the device and stream of a launch, and where an op is registered.
//
// Nothing of libtorch_cuda is linked: an extension that was built beside a CPU torch also serves a CUDA torch. With
// FLASHSLOTH_EMULATE kernels run on the CPU (tests/emulator), so the same bindings serve CPU tensors.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/tensor.h"

// The dispatch key of ops over CUDA kernels: STABLE_TORCH_LIBRARY_IMPL(flashsloth, FLASHSLOTH_CUDA_KEY, m).
#if defined(FLASHSLOTH_EMULATE)
#define FLASHSLOTH_CUDA_KEY CPU
#else
#define FLASHSLOTH_CUDA_KEY CUDA
#endif

namespace flashsloth {

#if defined(FLASHSLOTH_EMULATE)

struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  const cudaStream_t stream = nullptr;
};

#else

// Torch's current stream on a device, from the library that torch has loaded.
inline cudaStream_t current_stream(int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto ask = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  if (ask == nullptr)
    throw std::runtime_error("CUDA kernels: expected a torch with CUDA, this one has no libtorch_cuda.so loaded");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(ask(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Where a launch goes: while it lives the device of `t` is current; `stream` is torch's current stream there.
//   const OnDeviceOf where(x);
//   cuda::some_kernel(args, where.stream);
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& t) : stream(current_stream(t.get_device_index())), guard(t.get_device_index()) {
    // The CUDA runtime linked into this library is not torch's, and has a current device of its own.
    if (const cudaError_t error = cudaSetDevice(t.get_device_index()))
      throw std::runtime_error(std::string("cudaSetDevice failed: ") + cudaGetErrorString(error));
  }
  const cudaStream_t stream;

 private:
  const torch::stable::accelerator::DeviceGuard guard;
};

#endif

// The dispatcher calls a CUDA kernel when one tensor is on a GPU; the others may be elsewhere. Arguments are tensors,
// optional tensors and lists of tensors.
template <class... Rest>
void expect_one_device(const Expect& expect, const Tensor& first, const Rest&... rest) {
  const auto fits = [&](const auto& argument) {
    using T = std::decay_t<decltype(argument)>;
    const auto here = [&](const Tensor& t) { return t.device() == first.device(); };
    if constexpr (std::is_same_v<T, Tensor>) {
      return here(argument);
    } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
      return !argument || here(*argument);
    } else {
      for (const Tensor& t : argument)
        if (!here(t)) return false;
      return true;
    }
  };
  expect((fits(rest) && ...), "expected all tensors on one device");
}

}  // namespace flashsloth
