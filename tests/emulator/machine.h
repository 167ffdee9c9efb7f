// The emulated GPU: threads in warps in blocks in clusters, and the rule by which one of them runs.
#pragma once

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace flashsloth::emulator {

struct Block;
struct Cluster;
struct Thread;

// ---- What the pretended GPU has ----

struct Architecture {
  int compute_capability, multiprocessors, shared_per_block, shared_per_multiprocessor;

  static const Architecture& get() {
    static const Architecture chosen = [] {
      const char* name = std::getenv("FLASHSLOTH_EMULATE_ARCH");
      const int number = name == nullptr ? 90 : std::atoi(name);
      if (number == 80) return Architecture{80, 108, 163 * 1024, 164 * 1024};
      if (number == 90) return Architecture{90, 132, 227 * 1024, 228 * 1024};
      throw std::runtime_error(std::string("FLASHSLOTH_EMULATE_ARCH is 80 or 90, not ") + name);
    }();
    return chosen;
  }

  // Blocks of this size that one multiprocessor holds; registers are not modelled.
  int resident_blocks(size_t threads, size_t shared_bytes) const {
    const size_t warps = (threads + 31) / 32;
    return static_cast<int>(std::min(
        {size_t{32}, size_t{64} / warps, static_cast<size_t>(shared_per_multiprocessor) / (shared_bytes + 1024)}));
  }
};

// ---- Asynchronous work ----

// A copy that lands, and counts on its barrier, when nobody can run without it.
struct PendingCopy {
  Block* block;      // whose barrier it is
  uint32_t barrier;  // shared address
  std::function<void()> land;
};

struct CpAsync {
  uint32_t shared;
  const void* global;
  bool valid;
};

struct BulkStore {
  std::function<void()> read, write;
};

struct Wgmma {
  float* d;
  int registers;
  bool a_in_registers, accumulate, bf16, a_mn_major, b_mn_major;
  uint32_t a[4];
  uint64_t a_descriptor, b_descriptor;
};

struct Accumulator {
  std::vector<float> values;
  int products = 0;  // not yet done
};

// Groups of products of a thread: those committed and not yet waited for, and how many were waited for before.
struct WgmmaGroups {
  std::deque<std::vector<Wgmma>> waiting;
  size_t delivered = 0;

  size_t committed() const { return delivered + waiting.size(); }
  std::vector<Wgmma>& group(size_t index) { return waiting.at(index - delivered); }
};

// ---- Barriers ----

struct MBarrier {
  uint32_t expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
  struct Waiter {
    Thread* thread;
    uint32_t parity;
  };
  std::vector<Waiter> waiters;
  int polling = 0;       // threads in a loop of try_wait
  bool visible = false;  // to TMA and to the cluster: fenced since its initialisation
};

struct NamedBarrier {
  uint32_t threads = 0, arrived = 0;
  std::vector<Thread*> waiting;
  std::vector<bool> came;
  Vote vote = Vote::none;
  int result = 0;
};

// Threads that do one instruction together.
struct Meeting {
  const char* what = nullptr;
  unsigned mask = 0, arrived = 0;
  void* operands[32] = {};
};

// ---- Threads ----

struct Thread {
  enum class State { ready, waiting, spinning, done };

  uint3 thread, block;  // what it sees as threadIdx and blockIdx
  Fiber fiber;
  char* stack = nullptr;
  Block* in = nullptr;
  unsigned rank = 0;  // in the block
  State state = State::ready;
  const char* at = "its start";
  MBarrier* polled = nullptr;
  int vote_result = 0;
  const uint32_t* acquired = nullptr;  // the counter it last read by load_acquire, and what was there
  uint32_t acquired_value = 0;

  std::vector<CpAsync> copies;
  size_t copies_landed = 0;
  int copies_watched = 0;           // by mbarriers that they will arrive at
  std::vector<size_t> copy_groups;  // where each committed group ends in `copies`

  std::vector<BulkStore> stores;
  std::vector<size_t> store_groups;
  size_t stores_read = 0, stores_written = 0;

  bool wgmma_fenced = false;
  std::vector<Wgmma> products;
  WgmmaGroups groups;
  std::unordered_map<float*, Accumulator> accumulators;

  unsigned lane() const { return rank % 32; }
};

struct Warp {
  unsigned ready = 0, live = 0;
  std::array<Meeting, 4> meetings;  // of disjoint groups of lanes
};

struct Warpgroup {
  const char* what = nullptr;
  int parameter = 0;
  std::vector<Thread*> arrived;
  size_t groups_done = 0;                           // of wgmma products
  std::vector<std::pair<Thread*, size_t>> waiting;  // for that many groups to be committed by all
  int registers = 0;                                // what decrease_registers or increase_registers left each thread
};

// The shared memory of a block begins at this shared address, as it does on sm_90, whose first KiB is the system's.
constexpr uint32_t kSharedBase = 1024;
constexpr uint32_t kRedZone = 4096;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point format

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;  // in the cluster
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  unsigned warps_ready = 0, current_warp = 0, live = 0;
  char* shared = nullptr;
  char* proxy = nullptr;  // what wgmma and TMA see of it: ordinary stores arrive here by fence_proxy_async
  bool proxy_fenced = false;
  uint32_t shared_bytes = 0;
  std::array<NamedBarrier, 16> barriers;
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  int copies_pending = 0;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live = 0;
  // cluster_arrive and cluster_wait
  unsigned arrived = 0, phase = 0;
  std::vector<Thread*> waiting;
  std::unordered_map<const Thread*, unsigned> arrivals;  // how often each arrived
};

