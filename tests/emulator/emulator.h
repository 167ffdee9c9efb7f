// Runs CUDA kernels on the CPU, with the semantics of every instruction of csrc/cuda, so that they are provable without
// a GPU. A kernel file is compiled by an ordinary C++ compiler and linked with one file of this folder:
//
//   g++ -std=c++17 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -ftrivial-auto-var-init=pattern
//       -Wno-unknown-pragmas -Wno-psabi -DFLASHSLOTH_EMULATE
//       -I csrc/cuda -I tests/emulator -isystem $CUDA/include -include tests/emulator/emulator.h
//       -x c++ csrc/cuda/spatial_pool.cu -x none tests/emulator/emulator.cpp
//
// Only the headers of the CUDA toolkit are needed; nothing of its libraries. Visibility is hidden because the runtime's
// functions (cudaGetLastError, ...) are defined here again. No sanitizers: threads switch stacks under them.
//
// What it does
//   * A thread is a fiber; a warp's or block's common instruction (shuffle, ldmatrix, mma, __syncthreads) is done when
//     its last thread comes, and is an error when the threads disagree about it.
//   * One warp runs as far as it can before the next, so what is missing a barrier reads what was never written.
//     FLASHSLOTH_EMULATE_SEED=n (n > 0) shuffles blocks, warps and lanes instead, differently for each n.
//   * Blocks of a cluster run together. Blocks of a grid run one after the other, until one waits for another through
//     load_acquire: then as many join as a GPU holds at once.
//   * Asynchronous work lands as late as the rules allow: cp_async at its wait, TMA when nobody can run without it,
//     wgmma at its wait, which is also when it reads shared memory. Until then the destination holds NaN.
//   * wgmma and TMA see ordinary stores to shared memory only once a fence_proxy_async came between.
//   * Shared memory starts as NaN, local variables (by the compiler's flag above) as -1.7e38.
//   * FLASHSLOTH_EMULATE_ARCH=80 is an A100: the instructions of sm_90 are errors. Default: 90, an H200.
//
// What it cannot see: global accesses out of bounds, plain loads and stores to shared memory between barriers (but
// a write past its end is found when the block ends), bank conflicts, spilled registers, time.
// Kernels wait for each other through load_acquire and mbarrier waits alone: a loop on a volatile never yields here.
//
// An error makes the launch fail with cudaErrorLaunchFailure and its text, naming block and thread, is what
// cudaGetErrorString returns; launch_kernel (launch.cuh) throws it with the kernel's name.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

// ---- The language ----

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __cluster_dims__
#undef __maxnreg__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __shared__ _Pragma("GCC error \"shared memory comes from dynamic_shared(), which is all the emulator knows\"")

// Of the thread that runs; the scheduler sets them at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace flashsloth::emulator {

// Throws what becomes the launch's error, with block and thread put before it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Every lane in `mask` comes with its operand; the last to come runs `finish` for all, then all go on.
using WarpOperands = void* const (&)[32];
void warp_collective(const char* what, unsigned mask, void* operand, void (*finish)(WarpOperands, unsigned mask));

enum class Vote { none, any, all, count };
int block_barrier(const char* what, Vote vote, int value);

// ---- Launches ----

cudaError_t launch(const cudaLaunchConfig_t& config, const void* function, void (*body)(const void*),
                   const void* arguments) noexcept;

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel_ex(const cudaLaunchConfig_t* config, void (*function)(Parameters...),
                             Arguments&&... arguments) {
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{function, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  const auto body = [](const void* data) {
    const Call& call = *static_cast<const Call*>(data);
    std::apply(call.first, call.second);
  };
  return launch(*config, reinterpret_cast<const void*>(function), body, &call);
}

cudaError_t occupancy(int* blocks, int threads, size_t shared_bytes) noexcept;

template <class Function>
cudaError_t occupancy(int* blocks, Function*, int threads, size_t shared_bytes) {
  return occupancy(blocks, threads, shared_bytes);
}

}  // namespace flashsloth::emulator

#define cudaLaunchKernelEx ::flashsloth::emulator::launch_kernel_ex
#define cudaOccupancyMaxActiveBlocksPerMultiprocessor ::flashsloth::emulator::occupancy

#include "device_functions.h"
