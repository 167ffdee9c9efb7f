// The functions that nvcc knows without a header: barriers, shuffles, votes, atomics, bits, fast mathematics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

// ---- Barriers, fences ----

inline void __syncthreads() {
  flashsloth::emulator::block_barrier("__syncthreads", flashsloth::emulator::Vote::none, 0);
}
inline int __syncthreads_or(int predicate) {
  return flashsloth::emulator::block_barrier("__syncthreads_or", flashsloth::emulator::Vote::any, predicate);
}
inline int __syncthreads_and(int predicate) {
  return flashsloth::emulator::block_barrier("__syncthreads_and", flashsloth::emulator::Vote::all, predicate);
}
inline int __syncthreads_count(int predicate) {
  return flashsloth::emulator::block_barrier("__syncthreads_count", flashsloth::emulator::Vote::count, predicate);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  flashsloth::emulator::warp_collective("__syncwarp", mask, nullptr,
                                        [](flashsloth::emulator::WarpOperands, unsigned) {});
}
// Threads run one at a time, so every write is seen at once.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() { flashsloth::emulator::fail("__trap"); }

// ---- Shuffles and votes ----

namespace flashsloth::emulator {

template <class T>
struct Shuffle {
  T value, result;
  int source;  // lane of the warp
};

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> operand{value, value, source};
  warp_collective(what, mask, &operand, [](WarpOperands operands, unsigned mask) {
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      auto& own = *static_cast<Shuffle<T>*>(operands[lane]);
      if ((mask >> own.source & 1) == 0)
        fail("shuffle: lane %d reads lane %d, which is not in the mask", lane, own.source);
      own.result = static_cast<Shuffle<T>*>(operands[own.source])->value;
    }
  });
  return operand.result;
}

int lane();
unsigned live_lanes();

template <class Reduce>
unsigned vote(const char* what, unsigned mask, unsigned value, Reduce) {
  std::pair<unsigned, unsigned> operand{value, 0};
  warp_collective(what, mask, &operand, [](WarpOperands operands, unsigned mask) {
    unsigned result = Reduce::start;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1)
        result = Reduce::step(result, static_cast<std::pair<unsigned, unsigned>*>(operands[lane])->first, lane);
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) static_cast<std::pair<unsigned, unsigned>*>(operands[lane])->second = result;
  });
  return operand.second;
}

struct Ballot {
  static constexpr unsigned start = 0;
  static unsigned step(unsigned a, unsigned b, int lane) { return a | (b != 0 ? 1u << lane : 0u); }
};
struct Add {
  static constexpr unsigned start = 0;
  static unsigned step(unsigned a, unsigned b, int) { return a + b; }
};
struct Max {
  static constexpr unsigned start = 0;
  static unsigned step(unsigned a, unsigned b, int) { return a > b ? a : b; }
};
struct Min {
  static constexpr unsigned start = 0xFFFFFFFFu;
  static unsigned step(unsigned a, unsigned b, int) { return a < b ? a : b; }
};

}  // namespace flashsloth::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = flashsloth::emulator::lane();
  return flashsloth::emulator::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = flashsloth::emulator::lane(), source = lane ^ lanes;
  // As on the device: a later segment is not read, an earlier one is.
  return flashsloth::emulator::shuffle("__shfl_xor_sync", mask, value,
                                       source > (lane | (width - 1)) ? lane : source & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = flashsloth::emulator::lane(), source = lane - static_cast<int>(lanes);
  return flashsloth::emulator::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = flashsloth::emulator::lane(), source = lane + static_cast<int>(lanes);
  return flashsloth::emulator::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return flashsloth::emulator::vote("__ballot_sync", mask, predicate != 0, flashsloth::emulator::Ballot{});
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return flashsloth::emulator::vote("__reduce_add_sync", mask, value, flashsloth::emulator::Add{});
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return flashsloth::emulator::vote("__reduce_max_sync", mask, value, flashsloth::emulator::Max{});
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return flashsloth::emulator::vote("__reduce_min_sync", mask, value, flashsloth::emulator::Min{});
}
inline unsigned __activemask() { return flashsloth::emulator::live_lanes(); }

// ---- Atomics: threads run one at a time ----

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

// ---- Memory hints ----

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::common_type_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, std::common_type_t<T> value) {
  *address = value;
}

// ---- Bits ----

namespace flashsloth::emulator {
template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace flashsloth::emulator

inline unsigned __float_as_uint(float x) { return flashsloth::emulator::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return flashsloth::emulator::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return flashsloth::emulator::bit_cast<float>(x); }
inline float __int_as_float(int x) { return flashsloth::emulator::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}

// ---- Mathematics: at least as accurate as the device's ----

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp2f(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
