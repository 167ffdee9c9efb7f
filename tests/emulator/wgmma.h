// The emulated side of csrc/cuda/wgmma.cuh, which says what each function does.
#pragma once

namespace flashsloth::cuda {

void wgmma_fence();
void wgmma_commit();
void wgmma_wait_pending(int pending);
template <int Pending>
void wgmma_wait() {
  wgmma_wait_pending(Pending);
}

void wgmma(bool is_bf16, float* d, int registers, const uint32_t* a_registers, uint64_t a, Major a_major, uint64_t b,
           Major b_major, bool accumulate);

template <class T, Major A, Major B, int Registers>
void wgmma_ss(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(Registers % 4 == 0 && Registers <= 128, "wgmma: N is a multiple of 8 up to 256");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "wgmma_ss takes bf16 or fp16");
  wgmma(std::is_same_v<T, bf16>, d, Registers, nullptr, a, A, b, B, accumulate);
}

template <class T, Major B, int Registers>
void wgmma_rs(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(Registers % 4 == 0 && Registers <= 128, "wgmma: N is a multiple of 8 up to 256");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "wgmma_rs takes bf16 or fp16");
  wgmma(std::is_same_v<T, bf16>, d, Registers, a, 0, Major::k, b, B, accumulate);
}

}  // namespace flashsloth::cuda
