// Products of many rows: a block's tile of Rows x Columns, C = A B, operands through a ring of shared memory stages.
//
// A warp takes 16 rows and 32 columns. A stage holds 64 numbers along k of both operands in rows of 128 bytes, whose
// 16-byte pieces are exchanged so that eight rows' pieces use all banks.
#pragma once

#include "instructions.cuh"

namespace flashsloth::cuda {

enum class BLayout { columns_by_k, k_by_columns };  // which index of B is contiguous: the second

template <class T, int Rows, int Columns, BLayout Layout>
struct TileGemm {
  static constexpr int kRows = Rows, kColumns = Columns, kDepth = 64, kStages = 4;
  static constexpr int kWarpsAcross = Columns / 32, kThreads = Rows / 16 * kWarpsAcross * 32;
  static constexpr int kBRows = Layout == BLayout::columns_by_k ? kColumns : kDepth;  // of a stage
  static constexpr int kStageBytes = (kRows + kBRows) * 128;
  static_assert(Layout == BLayout::columns_by_k || kColumns == 64, "rows of a stage are 128 bytes");
  static constexpr int kSharedBytes = kStages * kStageBytes;
  using Accumulator = float[4][4];  // [8 columns][as mma_m16n8k16 says]

  // Where this thread's accumulator lies in the tile: rows row() and row() + 8, columns column(j) and the next.
  __device__ static int row() { return warp() / kWarpsAcross * 16 + threadIdx.x % 32 / 4; }
  __device__ static int column(int j) { return warp() % kWarpsAcross * 32 + 8 * j + threadIdx.x % 4 * 2; }

  // acc += A B over k in [0, depth). a_row(m), and by layout b_row(n) or b_row(k): where that row of the operand
  // begins, or null: zeros. `width`: numbers in rows of B where they are not along k. Depth and width are multiples of
  // 8. B is loaded before the previous kernel is waited for, A after. after_stage(first k) follows each 64 along k.
  template <class ARow, class BRow, class AfterStage>
  __device__ static void run(Accumulator& acc, int depth, int width, ARow a_row, BRow b_row, AfterStage after_stage) {
    char* const shared = dynamic_shared();
    const int steps = (depth + kDepth - 1) / kDepth;
    const auto stage = [&](int step) { return shared + step % kStages * kStageBytes; };
    const auto load_a = [&](int step) {
      const int k = step * kDepth + piece() * 8;
      load<kRows>(stage(step), [&](int row) -> const T* {
        const T* const from = k < depth ? a_row(row) : nullptr;
        return from == nullptr ? nullptr : from + k;
      });
    };
    const auto load_b = [&](int step) {
      load<kBRows>(stage(step) + kRows * 128, [&](int row) -> const T* {
        const int k = step * kDepth + (Layout == BLayout::columns_by_k ? piece() * 8 : row);
        const int column = Layout == BLayout::columns_by_k ? row : piece() * 8;
        if (k >= depth || (Layout == BLayout::k_by_columns && column >= width)) return nullptr;
        const T* const from = b_row(Layout == BLayout::columns_by_k ? column : k);
        return from == nullptr ? nullptr : from + (Layout == BLayout::columns_by_k ? k : column);
      });
    };
    for (int step = 0; step < kStages - 1 && step < steps; ++step) load_b(step);
    grid_dependency_wait();
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) load_a(step);
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // this stage has landed, and all are done with the one that is loaded next
      if (const int next = step + kStages - 1; next < steps) load_a(next), load_b(next);
      cp_async_commit();
      multiply(acc, shared_address(stage(step)));
      after_stage(step * kDepth);
    }
    cp_async_wait<0>();
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int piece() { return threadIdx.x % 8; }
  __device__ static uint32_t swizzled(int row, int piece) {
    return static_cast<uint32_t>(row * 128 + (piece ^ (row % 8)) * 16);
  }

  // This thread's piece of Count rows; from(row) is where it comes from, or null.
  template <int Count, class From>
  __device__ static void load(char* to, From from) {
    constexpr int kAtOnce = kThreads / 8;
#pragma unroll
    for (int i = 0; i < (Count + kAtOnce - 1) / kAtOnce; ++i) {
      const int row = threadIdx.x / 8 + i * kAtOnce;
      if (Count % kAtOnce != 0 && row >= Count) break;
      const T* const source = from(row);
      cp_async16(shared_address(to + swizzled(row, piece())), source, source != nullptr);
    }
  }

  __device__ static void multiply(Accumulator& acc, uint32_t stage) {
    const int lane = threadIdx.x % 32, first_row = warp() / kWarpsAcross * 16,
              first_column = warp() % kWarpsAcross * 32;
    const uint32_t b_stage = stage + kRows * 128;
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[4], b[2][4];
      ldmatrix_x4(a, stage + swizzled(first_row + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first_column + 16 * i;
        if constexpr (Layout == BLayout::columns_by_k) {
          ldmatrix_x4(b[i], b_stage + swizzled(column + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        } else {
          ldmatrix_x4_trans(b[i], b_stage + swizzled(16 * k + lane % 16, column / 8 + lane / 16));
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_m16n8k16<T>(acc[j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
};

}  // namespace flashsloth::cuda
