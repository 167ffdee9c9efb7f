// Who runs next. Included by emulator.cpp.
#include "machine.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace flashsloth::emulator {

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (machine().current == nullptr) throw std::runtime_error(text);
  const Thread& thread = self();
  throw std::runtime_error("block " + name(thread.block) + ", thread " + name(thread.thread) + ": " + text);
}

int lane() { return static_cast<int>(self().lane()); }
unsigned live_lanes() { return own_warp().live; }

// ---- Choosing ----

unsigned Machine::choose(unsigned mask) {
  if (!shuffled()) return static_cast<unsigned>(__builtin_ctz(mask));
  const unsigned turn = static_cast<unsigned>(random_() & 31);
  const unsigned turned = mask >> turn | (turn == 0 ? 0 : mask << (32 - turn));
  return (static_cast<unsigned>(__builtin_ctz(turned)) + turn) & 31;
}

// Stays with the block and the warp that run, as long as they can; shuffled, changes now and then.
Thread* Machine::pick() {
  Block* block = current_block_;
  if (block == nullptr || block->warps_ready == 0 || (shuffled() && blocks_.size() > 1 && (random_() & 63) == 0)) {
    const size_t count = blocks_.size();
    const size_t first = count == 0 || !shuffled() ? 0 : random_() % count;
    block = nullptr;
    for (size_t i = 0; i < count && block == nullptr; ++i) {
      Block* candidate = blocks_[(first + i) % count];
      if (candidate->warps_ready != 0) block = candidate;
    }
    if (block == nullptr) return nullptr;
    current_block_ = block;
  }
  const bool stay = (block->warps_ready >> block->current_warp & 1) != 0 && !(shuffled() && (random_() & 31) == 0);
  if (!stay) block->current_warp = choose(block->warps_ready);
  const Warp& warp = block->warps[block->current_warp];
  return &block->threads[block->current_warp * 32 + choose(warp.ready)];
}

void Machine::wake(Thread* thread) {
  thread->state = Thread::State::ready;
  Block& block = *thread->in;
  block.warps[thread->rank / 32].ready |= 1u << thread->lane();
  block.warps_ready |= 1u << thread->rank / 32;
}

// ---- Switching ----

void Machine::select(Thread* next) {
  current = next;
  if (next == nullptr) return;
  threadIdx = next->thread;
  blockIdx = next->block;
}

void Machine::leave() {
  Thread* from = current;
  Thread* next = pick();
  if (next == from) return;
  select(next);
  from->fiber.switch_to(next != nullptr ? next->fiber : main_);
}

static void not_ready(Thread* thread) {
  Block& block = *thread->in;
  Warp& warp = block.warps[thread->rank / 32];
  warp.ready &= ~(1u << thread->lane());
  if (warp.ready == 0) block.warps_ready &= ~(1u << thread->rank / 32);
}

void Machine::wait(const char* at) {
  Thread* thread = current;
  thread->at = at;
  thread->state = Thread::State::waiting;
  not_ready(thread);
  leave();
}

void Machine::spin(const char* at, MBarrier* polled) {
  Thread* thread = current;
  thread->at = at;
  thread->state = Thread::State::spinning;
  thread->polled = polled;
  if (polled != nullptr) ++polled->polling;
  spinning_.push_back(thread);
  not_ready(thread);
  leave();
  if (polled != nullptr) --polled->polling;
  thread->polled = nullptr;
}

void Machine::enter() {
  Machine& m = get();
  try {
    m.body_(m.arguments_);
    check_finished(*m.current);
    m.finish(m.current);
  } catch (...) {
    m.error_ = std::current_exception();
  }
  Thread* thread = m.current;
  Thread* next = m.error_ ? nullptr : m.pick();
  m.select(next);
  thread->fiber.switch_to(next != nullptr ? next->fiber : m.main_);
  std::abort();  // nobody resumes a thread that ended
}

// ---- Launch ----

