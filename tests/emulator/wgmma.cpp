// Products of a warpgroup, done when they are waited for. Included by emulator.cpp.
#include "../../csrc/cuda/wgmma.cuh"

#include "machine.h"

namespace flashsloth::emulator {

namespace {

// The fields of a descriptor, and where element (mn, k) of its operand lies.
struct Descriptor {
  uint32_t start, leading, stride, swizzle_bits;
  bool mn_major;

  Descriptor(uint64_t bits, bool mn_major_) : mn_major(mn_major_) {
    constexpr uint32_t kBitsOfMode[4] = {0, 3, 2, 1};
    start = static_cast<uint32_t>(bits & 0x3FFF) << 4;
    leading = static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4;
    stride = static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4;
    swizzle_bits = kBitsOfMode[bits >> 62];
    if ((bits >> 49 & 7) != 0) fail("wgmma: a descriptor's base offset is not modelled, align the swizzle's pattern");
  }

  // In chunks of 8 elements (16 bytes) along the major dimension.
  uint32_t chunk(uint32_t mn, uint32_t k) const {
    const uint32_t width = 1u << swizzle_bits;  // of the swizzle's rows, in chunks
    uint32_t offset;
    if (!mn_major) {
      const uint32_t next = swizzle_bits == 0 ? leading : 16;
      offset = mn % 8 * width * 16 + mn / 8 * stride + k / 8 * next;
    } else if (swizzle_bits == 0) {
      offset = mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      offset = mn / 8 % width * 16 + mn / 8 / width * leading + k % 8 * width * 16 + k / 8 * stride;
    }
    const uint32_t address = start + offset;
    return address ^ (address >> 7 & (width - 1)) << 4;
  }
};

// Rows x 16 of an operand as floats, [k][row] as the product below wants them.
void gather(Block& block, const Descriptor& descriptor, bool is_bf16, uint32_t rows, float* out, const char* what) {
  uint16_t chunk[8];
  if (descriptor.mn_major) {
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t mn = 0; mn < rows; mn += 8) {
        std::memcpy(chunk, proxy_bytes(block, descriptor.chunk(mn, k), 16, 16, what), 16);
        for (uint32_t i = 0; i < 8; ++i) out[k * rows + mn + i] = element_to_float(chunk[i], is_bf16);
      }
  } else {
    for (uint32_t mn = 0; mn < rows; ++mn)
      for (uint32_t k = 0; k < 16; k += 8) {
        std::memcpy(chunk, proxy_bytes(block, descriptor.chunk(mn, k), 16, 16, what), 16);
        for (uint32_t i = 0; i < 8; ++i) out[(k + i) * rows + mn] = element_to_float(chunk[i], is_bf16);
      }
  }
}

void multiply(Thread* threads, size_t group, size_t index) {
  const Wgmma& first = threads[0].groups.group(group)[index];
  Block& block = *threads[0].in;
  const auto n = static_cast<uint32_t>(first.registers) * 2;
  std::vector<float> a(16 * 64), b(16 * n), d(64 * n);
  gather(block, Descriptor(first.b_descriptor, first.b_mn_major), first.bf16, n, b.data(), "wgmma, operand B");
  if (!first.a_in_registers)
    gather(block, Descriptor(first.a_descriptor, first.a_mn_major), first.bf16, 64, a.data(), "wgmma, operand A");

  for (uint32_t thread = 0; thread < 128; ++thread) {
    const Wgmma& own = threads[thread].groups.group(group)[index];
    if (own.registers != first.registers || own.a_descriptor != first.a_descriptor ||
        own.b_descriptor != first.b_descriptor || own.accumulate != first.accumulate || own.bf16 != first.bf16 ||
        own.a_in_registers != first.a_in_registers || own.a_mn_major != first.a_mn_major ||
        own.b_mn_major != first.b_mn_major)
      fail("wgmma: threads 0 and %u of the warpgroup disagree on its operands", thread);
    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    if (own.a_in_registers)
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t half = 0; half < 2; ++half)
          a[(column + i / 2 * 8 + half) * 64 + row + i % 2 * 8] =
              element_to_float(static_cast<uint16_t>(own.a[i] >> 16 * half), own.bf16);
    const std::vector<float>& values = threads[thread].accumulators.at(own.d).values;
    for (uint32_t i = 0; i < n / 2; ++i)
      d[(row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2] = own.accumulate ? values[i] : 0.0f;
  }
  for (uint32_t m = 0; m < 64; ++m)
    for (uint32_t k = 0; k < 16; ++k) {
      const float factor = a[k * 64 + m];
      for (uint32_t j = 0; j < n; ++j) d[m * n + j] += factor * b[k * n + j];
    }
  for (uint32_t thread = 0; thread < 128; ++thread) {
    Wgmma& own = threads[thread].groups.group(group)[index];
    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    const auto found = threads[thread].accumulators.find(own.d);
    for (uint32_t i = 0; i < n / 2; ++i)
      found->second.values[i] = d[(row + i % 4 / 2 * 8) * n + i / 4 * 8 + column + i % 2];
    --found->second.products;
  }
}

// A product is one instruction of four warps: it is done when all of them have issued it and the first waits, and is
// then done for all, operands read; but no warp waits for another's wait.
void execute(Thread* threads, size_t group) {
  const size_t products = threads[0].groups.group(group).size();
  for (size_t thread = 1; thread < 128; ++thread)
    if (threads[thread].groups.group(group).size() != products)
      fail("wgmma: threads 0 and %zu of the warpgroup issued different products", thread);
  for (size_t index = 0; index < products; ++index) multiply(threads, group, index);
}

bool all_committed(const Thread* threads, size_t groups) {
  return std::all_of(threads, threads + 128, [&](const Thread& t) { return t.groups.committed() >= groups; });
}

// Results reach the registers of the thread that waited.
void deliver(Thread& thread, size_t groups) {
  for (; thread.groups.delivered < groups; ++thread.groups.delivered) {
    for (const Wgmma& product : thread.groups.waiting.front()) {
      const auto found = thread.accumulators.find(product.d);
      if (found == thread.accumulators.end() || found->second.products > 0) continue;
      std::copy(found->second.values.begin(), found->second.values.end(), product.d);
      thread.accumulators.erase(found);
    }
    thread.groups.waiting.pop_front();
  }
}

Thread* warpgroup_threads(Block& block, size_t index) {
  if (block.threads.size() < (index + 1) * 128)
    fail("wgmma: this warpgroup has only %zu threads", block.threads.size() - index * 128);
  return block.threads.data() + index * 128;
}

}  // namespace

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

