// Loops the compiler turns into vector code: exp, conversions, dot products.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace flashsloth::cpu {
namespace {  // not shared between files, see types.h

// e^x with a relative error under 2^-22. Values below -87 give 0, so a masked score of -inf has no weight.
inline float fast_exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float n = std::nearbyint(clamped * 1.44269504f);
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts keeps r exact
  float p = 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : p * power;
}
inline double fast_exp(double x) { return std::exp(x); }

template <class T>
inline void widen(const T* from, Acc<T>* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

template <class T>
inline void narrow(const Acc<T>* from, T* to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = store<T>(from[i]);
}

template <class T, class A = Acc<T>>
inline A dot(const T* a, const A* b, int64_t count) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += load(a[i]) * b[i];
  return sum;
}

// y += a * x
template <class T, class A = Acc<T>>
inline void axpy(A a, const T* x, A* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] += a * load(x[i]);
}

}  // namespace
}  // namespace flashsloth::cpu