// ---- The machine ----

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void run(const cudaLaunchConfig_t& config, dim3 cluster, bool overlaps, void (*body)(const void*),
           const void* arguments);

  Thread* current = nullptr;

  // For the running thread: let others run until it is woken; or until nobody else can run.
  void wait(const char* at);
  void spin(const char* at, MBarrier* polled = nullptr);
  void wake(Thread* thread);
  // Something happened that another thread may have waited for; or a thread in a loop looked at something new.
  void progress() { idle_rounds_ = repeated_rounds_ = 0; }
  void looked_elsewhere() { repeated_rounds_ = 0; }

  void add_copy(PendingCopy copy);
  bool shuffled() const { return seed_ != 0; }
  // Somebody waited for the launches before this one.
  void dependency_waited() { dependency_waited_ = true; }

  void require(int compute_capability, const char* what) const {
    if (Architecture::get().compute_capability < compute_capability)
      fail("%s needs sm_%d, this is sm_%d (FLASHSLOTH_EMULATE_ARCH)", what, compute_capability,
           Architecture::get().compute_capability);
  }

 private:
  static void enter();
  void select(Thread* next);
  void finish(Thread* thread);
  void leave();
  void admit();
  void retire();
  void inspect(Block& block) const;
  void unstick();
  bool land_one();
  Thread* pick();
  unsigned choose(unsigned mask);
  std::string deadlock() const;
  void clear();

  dim3 grid_, block_, cluster_;
  uint32_t shared_bytes_ = 0;
  void (*body_)(const void*) = nullptr;
  const void* arguments_ = nullptr;

  Fiber main_;
  Stacks stacks_;
  std::vector<uint64_t> order_;  // of clusters
  size_t admitted_ = 0, resident_limit_ = 1;
  std::vector<std::unique_ptr<Cluster>> resident_;
  std::vector<Block*> blocks_;
  Block* current_block_ = nullptr;
  std::deque<PendingCopy> pending_;
  std::vector<Thread*> spinning_;
  int idle_rounds_ = 0, repeated_rounds_ = 0;  // in which threads only polled; and polled the same in vain
  bool dependency_waited_ = false;
  uint64_t seed_ = 0;
  std::mt19937_64 random_;
  std::exception_ptr error_;
};

inline Machine& machine() { return Machine::get(); }
inline Thread& self() { return *machine().current; }
inline Warp& own_warp() { return self().in->warps[self().rank / 32]; }

// A name for messages.
inline std::string name(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// The bytes that a shared address names, or an error saying what was out of bounds or misaligned.
char* shared_bytes(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
inline char* shared_bytes(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  return shared_bytes(*self().in, address, bytes, alignment, what);
}

// The same bytes as wgmma and TMA read them; and what they write, which everybody sees.
const char* proxy_bytes(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what);
void proxy_write(Block& block, uint32_t address, const void* from, uint32_t bytes);

// The common instruction of a warpgroup: the last thread to come runs `finish`.
void warpgroup_collective(const char* what, int parameter, void (*finish)(const std::vector<Thread*>&, int));

// mbarrier arithmetic, on the barrier of any block.
MBarrier& mbarrier_at(Block& block, uint32_t address, const char* what);
MBarrier& visible_mbarrier_at(Block& block, uint32_t address, const char* what);
void mbarrier_count(MBarrier& barrier, uint32_t arrivals, int64_t expected_bytes, int64_t bytes_came);

// Barriers count the threads that are left.
void thread_left(Block& block);
void land_copies(Thread& thread, size_t end);
// What a thread may not leave behind when it ends.
void check_finished(Thread& thread);

// The address of a driver function that is emulated.
void* driver_entry_point(const char* symbol);

float half_to_float(uint16_t bits);
inline float element_to_float(uint16_t bits, bool bf16) {
  if (!bf16) return half_to_float(bits);
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

}  // namespace flashsloth::emulator