void wgmma_fence() {
  machine().require(90, "wgmma_fence");
  self().wgmma_fenced = true;
}

void wgmma(bool is_bf16, float* d, int registers, const uint32_t* a_registers, uint64_t a, Major a_major, uint64_t b,
           Major b_major, bool accumulate) {
  Thread& thread = self();
  if (!thread.wgmma_fenced) fail("wgmma: no wgmma_fence since the last group");
  Wgmma product{
      d, registers, a_registers != nullptr, accumulate, is_bf16, a_major == Major::mn, b_major == Major::mn, {}, a, b};
  if (a_registers != nullptr) std::copy(a_registers, a_registers + 4, product.a);
  const auto [place, fresh] = thread.accumulators.try_emplace(d);
  Accumulator& accumulator = place->second;
  if (fresh) {
    accumulator.values.assign(d, d + registers);
    std::memset(d, kPoison, sizeof(float) * static_cast<size_t>(registers));
  } else if (accumulator.values.size() != static_cast<size_t>(registers)) {
    fail("wgmma: the accumulators are at work in a product of another width");
  }
  ++accumulator.products;
  thread.products.push_back(product);
}

void wgmma_commit() {
  Thread& thread = self();
  thread.wgmma_fenced = false;
  thread.groups.waiting.push_back(std::move(thread.products));
  thread.products.clear();
  Warpgroup& group = thread.in->warpgroups[thread.rank / 128];
  const Thread* threads = warpgroup_threads(*thread.in, thread.rank / 128);
  for (size_t i = 0; i < group.waiting.size();) {
    if (!all_committed(threads, group.waiting[i].second)) {
      ++i;
      continue;
    }
    machine().wake(group.waiting[i].first);
    group.waiting.erase(group.waiting.begin() + static_cast<std::ptrdiff_t>(i));
    machine().progress();
  }
}

void wgmma_wait_pending(int pending) {
  Thread& thread = self();
  const size_t committed = thread.groups.committed(), keep = static_cast<size_t>(pending);
  const size_t wanted = committed > keep ? committed - keep : 0;
  if (wanted <= thread.groups.delivered) return;
  Warpgroup& group = thread.in->warpgroups[thread.rank / 128];
  Thread* threads = warpgroup_threads(*thread.in, thread.rank / 128);
  if (!all_committed(threads, wanted)) {
    group.waiting.emplace_back(&thread, wanted);
    machine().wait("wgmma_wait");
  }
  for (; group.groups_done < wanted; ++group.groups_done) execute(threads, group.groups_done);
  deliver(thread, wanted);
}

}  // namespace flashsloth::cuda
