// Barriers in shared memory, and the shared memory of other blocks. Included by emulator.cpp.
#include "../../csrc/cuda/hopper.cuh"

#include "machine.h"

namespace flashsloth::emulator {

// A cluster address has the block's rank plus one above these bits; a plain shared address is one's own.
constexpr int kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;

// What a barrier's 8 bytes hold, to find those that were never initialised or were overwritten.
constexpr uint64_t kBarrierMark = 0x7265697272616221u;

static Block& block_of(uint32_t address, const char* what) {
  Block& own = *self().in;
  const uint32_t tag = address >> kRankShift;
  if (tag == 0 || tag - 1 == own.rank) return own;
  if (tag - 1 >= own.cluster->blocks.size()) fail("%s: %08x is no address of this cluster", what, address);
  Block& block = *own.cluster->blocks[tag - 1];
  if (own.cluster->phase == 0) fail("%s: before cluster_sync block %u may not have started", what, block.rank);
  if (block.live == 0) fail("%s: block %u of the cluster has ended", what, block.rank);
  return block;
}

MBarrier& mbarrier_at(Block& block, uint32_t address, const char* what) {
  uint64_t mark;
  std::memcpy(&mark, shared_bytes(block, address, 8, 8, what), sizeof mark);
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("%s: there is no mbarrier at shared address %u", what, address);
  if (mark != kBarrierMark) fail("%s: the mbarrier at shared address %u was overwritten", what, address);
  return found->second;
}

MBarrier& visible_mbarrier_at(Block& block, uint32_t address, const char* what) {
  MBarrier& barrier = mbarrier_at(block, address, what);
  if (!barrier.visible)
    fail("%s: no mbarrier_init_fence since the mbarrier at shared address %u was made", what, address);
  return barrier;
}

void mbarrier_count(MBarrier& barrier, uint32_t arrivals, int64_t expected_bytes, int64_t bytes_came) {
  if (barrier.pending < arrivals) fail("mbarrier: more arrivals than the %u it was made for", barrier.expected);
  barrier.pending -= arrivals;
  barrier.bytes += expected_bytes - bytes_came;
  if (barrier.bytes >= 1 << 20 || barrier.bytes <= -(1 << 20))
    fail("mbarrier: %lld bytes pending, the limit is 2^20 - 1", static_cast<long long>(barrier.bytes));
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
    std::vector<MBarrier::Waiter> still;
    for (const auto& waiter : barrier.waiters) {
      if (waiter.parity == barrier.phase) {
        still.push_back(waiter);
      } else {
        machine().wake(waiter.thread);
      }
    }
    barrier.waiters.swap(still);
  }
  machine().progress();
}

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

void mbarrier_init(uint32_t barrier, uint32_t count) {
  machine().require(90, "mbarrier_init");
  if (count == 0 || count >= 1u << 20) fail("mbarrier_init: count %u, 1 to 2^20 - 1 are allowed", count);
  Block& block = *self().in;
  std::memcpy(shared_bytes(barrier, 8, 8, "mbarrier_init"), &kBarrierMark, sizeof kBarrierMark);
  MBarrier& state = block.mbarriers[barrier];
  if (!state.waiters.empty() || state.polling != 0) fail("mbarrier_init of a barrier that threads wait for");
  state = MBarrier{};
  state.expected = state.pending = count;
}

void mbarrier_init_fence() {
  for (auto& [address, barrier] : self().in->mbarriers) barrier.visible = true;
}

void fence_proxy_async() {
  machine().require(90, "fence_proxy_async");
  self().in->proxy_fenced = true;
  mbarrier_init_fence();
}

void set_registers(const char* what, int registers) {
  machine().require(90, what);
  warpgroup_collective(what, registers, [](const std::vector<Thread*>& threads, int count) {
    threads[0]->in->warpgroups[threads[0]->rank / 128].registers = count;
  });
}

void mbarrier_arrive(uint32_t barrier) { mbarrier_count(mbarrier_at(*self().in, barrier, "mbarrier_arrive"), 1, 0, 0); }

void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  mbarrier_count(mbarrier_at(*self().in, barrier, "mbarrier_arrive_expect_tx"), 1, bytes, 0);
}

void mbarrier_arrive_cluster(uint32_t barrier) {
  Block& block = block_of(barrier, "mbarrier_arrive_cluster");
  mbarrier_count(visible_mbarrier_at(block, barrier & kOffsetMask, "mbarrier_arrive_cluster"), 1, 0, 0);
}

void cp_async_mbarrier_arrive(uint32_t barrier) {
  Thread& thread = self();
  mbarrier_at(*thread.in, barrier, "cp_async_mbarrier_arrive");
  const size_t end = thread.copies.size();
  if (thread.copies_landed >= end) {
    mbarrier_arrive(barrier);
    return;
  }
  ++thread.copies_watched;
  machine().add_copy({thread.in, barrier, [&thread, barrier, end] {
                        land_copies(thread, end);
                        --thread.copies_watched;
                        mbarrier_count(mbarrier_at(*thread.in, barrier, "cp_async_mbarrier_arrive"), 1, 0, 0);
                      }});
}

bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  MBarrier& state = mbarrier_at(*self().in, barrier, "mbarrier_try_wait");
  if (parity > 1) fail("mbarrier_try_wait: parity %u is neither 0 nor 1", parity);
  if (state.phase != parity) return true;
  machine().spin("mbarrier_try_wait", &state);
  return state.phase != parity;
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  MBarrier& state = mbarrier_at(*self().in, barrier, "mbarrier_wait");
  if (parity > 1) fail("mbarrier_wait: parity %u is neither 0 nor 1", parity);
  if (state.phase != parity) return;
  state.waiters.push_back({&self(), parity});
  machine().wait("mbarrier_wait");
}

// ---- Shared memory of the cluster ----

uint32_t cluster_address(uint32_t shared, uint32_t rank) {
  machine().require(90, "cluster_address");
  if (rank >= self().in->cluster->blocks.size())
    fail("cluster_address: rank %u in a cluster of %zu", rank, self().in->cluster->blocks.size());
  return (shared & kOffsetMask) | (rank + 1) << kRankShift;
}

template <class T>
static T load(uint32_t address, const char* what) {
  machine().require(90, what);
  T v;
  std::memcpy(&v, shared_bytes(block_of(address, what), address & kOffsetMask, sizeof v, sizeof v, what), sizeof v);
  return v;
}

template <class T>
static void store(uint32_t address, const T& v, const char* what) {
  machine().require(90, what);
  std::memcpy(shared_bytes(block_of(address, what), address & kOffsetMask, sizeof v, sizeof v, what), &v, sizeof v);
}

float load_cluster(uint32_t address) { return load<float>(address, "load_cluster"); }
float4 load_cluster4(uint32_t address) { return load<float4>(address, "load_cluster4"); }
void store_cluster(uint32_t address, float v) { store(address, v, "store_cluster"); }
void store_cluster4(uint32_t address, float4 v) { store(address, v, "store_cluster4"); }

}  // namespace flashsloth::cuda
