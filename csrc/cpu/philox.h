// Dropout mask by Philox4x32-10 (Salmon et al., 2011): a function of the seed and the position alone, hence the
// same on every backend and for every tiling. flashsloth_ops/reference/spatial_pool.py specifies the counters.
#pragma once

#include <cstdint>

namespace flashsloth::cpu {
namespace {  // not shared between files, see types.h

// keep[j] = 1 with probability 1 - p, else 0, for the `columns` units of one row; `columns` rounded up to a
// multiple of four is written.
inline void dropout_keep_row(int64_t seed, int64_t row, int64_t columns, double p, uint8_t* keep) {
  const uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  const uint32_t row_low = static_cast<uint32_t>(row), row_high = static_cast<uint32_t>(row >> 32);
  const uint64_t threshold = static_cast<uint64_t>(p * 4294967296.0);
#pragma omp simd
  for (int64_t quad = 0; quad < (columns + 3) / 4; ++quad) {
    uint32_t c0 = static_cast<uint32_t>(quad), c1 = row_low, c2 = row_high, c3 = 0, k0 = key0, k1 = key1;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(p1);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(p0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    keep[4 * quad] = c0 >= threshold;
    keep[4 * quad + 1] = c1 >= threshold;
    keep[4 * quad + 2] = c2 >= threshold;
    keep[4 * quad + 3] = c3 >= threshold;
  }
}

}  // namespace
}  // namespace flashsloth::cpu
