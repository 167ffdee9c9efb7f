// The emulator as one translation unit; emulator.h says how to compile and use it.
#include "emulator.h"

#include "collectives.cpp"
#include "hopper.cpp"
#include "runtime.cpp"
#include "scheduler.cpp"
#include "tensor.cpp"
#include "warp.cpp"
#include "wgmma.cpp"

namespace flashsloth::emulator {

void check_finished(Thread& thread) {
  if (thread.copies_landed < thread.copies.size() && thread.copies_watched == 0)
    fail("ended with cp_async copies that it never waited for");
  if (thread.stores_read < thread.stores.size()) fail("ended with bulk stores that still read its shared memory");
  if (!thread.products.empty() || !thread.groups.waiting.empty())
    fail("ended with wgmma products that it never waited for");
  for (; thread.stores_written < thread.stores.size(); ++thread.stores_written)
    thread.stores[thread.stores_written].write();
}

}  // namespace flashsloth::emulator
