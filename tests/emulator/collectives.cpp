// Where threads meet: warps, warpgroups, barriers of a block and of a cluster. Included by emulator.cpp.
#include "machine.h"

namespace flashsloth::emulator {

// ---- Warps ----

void warp_collective(const char* what, unsigned mask, void* operand, void (*finish)(WarpOperands, unsigned mask)) {
  Thread& thread = self();
  Warp& warp = own_warp();
  const unsigned bit = 1u << thread.lane();
  const unsigned full = thread.rank / 32 + 1 == thread.in->warps.size() && thread.in->threads.size() % 32 != 0
                            ? (1u << thread.in->threads.size() % 32) - 1
                            : 0xFFFFFFFFu;
  mask &= full;
  if ((mask & bit) == 0) fail("%s: the mask %08x leaves out the calling lane %u", what, mask, thread.lane());

  Meeting* meeting = nullptr;
  for (Meeting& candidate : warp.meetings) {
    if (candidate.arrived == 0) {
      if (meeting == nullptr) meeting = &candidate;
    } else if ((candidate.mask & mask) != 0) {
      if (candidate.mask != mask || std::strcmp(candidate.what, what) != 0)
        fail("lanes of a warp disagree: lane %u is at %s (mask %08x), lane %d at %s (mask %08x)", thread.lane(), what,
             mask, __builtin_ctz(candidate.arrived), candidate.what, candidate.mask);
      meeting = &candidate;
      break;
    }
  }
  if (meeting == nullptr) fail("%s: more than %zu groups of lanes at work in a warp", what, warp.meetings.size());
  meeting->what = what;
  meeting->mask = mask;
  meeting->arrived |= bit;
  meeting->operands[thread.lane()] = operand;
  if (meeting->arrived != mask) {
    machine().wait(what);
    return;
  }
  finish(meeting->operands, mask);
  meeting->arrived = 0;
  const unsigned base = thread.rank / 32 * 32;
  for (unsigned others = mask & ~bit; others != 0; others &= others - 1)
    machine().wake(&thread.in->threads[base + static_cast<unsigned>(__builtin_ctz(others))]);
  machine().progress();
}

void warpgroup_collective(const char* what, int parameter, void (*finish)(const std::vector<Thread*>&, int)) {
  Thread& thread = self();
  const unsigned index = thread.rank / 128;
  if (thread.in->threads.size() < (index + 1) * 128)
    fail("%s: this warpgroup has only %zu threads", what, thread.in->threads.size() - index * 128);
  Warpgroup& group = thread.in->warpgroups[index];
  if (!group.arrived.empty() && (std::strcmp(group.what, what) != 0 || group.parameter != parameter))
    fail("threads of a warpgroup disagree: this one is at %s (%d), others at %s (%d)", what, parameter, group.what,
         group.parameter);
  group.what = what;
  group.parameter = parameter;
  group.arrived.push_back(&thread);
  if (group.arrived.size() < 128) {
    machine().wait(what);
    return;
  }
  std::vector<Thread*> threads(128);
  for (Thread* arrived : group.arrived) threads[arrived->rank % 128] = arrived;
  finish(threads, parameter);
  group.arrived.clear();
  for (Thread* other : threads)
    if (other != &thread) machine().wake(other);
  machine().progress();
}

// ---- Barriers of a block ----

static void complete(NamedBarrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    thread->vote_result = barrier.result;
    if (thread != machine().current) machine().wake(thread);
  }
  barrier.waiting.clear();
  barrier.came.clear();
  barrier.arrived = 0;
  barrier.threads = 0;
  machine().progress();
}

