// Parts of the kernels' host interface (gemm.h, isa.h) that need no torch.
#include <cstdlib>
#include <cstring>
#include <new>

#include "gemm.h"
#include "isa.h"

namespace flashsloth::cpu {
namespace {

bool poison = false;

Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

const Isa detected = detect_isa();
Isa chosen = detected;

}  // namespace

Scratch::Scratch(size_t bytes) : block_(nullptr) {
  if (bytes == 0) return;
  block_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (block_ == nullptr) throw std::bad_alloc();
  if (poison) std::memset(block_, 0xFF, bytes);  // all ones is a NaN in every floating-point type
}
Scratch::~Scratch() { std::free(block_); }

void set_scratch_poison(bool on) { poison = on; }

Isa detected_isa() { return detected; }

Isa isa() { return chosen; }

bool set_isa(Isa wanted) {
  if (wanted > detected) return false;
  chosen = wanted;
  return true;
}

const char* isa_name(Isa which) {
  switch (which) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

}  // namespace flashsloth::cpu
