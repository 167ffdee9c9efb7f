// Element types of the CPU kernels: float, double, bfloat16 and float16, computed in fp32 (double in fp64).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace flashsloth::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What sums, softmax and statistics are kept in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Everything below is compiled with the instruction set of the file that includes it, so it may not be shared
// between files: an AVX-512 copy picked by the linker would crash elsewhere.
namespace {

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

#if defined(__FLT16_MANT_DIG__)
inline float load(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, sizeof half);
  return static_cast<float>(half);
}
#else
inline float load(Float16 x) {
  // Shift exponent and mantissa into place, then rescale: exact for normal and subnormal numbers alike.
  const uint32_t magnitude = (x.bits & 0x7FFFu) << 13, sign = (x.bits & 0x8000u) << 16;
  float out;
  std::memcpy(&out, &magnitude, sizeof out);
  out *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &out, sizeof bits);
  if ((x.bits & 0x7C00u) == 0x7C00u) bits |= 0x7F800000u;  // infinity, NaN
  bits |= sign;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
#endif

// Rounds to nearest, ties to even.
template <class T>
inline T store(Acc<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(x != x ? 0x7FC0u : rounded)};
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__FLT16_MANT_DIG__)
    const _Float16 half = static_cast<_Float16>(x);
    T out;
    std::memcpy(&out, &half, sizeof out);
    return out;
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
      half = 0x7E00u;  // NaN
    } else if (magnitude >= 0x477FF000u) {
      half = 0x7C00u;  // rounds past the largest half
    } else if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 leaves the rounded mantissa in the low bits of the sum.
      float value;
      std::memcpy(&value, &magnitude, sizeof value);
      value += 0.5f;
      std::memcpy(&half, &value, sizeof half);
      half -= 0x3F000000u;
    } else {
      half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
#endif
  } else {
    return x;
  }
}

// Calls body with a null pointer of the element type: with_type(dtype, [&](auto* type) { using T = ...; }).
template <class F>
inline void with_type(DType dtype, F&& body) {
  switch (dtype) {
    case DType::float32: return body(static_cast<float*>(nullptr));
    case DType::float64: return body(static_cast<double*>(nullptr));
    case DType::bfloat16: return body(static_cast<BFloat16*>(nullptr));
    case DType::float16: return body(static_cast<Float16*>(nullptr));
  }
}

}  // namespace
}  // namespace flashsloth::cpu