// Barrier 0 of the threads that have not ended.
int block_barrier(const char* what, Vote vote, int value) {
  Thread& thread = self();
  NamedBarrier& barrier = thread.in->barriers[0];
  if (barrier.arrived == 0) {
    barrier.vote = vote;
    barrier.result = vote == Vote::all ? 1 : 0;
  } else if (barrier.vote != vote) {
    fail("%s meets another kind of __syncthreads", what);
  }
  if (vote == Vote::any) barrier.result |= value != 0;
  if (vote == Vote::all) barrier.result &= value != 0;
  if (vote == Vote::count) barrier.result += value != 0;
  ++barrier.arrived;
  barrier.waiting.push_back(&thread);
  if (barrier.arrived == thread.in->live) {
    complete(barrier);
  } else {
    machine().wait(what);
  }
  return thread.vote_result;
}

static void cluster_complete_if_all_came(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Thread* thread : cluster.waiting) machine().wake(thread);
  cluster.waiting.clear();
  machine().progress();
}

void thread_left(Block& block) {
  NamedBarrier& barrier = block.barriers[0];
  if (barrier.arrived > 0 && barrier.arrived == block.live) complete(barrier);
  cluster_complete_if_all_came(*block.cluster);
}

static bool named_barrier(const char* what, uint32_t id, uint32_t threads, bool waits) {
  Thread& thread = self();
  Block& block = *thread.in;
  if (id == 0 || id > 15) fail("%s: barrier %u, 1 to 15 are free (0 is __syncthreads)", what, id);
  if (threads == 0 || threads % 32 != 0 || threads > (block.threads.size() + 31) / 32 * 32)
    fail("%s: barrier %u of %u threads: a multiple of 32, at most the block's %zu", what, id, threads,
         block.threads.size());
  NamedBarrier& barrier = block.barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.came.assign(block.threads.size(), false);
  }
  if (barrier.threads != threads)
    fail("%s: barrier %u of %u threads, others said %u", what, id, threads, barrier.threads);
  if (barrier.came[thread.rank]) fail("%s: this thread comes twice to barrier %u before it completes", what, id);
  barrier.came[thread.rank] = true;
  ++barrier.arrived;
  if (waits) barrier.waiting.push_back(&thread);
  if (barrier.arrived < threads) return false;
  complete(barrier);
  return true;
}

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

void named_barrier_sync(uint32_t id, uint32_t threads) {
  static constexpr const char* kNames[16] = {"",
                                             "named_barrier_sync 1",
                                             "named_barrier_sync 2",
                                             "named_barrier_sync 3",
                                             "named_barrier_sync 4",
                                             "named_barrier_sync 5",
                                             "named_barrier_sync 6",
                                             "named_barrier_sync 7",
                                             "named_barrier_sync 8",
                                             "named_barrier_sync 9",
                                             "named_barrier_sync 10",
                                             "named_barrier_sync 11",
                                             "named_barrier_sync 12",
                                             "named_barrier_sync 13",
                                             "named_barrier_sync 14",
                                             "named_barrier_sync 15"};
  if (!named_barrier("named_barrier_sync", id, threads, true)) machine().wait(kNames[id]);
}

void named_barrier_arrive(uint32_t id, uint32_t threads) { named_barrier("named_barrier_arrive", id, threads, false); }

// ---- Clusters ----

uint32_t cluster_rank() {
  machine().require(90, "cluster_rank");
  return self().in->rank;
}

uint32_t cluster_size() {
  machine().require(90, "cluster_size");
  return static_cast<uint32_t>(self().in->cluster->blocks.size());
}

void cluster_arrive() {
  machine().require(90, "cluster_arrive");
  Cluster& cluster = *self().in->cluster;
  if (cluster.arrivals[&self()]++ != cluster.phase) fail("cluster_arrive twice without cluster_wait");
  ++cluster.arrived;
  cluster_complete_if_all_came(cluster);
}

void cluster_wait() {
  machine().require(90, "cluster_wait");
  Cluster& cluster = *self().in->cluster;
  const unsigned arrivals = cluster.arrivals[&self()];
  if (arrivals == 0) fail("cluster_wait without cluster_arrive");
  if (cluster.phase >= arrivals) return;
  cluster.waiting.push_back(&self());
  machine().wait("cluster_wait");
}

}  // namespace flashsloth::cuda
