// The emulated side of csrc/cuda/hopper.cuh, which says what each function does.
#pragma once

namespace flashsloth::cuda {

void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes);
void mbarrier_arrive_cluster(uint32_t barrier);
inline void mbarrier_arrive_cluster_relaxed(uint32_t barrier) { mbarrier_arrive_cluster(barrier); }
void cp_async_mbarrier_arrive(uint32_t barrier);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }
void fence_proxy_async();

void set_registers(const char* what, int registers);
template <int N>
void decrease_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  set_registers("decrease_registers", N);
}
template <int N>
void increase_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  set_registers("increase_registers", N);
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
void bulk_store(void* global, uint32_t shared, uint32_t bytes);
void bulk_commit();
void bulk_wait_pending(int pending, bool written);
template <int Pending>
void bulk_wait() {
  bulk_wait_pending(Pending, true);
}
template <int Pending>
void bulk_wait_read() {
  bulk_wait_pending(Pending, false);
}

inline void tma_prefetch(const CUtensorMap&) {}
void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y);
void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z);
void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z, int w);
void tma_load_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier, uint16_t blocks, int x, int y);
void tma_store(const CUtensorMap& map, uint32_t shared, int x, int y);
void tma_store(const CUtensorMap& map, uint32_t shared, int x, int y, int z);

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive();
void cluster_wait();
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
uint32_t cluster_address(uint32_t shared, uint32_t rank);
float load_cluster(uint32_t address);
float4 load_cluster4(uint32_t address);
void store_cluster(uint32_t address, float v);
void store_cluster4(uint32_t address, float4 v);

}  // namespace flashsloth::cuda
