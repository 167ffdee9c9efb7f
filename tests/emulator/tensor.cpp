// TMA: bulk copies and boxes of tensors. Included by emulator.cpp.
#include "../../csrc/cuda/hopper.cuh"
#include "machine.h"

namespace flashsloth::emulator {

// What this emulator keeps in a CUtensorMap.
struct TensorMap {
  uint64_t mark;
  char* address;
  uint64_t sizes[5], strides[5];  // elements; bytes
  uint16_t box[5];
  uint8_t rank, element_bytes, swizzle_bits;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
constexpr uint64_t kTensorMapMark = 0x70616D726F736E74u;

static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                             CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap out{};
  out.mark = kTensorMapMark;
  out.address = static_cast<char*>(address);
  out.rank = static_cast<uint8_t>(rank);
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: out.element_bytes = 2; break;
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: out.element_bytes = 4; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: out.swizzle_bits = 0; break;
    case CU_TENSOR_MAP_SWIZZLE_32B: out.swizzle_bits = 1; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: out.swizzle_bits = 2; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: out.swizzle_bits = 3; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  const uint64_t row = static_cast<uint64_t>(box[0]) * out.element_bytes;
  if (rank < 1 || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      reinterpret_cast<uintptr_t>(address) % 16 != 0 || row % 16 != 0 ||
      (out.swizzle_bits != 0 && row > 16u << out.swizzle_bits))
    return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256 || element_strides[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    out.sizes[i] = sizes[i];
    out.box[i] = static_cast<uint16_t>(box[i]);
    out.strides[i] = i == 0 ? out.element_bytes : strides[i - 1];
    if (i > 0 && (out.strides[i] % 16 != 0 || out.strides[i] >= uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
  }
  std::memcpy(map, &out, sizeof out);
  return CUDA_SUCCESS;
}

void* driver_entry_point(const char* symbol) {
  return std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
}

static TensorMap read_map(const CUtensorMap& map, int rank, const char* what) {
  machine().require(90, what);
  TensorMap out;
  std::memcpy(&out, &map, sizeof out);
  if (out.mark != kTensorMapMark) fail("%s: the tensor map was not encoded", what);
  if (out.rank != rank) fail("%s: %d coordinates for a tensor map of %d dimensions", what, rank, out.rank);
  if (out.swizzle_bits != 0 && out.box[0] * out.element_bytes != 16 << out.swizzle_bits)
    fail("%s: rows of %d bytes in a %d-byte swizzle: narrower ones are not modelled", what,
         out.box[0] * out.element_bytes, 16 << out.swizzle_bits);
  return out;
}

static uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls chunk(shared address of 16 bytes, their global address or null, how many of them are inside) over a box. A box
// is a sequence of rows of whole 16-byte chunks; the swizzle moves chunks by address bits.
template <class Chunk>
static void for_chunks(const TensorMap& map, uint32_t shared, const std::array<int, 5>& at, Chunk chunk) {
  const int per_chunk = 16 / map.element_bytes;
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (uint32_t row = 0; row < rows; ++row) {
    char* base = map.address;
    bool inside = true;
    uint32_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = at[static_cast<size_t>(i)] + static_cast<int64_t>(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && index >= 0 && index < static_cast<int64_t>(map.sizes[i]);
      base += index * static_cast<int64_t>(map.strides[i]);
    }
    for (int x = 0; x < map.box[0]; x += per_chunk, shared += 16) {
      const uint32_t mask = (1u << map.swizzle_bits) - 1;
      const uint32_t address = shared ^ (shared >> 7 & mask) << 4;
      for (int i = 0; i < per_chunk; ++i) {
        const int64_t index = at[0] + static_cast<int64_t>(x) + i;
        const bool element = inside && index >= 0 && index < static_cast<int64_t>(map.sizes[0]);
        chunk(address + static_cast<uint32_t>(i * map.element_bytes),
              element ? base + index * map.element_bytes : nullptr);
      }
    }
  }
}

static void poison(Block& block, uint32_t shared, uint32_t bytes, const char* what) {
  shared_bytes(block, shared, bytes, 16, what);
  const std::vector<char> nothing(bytes, static_cast<char>(kPoison));
  proxy_write(block, shared, nothing.data(), bytes);
}

static void load_box(Block& block, uint32_t shared, const CUtensorMap& encoded, uint32_t barrier, int rank,
                     const std::array<int, 5>& at, const char* what) {
  const TensorMap map = read_map(encoded, rank, what);
  const uint32_t bytes = box_bytes(map);
  if (shared % 128 != 0) fail("%s: shared address %u is not a multiple of 128", what, shared);
  poison(block, shared, bytes, what);
  visible_mbarrier_at(block, barrier, what);
  machine().add_copy({&block, barrier, [&block, shared, map, barrier, at, bytes, what] {
                        for_chunks(map, shared, at, [&](uint32_t to, const char* from) {
                          static constexpr char kZero[4] = {};
                          proxy_write(block, to, from != nullptr ? from : kZero, map.element_bytes);
                        });
                        mbarrier_count(mbarrier_at(block, barrier, what), 0, 0, bytes);
                      }});
}

static void store_box(const CUtensorMap& encoded, uint32_t shared, int rank, const std::array<int, 5>& at,
                      const char* what) {
  const TensorMap map = read_map(encoded, rank, what);
  const uint32_t bytes = box_bytes(map);
  Block& block = *self().in;
  if (shared % 128 != 0) fail("%s: shared address %u is not a multiple of 128", what, shared);
  shared_bytes(shared, bytes, 128, what);
  auto data = std::make_shared<std::vector<char>>();
  self().stores.push_back({[&block, shared, bytes, data] {
                             const char* from = proxy_bytes(block, shared, bytes, 16, "tma_store");
                             data->assign(from, from + bytes);
                           },
                           [map, shared, at, data] {
                             for_chunks(map, shared, at, [&](uint32_t from, char* to) {
                               if (to != nullptr) std::memcpy(to, data->data() + (from - shared), map.element_bytes);
                             });
                           }});
}

}  // namespace flashsloth::emulator

namespace flashsloth::cuda {

using namespace emulator;

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  machine().require(90, "bulk_load");
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk_load: %u bytes from %p: both are multiples of 16", bytes, global);
  Block& block = *self().in;
  poison(block, shared, bytes, "bulk_load");
  visible_mbarrier_at(block, barrier, "bulk_load");
  machine().add_copy({&block, barrier, [&block, shared, global, bytes, barrier] {
                        proxy_write(block, shared, global, bytes);
                        mbarrier_count(mbarrier_at(block, barrier, "bulk_load"), 0, 0, bytes);
                      }});
}

void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
  machine().require(90, "bulk_store");
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail("bulk_store: %u bytes to %p: both are multiples of 16", bytes, global);
  Block& block = *self().in;
  shared_bytes(shared, bytes, 16, "bulk_store");
  auto data = std::make_shared<std::vector<char>>();
  self().stores.push_back({[&block, shared, bytes, data] {
                             const char* from = proxy_bytes(block, shared, bytes, 16, "bulk_store");
                             data->assign(from, from + bytes);
                           },
                           [global, bytes, data] { std::memcpy(global, data->data(), bytes); }});
}

void bulk_commit() { self().store_groups.push_back(self().stores.size()); }

void bulk_wait_pending(int pending, bool written) {
  Thread& thread = self();
  if (thread.store_groups.size() <= static_cast<size_t>(pending)) return;
  const size_t end = thread.store_groups[thread.store_groups.size() - static_cast<size_t>(pending) - 1];
  for (; thread.stores_read < end; ++thread.stores_read) thread.stores[thread.stores_read].read();
  if (!written) return;
  for (; thread.stores_written < end; ++thread.stores_written) thread.stores[thread.stores_written].write();
}

void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y) {
  load_box(*self().in, shared, map, barrier, 2, {x, y}, "tma_load 2D");
}
void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z) {
  load_box(*self().in, shared, map, barrier, 3, {x, y, z}, "tma_load 3D");
}
void tma_load(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  load_box(*self().in, shared, map, barrier, 4, {x, y, z, w}, "tma_load 4D");
}

void tma_load_multicast(uint32_t shared, const CUtensorMap& map, uint32_t barrier, uint16_t blocks, int x, int y) {
  Cluster& cluster = *self().in->cluster;
  if (blocks == 0 || blocks >> cluster.blocks.size() != 0)
    fail("tma_load_multicast: mask %04x in a cluster of %zu blocks", blocks, cluster.blocks.size());
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank)
    if (blocks >> rank & 1) load_box(*cluster.blocks[rank], shared, map, barrier, 2, {x, y}, "tma_load_multicast");
}

void tma_store(const CUtensorMap& map, uint32_t shared, int x, int y) {
  store_box(map, shared, 2, {x, y}, "tma_store 2D");
}
void tma_store(const CUtensorMap& map, uint32_t shared, int x, int y, int z) {
  store_box(map, shared, 3, {x, y, z}, "tma_store 3D");
}

}  // namespace flashsloth::cuda
