// Tensor maps: what TMA needs to know of a tensor in global memory and of the box it copies. Encoded on the host by the
// driver, which is reached through the runtime, so nothing links against libcuda.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "hopper.cuh"

namespace flashsloth::cuda {

namespace detail {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
      cudaGetLastError();
      throw std::runtime_error(std::string("cuTensorMapEncodeTiled is not in the driver (12.0 or newer is needed): ") +
                               cudaGetErrorString(error));
    }
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return encode;
}

template <class Array>
std::string list(const Array& values) {
  std::string text = "(";
  for (const auto value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
  return text + ")";
}

template <class T>
constexpr CUtensorMapDataType tensor_map_type() {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16> || std::is_same_v<T, float>,
                "tensor maps are made for bf16, fp16 and float");
  if constexpr (std::is_same_v<T, bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if constexpr (std::is_same_v<T, fp16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

constexpr CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::bytes128: return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::bytes64: return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::bytes32: return CU_TENSOR_MAP_SWIZZLE_32B;
    case Swizzle::none: break;
  }
  return CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace detail

// Sizes and box in elements, innermost dimension first; strides in bytes, of the dimensions after the innermost (which
// is dense). Throws std::runtime_error naming all of it where the driver refuses: the address and the box's rows must
// be multiples of 16 bytes, strides too, a box dimension at most 256, the box's rows at most the swizzle's width.
template <class T, int Rank>
CUtensorMap tensor_map(const T* address, const std::array<uint64_t, Rank>& sizes,
                       const std::array<uint64_t, Rank - 1>& stride_bytes, const std::array<uint32_t, Rank>& box,
                       Swizzle swizzle) {
  static_assert(Rank >= 2 && Rank <= 5, "a tensor map has 2 to 5 dimensions here");
  std::array<uint32_t, Rank> element_strides;
  element_strides.fill(1);
  CUtensorMap map;
  const CUresult result = detail::encode_tiled()(
      &map, detail::tensor_map_type<T>(), Rank, const_cast<T*>(address),
      reinterpret_cast<const cuuint64_t*>(sizes.data()), reinterpret_cast<const cuuint64_t*>(stride_bytes.data()),
      box.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, detail::tensor_map_swizzle(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refused (error " + std::to_string(static_cast<int>(result)) +
                             "): address " + std::to_string(reinterpret_cast<uintptr_t>(address)) + ", sizes " +
                             detail::list(sizes) + ", strides " + detail::list(stride_bytes) + " bytes, box " +
                             detail::list(box) + ", elements of " + std::to_string(sizeof(T)) +
                             " bytes, swizzle mode " + std::to_string(static_cast<int>(swizzle)));
  return map;
}

}  // namespace flashsloth::cuda
