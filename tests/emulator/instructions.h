// The emulated side of csrc/cuda/instructions.cuh, which says what each function does.
#pragma once

namespace flashsloth::cuda {

inline constexpr bool kHasSm90a = true;  // FLASHSLOTH_EMULATE_ARCH decides when a kernel runs

char* dynamic_shared();
uint32_t shared_address(const void* pointer);

void ldmatrix(const char* what, uint32_t* registers, uint32_t row, int matrices, bool transposed);
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { ldmatrix("ldmatrix_x4", r, row, 4, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { ldmatrix("ldmatrix_x4_trans", r, row, 4, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) { ldmatrix("ldmatrix_x2", r, row, 2, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) { ldmatrix("ldmatrix_x2_trans", r, row, 2, true); }

void cp_async16(uint32_t shared, const void* global, bool valid = true);
void cp_async_commit();
void cp_async_wait_pending(int pending);
template <int Pending>
void cp_async_wait() {
  cp_async_wait_pending(Pending);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k16_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "mma_m16n8k16 takes bf16 or fp16");
  if constexpr (std::is_same_v<T, bf16>) {
    mma_m16n8k16_bf16(d, a, b0, b1);
  } else {
    mma_m16n8k16_fp16(d, a, b0, b1);
  }
}
uint32_t to_tf32(float x);
float exp2_approx(float x);

uint4 load_streaming16(const void* global);
void store_streaming16(void* global, uint4 v);
uint32_t load_acquire(const uint32_t* counter);
void add_release(uint32_t* counter, uint32_t value);

void named_barrier_sync(uint32_t id, uint32_t threads);
void named_barrier_arrive(uint32_t id, uint32_t threads);

// Launches run one after the other; but one that may overlap the launch before it must wait for that somewhere.
void grid_dependency_wait();
inline void grid_dependency_launch() {}

}  // namespace flashsloth::cuda