void Machine::run(const cudaLaunchConfig_t& config, dim3 cluster, bool overlaps, void (*body)(const void*),
                  const void* arguments) {
  const char* seed = std::getenv("FLASHSLOTH_EMULATE_SEED");
  seed_ = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
  random_.seed(seed_);
  grid_ = config.gridDim;
  block_ = config.blockDim;
  gridDim = grid_;
  blockDim = block_;
  cluster_ = cluster;
  shared_bytes_ = static_cast<uint32_t>(config.dynamicSmemBytes);
  body_ = body;
  arguments_ = arguments;

  const uint64_t clusters = static_cast<uint64_t>(grid_.x / cluster.x) * (grid_.y / cluster.y) * (grid_.z / cluster.z);
  order_.resize(clusters);
  for (uint64_t i = 0; i < clusters; ++i) order_[i] = i;
  if (shuffled()) std::shuffle(order_.begin(), order_.end(), random_);
  const Architecture& gpu = Architecture::get();
  const size_t per_cluster = static_cast<size_t>(cluster.x) * cluster.y * cluster.z;
  const size_t threads = static_cast<size_t>(block_.x) * block_.y * block_.z;
  const auto blocks =
      static_cast<size_t>(gpu.resident_blocks(threads, shared_bytes_)) * static_cast<size_t>(gpu.multiprocessors);
  resident_limit_ = std::max<size_t>(1, blocks / per_cluster);
  admitted_ = 0;
  progress();
  dependency_waited_ = false;
  error_ = nullptr;

  try {
    while (admitted_ < order_.size() || !resident_.empty()) {
      if (resident_.empty()) admit();
      Thread* next = pick();
      if (next != nullptr) {
        select(next);
        main_.switch_to(next->fiber);
        current = nullptr;
        if (error_) std::rethrow_exception(error_);
      }
      retire();
      if (!resident_.empty() && pick() == nullptr) unstick();
    }
    if (overlaps && !dependency_waited_)
      throw std::runtime_error("launched to overlap the kernel before it, but nobody called grid_dependency_wait");
  } catch (...) {
    clear();
    throw;
  }
  clear();
}

void Machine::admit() {
  const uint64_t index = order_[admitted_++];
  const unsigned columns = grid_.x / cluster_.x, rows = grid_.y / cluster_.y;
  const unsigned cx = static_cast<unsigned>(index % columns), cy = static_cast<unsigned>(index / columns % rows),
                 cz = static_cast<unsigned>(index / columns / rows);
  const unsigned threads = block_.x * block_.y * block_.z;
  auto cluster = std::make_unique<Cluster>();
  for (unsigned z = 0; z < cluster_.z; ++z)
    for (unsigned y = 0; y < cluster_.y; ++y)
      for (unsigned x = 0; x < cluster_.x; ++x) {
        auto block = std::make_unique<Block>();
        block->cluster = cluster.get();
        block->rank = static_cast<unsigned>(cluster->blocks.size());
        block->shared_bytes = shared_bytes_;
        const size_t bytes = (shared_bytes_ + kRedZone + 1023) / 1024 * 1024;
        block->shared = static_cast<char*>(std::aligned_alloc(1024, bytes));
        block->proxy = static_cast<char*>(std::malloc(bytes));
        if (block->shared == nullptr || block->proxy == nullptr) throw std::bad_alloc();
        std::memset(block->shared, kPoison, bytes);
        std::memset(block->proxy, kPoison, bytes);
        block->threads.resize(threads);
        block->warps.resize((threads + 31) / 32);
        block->warpgroups.resize((threads + 127) / 128);
        block->live = threads;
        for (unsigned rank = 0; rank < threads; ++rank) {
          Thread& thread = block->threads[rank];
          thread.thread = {rank % block_.x, rank / block_.x % block_.y, rank / (block_.x * block_.y)};
          thread.block = {cx * cluster_.x + x, cy * cluster_.y + y, cz * cluster_.z + z};
          thread.rank = rank;
          thread.in = block.get();
          thread.stack = stacks_.take();
          thread.fiber.start(thread.stack, Stacks::kBytes, &Machine::enter);
          block->warps[rank / 32].live |= 1u << rank % 32;
          wake(&thread);
        }
        cluster->live += threads;
        blocks_.push_back(block.get());
        cluster->blocks.push_back(std::move(block));
      }
  resident_.push_back(std::move(cluster));
  progress();
}

void Machine::finish(Thread* thread) {
  if (Stacks::overflowed(thread->stack)) fail("stack overflow: a thread has %zu bytes", Stacks::kBytes);
  thread->state = Thread::State::done;
  thread->at = "its end";
  not_ready(thread);
  Block& block = *thread->in;
  block.warps[thread->rank / 32].live &= ~(1u << thread->lane());
  --block.live;
  --block.cluster->live;
  thread_left(block);
  progress();
}

// What a block may not leave behind.
void Machine::inspect(Block& block) const {
  const std::string where = "block " + name(block.threads[0].block) + ": ";
  if (block.copies_pending > 0)
    throw std::runtime_error(where + "ended while a copy to its shared memory was under way");
  for (uint32_t byte = 0; byte < kRedZone / 2; ++byte)
    if (static_cast<unsigned char>(block.shared[block.shared_bytes + byte]) != kPoison)
      throw std::runtime_error(where + "wrote " + std::to_string(byte) + " bytes past the end of its " +
                               std::to_string(block.shared_bytes) + " bytes of shared memory");
  const int pool = 65536 / 128;
  int wanted = 0;
  for (const Warpgroup& group : block.warpgroups) wanted += group.registers;
  if (wanted > pool)
    throw std::runtime_error(where + "increase_registers waits forever: its warpgroups want " + std::to_string(wanted) +
                             " registers for each of 128 threads, there are " + std::to_string(pool));
}

