// Picks the copy of each kernel that was compiled for the instruction set in use (see isa.h).
#include "embedded_query.h"
#include "isa.h"
#include "sparse_prefill.h"
#include "spatial_pool.h"

#if defined(__x86_64__)
#define FLASHSLOTH_DISPATCH(kernel, Args)            \
  namespace avx512 {                                 \
  void kernel(const Args&);                          \
  }                                                  \
  namespace avx2 {                                   \
  void kernel(const Args&);                          \
  }                                                  \
  namespace baseline {                               \
  void kernel(const Args&);                          \
  }                                                  \
  void kernel(const Args& args) {                    \
    switch (isa()) {                                 \
      case Isa::avx512: return avx512::kernel(args); \
      case Isa::avx2: return avx2::kernel(args);     \
      default: return baseline::kernel(args);        \
    }                                                \
  }
#else
#define FLASHSLOTH_DISPATCH(kernel, Args) \
  namespace baseline {                    \
  void kernel(const Args&);               \
  }                                       \
  void kernel(const Args& args) { baseline::kernel(args); }
#endif

namespace flashsloth::cpu {
FLASHSLOTH_DISPATCH(spatial_pool_forward, SpatialPoolForward)
FLASHSLOTH_DISPATCH(spatial_pool_backward, SpatialPoolBackward)
FLASHSLOTH_DISPATCH(image_state, ImageState)
FLASHSLOTH_DISPATCH(embedded_query_forward, EmbeddedQueryForward)
FLASHSLOTH_DISPATCH(embedded_query_backward, EmbeddedQueryBackward)
FLASHSLOTH_DISPATCH(sparse_prefill_forward, SparsePrefillForward)
FLASHSLOTH_DISPATCH(sparse_prefill_backward, SparsePrefillBackward)
}  // namespace flashsloth::cpu