// Takes away clusters that are done.
void Machine::retire() {
  for (size_t i = 0; i < resident_.size();) {
    Cluster& cluster = *resident_[i];
    if (cluster.live > 0) {
      ++i;
      continue;
    }
    for (const auto& block : cluster.blocks) {
      inspect(*block);
      for (Thread& thread : block->threads) stacks_.give_back(thread.stack);
      std::free(block->shared);
      std::free(block->proxy);
      blocks_.erase(std::find(blocks_.begin(), blocks_.end(), block.get()));
    }
    if (current_block_ != nullptr && current_block_->cluster == &cluster) current_block_ = nullptr;
    resident_.erase(resident_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

// After an error threads are abandoned where they stand.
void Machine::clear() {
  current = nullptr;
  for (const auto& cluster : resident_)
    for (const auto& block : cluster->blocks) {
      for (Thread& thread : block->threads)
        if (thread.stack != nullptr) stacks_.give_back(thread.stack);
      std::free(block->shared);
      std::free(block->proxy);
    }
  resident_.clear();
  blocks_.clear();
  pending_.clear();
  spinning_.clear();
  current_block_ = nullptr;
}

// ---- When nobody can run ----

void Machine::add_copy(PendingCopy copy) {
  ++copy.block->copies_pending;
  pending_.push_back(std::move(copy));
}

// Lands a copy whose barrier somebody waits for.
bool Machine::land_one() {
  std::vector<size_t> wanted;
  for (size_t i = 0; i < pending_.size(); ++i) {
    const MBarrier& barrier = mbarrier_at(*pending_[i].block, pending_[i].barrier, "a copy's barrier");
    if (barrier.waiters.empty() && barrier.polling == 0) continue;
    wanted.push_back(i);
    if (!shuffled()) break;
  }
  if (wanted.empty()) return false;
  const size_t index = wanted[shuffled() ? random_() % wanted.size() : 0];
  PendingCopy copy = std::move(pending_[index]);
  pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(index));
  --copy.block->copies_pending;
  copy.land();
  progress();
  return true;
}

void Machine::unstick() {
  constexpr int kRoundsBeforeMoreBlocks = 2, kRepeatedBeforeDeadlock = 64, kRoundsBeforeDeadlock = 100000;
  if (land_one()) {
    // A landing that completed nothing is followed by the next.
  } else if (!spinning_.empty() && idle_rounds_ >= kRoundsBeforeMoreBlocks && admitted_ < order_.size() &&
             resident_.size() < resident_limit_) {
    // Twice as many each time: those that wait for a whole grid get there in few rounds.
    const size_t more = std::min({resident_.size(), resident_limit_ - resident_.size(), order_.size() - admitted_});
    for (size_t i = 0; i < more; ++i) admit();
    return;
  } else if (spinning_.empty() || repeated_rounds_ >= kRepeatedBeforeDeadlock ||
             idle_rounds_ >= kRoundsBeforeDeadlock) {
    throw std::runtime_error(deadlock());
  } else {
    ++idle_rounds_;
    ++repeated_rounds_;
  }
  for (Thread* thread : spinning_) wake(thread);
  spinning_.clear();
}

std::string Machine::deadlock() const {
  std::string text = "deadlock:";
  int lines = 0;
  for (const Block* block : blocks_) {
    std::vector<std::pair<const char*, std::vector<const Thread*>>> groups;
    for (const Thread& thread : block->threads) {
      auto group = std::find_if(groups.begin(), groups.end(),
                                [&](const auto& g) { return std::strcmp(g.first, thread.at) == 0; });
      if (group == groups.end()) group = groups.insert(groups.end(), {thread.at, {}});
      group->second.push_back(&thread);
    }
    for (const auto& [at, threads] : groups) {
      if (++lines > 8) return text + " ...";
      text += std::string(lines > 1 ? ";" : "") + " block " + name(block->threads[0].block) + ": " +
              std::to_string(threads.size()) + " threads at " + at + ", the first " + name(threads[0]->thread);
    }
  }
  if (admitted_ < order_.size()) text += "; " + std::to_string(order_.size() - admitted_) + " clusters not started";
  return text;
}

}  // namespace flashsloth::emulator
