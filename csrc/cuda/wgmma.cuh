// wgmma (sm_90a): products of a warpgroup, four warps that start at a multiple of 128 threads.
// D (64 x N, fp32 registers) = A (64 x 16, shared or registers) B (16 x N, shared) (+ D), elements bf16 or fp16.
//
// Order of use: wgmma_fence; products; wgmma_commit; wgmma_wait. Between the first product and the wait nobody touches
// D, the registers of A, or the shared operands. Shared operands written by ordinary stores need fence_proxy_async by
// the writers and a barrier before.
#pragma once

#include "hopper.cuh"

namespace flashsloth::cuda {

// The dimension whose neighbours lie side by side in memory: k, or the other one (m of A, n of B).
enum class Major : int { k = 0, mn = 1 };

// The 64-bit descriptor of a shared operand: bits 0-13 start address, 16-29 leading offset, 32-45 stride offset, all in
// units of 16 bytes; 62-63 swizzle. Rows below are lines of the swizzle's width W (128, 64, 32 bytes; none: 16).
//
// Major::k, tile [mn][k], a row of W bytes an mn, groups of 8 rows dense (8 W bytes):
//   stride_bytes  = from one group of 8 rows to the next: 8 W where rows follow each other;
//   leading_bytes = none only: from the first 8 k (16 bytes) to the next 8; unused with a swizzle.
//   The next 16 k inside a row: the start address + 32 bytes (the hardware swizzles the sum). Past W: the next tile.
// Major::mn, tile [k][mn], a row of W bytes a k, groups of 8 k dense (8 W bytes):
//   leading_bytes = from one W-byte column of mn to the next (N or M above W / 2 elements): its whole tile;
//   stride_bytes  = from 8 k to the next 8: 8 W where rows follow each other. (none: the two offsets change roles.)
//   The next 16 k: the start address + 16 rows.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared, Swizzle swizzle, uint32_t leading_bytes,
                                                     uint32_t stride_bytes) {
  return static_cast<uint64_t>((shared & 0x3FFFFu) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// The descriptor of an operand that starts `bytes` further: cheaper than building it anew.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

}  // namespace flashsloth::cuda

#if defined(FLASHSLOTH_EMULATE)
#include "wgmma.h"
#else

namespace flashsloth::cuda {

// Registers written before (D, A) are ready for the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The lists of accumulators that the assembly needs, for N = 8, 16, ..., 256: `_Dn` names the operands, `_On` binds
// them.
#define FLASHSLOTH_D1 "%0, %1, %2, %3"
#define FLASHSLOTH_D2 FLASHSLOTH_D1 ", %4, %5, %6, %7"
#define FLASHSLOTH_D3 FLASHSLOTH_D2 ", %8, %9, %10, %11"
#define FLASHSLOTH_D4 FLASHSLOTH_D3 ", %12, %13, %14, %15"
#define FLASHSLOTH_D5 FLASHSLOTH_D4 ", %16, %17, %18, %19"
#define FLASHSLOTH_D6 FLASHSLOTH_D5 ", %20, %21, %22, %23"
#define FLASHSLOTH_D7 FLASHSLOTH_D6 ", %24, %25, %26, %27"
#define FLASHSLOTH_D8 FLASHSLOTH_D7 ", %28, %29, %30, %31"
#define FLASHSLOTH_D9 FLASHSLOTH_D8 ", %32, %33, %34, %35"
#define FLASHSLOTH_D10 FLASHSLOTH_D9 ", %36, %37, %38, %39"
#define FLASHSLOTH_D11 FLASHSLOTH_D10 ", %40, %41, %42, %43"
#define FLASHSLOTH_D12 FLASHSLOTH_D11 ", %44, %45, %46, %47"
#define FLASHSLOTH_D13 FLASHSLOTH_D12 ", %48, %49, %50, %51"
#define FLASHSLOTH_D14 FLASHSLOTH_D13 ", %52, %53, %54, %55"
#define FLASHSLOTH_D15 FLASHSLOTH_D14 ", %56, %57, %58, %59"
#define FLASHSLOTH_D16 FLASHSLOTH_D15 ", %60, %61, %62, %63"
#define FLASHSLOTH_D17 FLASHSLOTH_D16 ", %64, %65, %66, %67"
#define FLASHSLOTH_D18 FLASHSLOTH_D17 ", %68, %69, %70, %71"
#define FLASHSLOTH_D19 FLASHSLOTH_D18 ", %72, %73, %74, %75"
#define FLASHSLOTH_D20 FLASHSLOTH_D19 ", %76, %77, %78, %79"
#define FLASHSLOTH_D21 FLASHSLOTH_D20 ", %80, %81, %82, %83"
#define FLASHSLOTH_D22 FLASHSLOTH_D21 ", %84, %85, %86, %87"
#define FLASHSLOTH_D23 FLASHSLOTH_D22 ", %88, %89, %90, %91"
#define FLASHSLOTH_D24 FLASHSLOTH_D23 ", %92, %93, %94, %95"
#define FLASHSLOTH_D25 FLASHSLOTH_D24 ", %96, %97, %98, %99"
#define FLASHSLOTH_D26 FLASHSLOTH_D25 ", %100, %101, %102, %103"
#define FLASHSLOTH_D27 FLASHSLOTH_D26 ", %104, %105, %106, %107"
#define FLASHSLOTH_D28 FLASHSLOTH_D27 ", %108, %109, %110, %111"
#define FLASHSLOTH_D29 FLASHSLOTH_D28 ", %112, %113, %114, %115"
#define FLASHSLOTH_D30 FLASHSLOTH_D29 ", %116, %117, %118, %119"
#define FLASHSLOTH_D31 FLASHSLOTH_D30 ", %120, %121, %122, %123"
#define FLASHSLOTH_D32 FLASHSLOTH_D31 ", %124, %125, %126, %127"
#define FLASHSLOTH_O(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FLASHSLOTH_O1 FLASHSLOTH_O(0)
#define FLASHSLOTH_O2 FLASHSLOTH_O1, FLASHSLOTH_O(4)
#define FLASHSLOTH_O3 FLASHSLOTH_O2, FLASHSLOTH_O(8)
#define FLASHSLOTH_O4 FLASHSLOTH_O3, FLASHSLOTH_O(12)
#define FLASHSLOTH_O5 FLASHSLOTH_O4, FLASHSLOTH_O(16)
#define FLASHSLOTH_O6 FLASHSLOTH_O5, FLASHSLOTH_O(20)
#define FLASHSLOTH_O7 FLASHSLOTH_O6, FLASHSLOTH_O(24)
#define FLASHSLOTH_O8 FLASHSLOTH_O7, FLASHSLOTH_O(28)
#define FLASHSLOTH_O9 FLASHSLOTH_O8, FLASHSLOTH_O(32)
#define FLASHSLOTH_O10 FLASHSLOTH_O9, FLASHSLOTH_O(36)
#define FLASHSLOTH_O11 FLASHSLOTH_O10, FLASHSLOTH_O(40)
#define FLASHSLOTH_O12 FLASHSLOTH_O11, FLASHSLOTH_O(44)
#define FLASHSLOTH_O13 FLASHSLOTH_O12, FLASHSLOTH_O(48)
#define FLASHSLOTH_O14 FLASHSLOTH_O13, FLASHSLOTH_O(52)
#define FLASHSLOTH_O15 FLASHSLOTH_O14, FLASHSLOTH_O(56)
#define FLASHSLOTH_O16 FLASHSLOTH_O15, FLASHSLOTH_O(60)
#define FLASHSLOTH_O17 FLASHSLOTH_O16, FLASHSLOTH_O(64)
#define FLASHSLOTH_O18 FLASHSLOTH_O17, FLASHSLOTH_O(68)
#define FLASHSLOTH_O19 FLASHSLOTH_O18, FLASHSLOTH_O(72)
#define FLASHSLOTH_O20 FLASHSLOTH_O19, FLASHSLOTH_O(76)
#define FLASHSLOTH_O21 FLASHSLOTH_O20, FLASHSLOTH_O(80)
#define FLASHSLOTH_O22 FLASHSLOTH_O21, FLASHSLOTH_O(84)
#define FLASHSLOTH_O23 FLASHSLOTH_O22, FLASHSLOTH_O(88)
#define FLASHSLOTH_O24 FLASHSLOTH_O23, FLASHSLOTH_O(92)
#define FLASHSLOTH_O25 FLASHSLOTH_O24, FLASHSLOTH_O(96)
#define FLASHSLOTH_O26 FLASHSLOTH_O25, FLASHSLOTH_O(100)
#define FLASHSLOTH_O27 FLASHSLOTH_O26, FLASHSLOTH_O(104)
#define FLASHSLOTH_O28 FLASHSLOTH_O27, FLASHSLOTH_O(108)
#define FLASHSLOTH_O29 FLASHSLOTH_O28, FLASHSLOTH_O(112)
#define FLASHSLOTH_O30 FLASHSLOTH_O29, FLASHSLOTH_O(116)
#define FLASHSLOTH_O31 FLASHSLOTH_O30, FLASHSLOTH_O(120)
#define FLASHSLOTH_O32 FLASHSLOTH_O31, FLASHSLOTH_O(124)

// One line a width: N, its lists, and the numbers of the operands after the accumulators.
#define FLASHSLOTH_WGMMA_WIDTHS(X, TYPE)                                                               \
  X(8, TYPE, FLASHSLOTH_D1, FLASHSLOTH_O1, "%4", "%5", "%6", "%7", "%8", "%9", "%10")                  \
  X(16, TYPE, FLASHSLOTH_D2, FLASHSLOTH_O2, "%8", "%9", "%10", "%11", "%12", "%13", "%14")             \
  X(24, TYPE, FLASHSLOTH_D3, FLASHSLOTH_O3, "%12", "%13", "%14", "%15", "%16", "%17", "%18")           \
  X(32, TYPE, FLASHSLOTH_D4, FLASHSLOTH_O4, "%16", "%17", "%18", "%19", "%20", "%21", "%22")           \
  X(40, TYPE, FLASHSLOTH_D5, FLASHSLOTH_O5, "%20", "%21", "%22", "%23", "%24", "%25", "%26")           \
  X(48, TYPE, FLASHSLOTH_D6, FLASHSLOTH_O6, "%24", "%25", "%26", "%27", "%28", "%29", "%30")           \
  X(56, TYPE, FLASHSLOTH_D7, FLASHSLOTH_O7, "%28", "%29", "%30", "%31", "%32", "%33", "%34")           \
  X(64, TYPE, FLASHSLOTH_D8, FLASHSLOTH_O8, "%32", "%33", "%34", "%35", "%36", "%37", "%38")           \
  X(72, TYPE, FLASHSLOTH_D9, FLASHSLOTH_O9, "%36", "%37", "%38", "%39", "%40", "%41", "%42")           \
  X(80, TYPE, FLASHSLOTH_D10, FLASHSLOTH_O10, "%40", "%41", "%42", "%43", "%44", "%45", "%46")         \
  X(88, TYPE, FLASHSLOTH_D11, FLASHSLOTH_O11, "%44", "%45", "%46", "%47", "%48", "%49", "%50")         \
  X(96, TYPE, FLASHSLOTH_D12, FLASHSLOTH_O12, "%48", "%49", "%50", "%51", "%52", "%53", "%54")         \
  X(104, TYPE, FLASHSLOTH_D13, FLASHSLOTH_O13, "%52", "%53", "%54", "%55", "%56", "%57", "%58")        \
  X(112, TYPE, FLASHSLOTH_D14, FLASHSLOTH_O14, "%56", "%57", "%58", "%59", "%60", "%61", "%62")        \
  X(120, TYPE, FLASHSLOTH_D15, FLASHSLOTH_O15, "%60", "%61", "%62", "%63", "%64", "%65", "%66")        \
  X(128, TYPE, FLASHSLOTH_D16, FLASHSLOTH_O16, "%64", "%65", "%66", "%67", "%68", "%69", "%70")        \
  X(136, TYPE, FLASHSLOTH_D17, FLASHSLOTH_O17, "%68", "%69", "%70", "%71", "%72", "%73", "%74")        \
  X(144, TYPE, FLASHSLOTH_D18, FLASHSLOTH_O18, "%72", "%73", "%74", "%75", "%76", "%77", "%78")        \
  X(152, TYPE, FLASHSLOTH_D19, FLASHSLOTH_O19, "%76", "%77", "%78", "%79", "%80", "%81", "%82")        \
  X(160, TYPE, FLASHSLOTH_D20, FLASHSLOTH_O20, "%80", "%81", "%82", "%83", "%84", "%85", "%86")        \
  X(168, TYPE, FLASHSLOTH_D21, FLASHSLOTH_O21, "%84", "%85", "%86", "%87", "%88", "%89", "%90")        \
  X(176, TYPE, FLASHSLOTH_D22, FLASHSLOTH_O22, "%88", "%89", "%90", "%91", "%92", "%93", "%94")        \
  X(184, TYPE, FLASHSLOTH_D23, FLASHSLOTH_O23, "%92", "%93", "%94", "%95", "%96", "%97", "%98")        \
  X(192, TYPE, FLASHSLOTH_D24, FLASHSLOTH_O24, "%96", "%97", "%98", "%99", "%100", "%101", "%102")     \
  X(200, TYPE, FLASHSLOTH_D25, FLASHSLOTH_O25, "%100", "%101", "%102", "%103", "%104", "%105", "%106") \
  X(208, TYPE, FLASHSLOTH_D26, FLASHSLOTH_O26, "%104", "%105", "%106", "%107", "%108", "%109", "%110") \
  X(216, TYPE, FLASHSLOTH_D27, FLASHSLOTH_O27, "%108", "%109", "%110", "%111", "%112", "%113", "%114") \
  X(224, TYPE, FLASHSLOTH_D28, FLASHSLOTH_O28, "%112", "%113", "%114", "%115", "%116", "%117", "%118") \
  X(232, TYPE, FLASHSLOTH_D29, FLASHSLOTH_O29, "%116", "%117", "%118", "%119", "%120", "%121", "%122") \
  X(240, TYPE, FLASHSLOTH_D30, FLASHSLOTH_O30, "%120", "%121", "%122", "%123", "%124", "%125", "%126") \
  X(248, TYPE, FLASHSLOTH_D31, FLASHSLOTH_O31, "%124", "%125", "%126", "%127", "%128", "%129", "%130") \
  X(256, TYPE, FLASHSLOTH_D32, FLASHSLOTH_O32, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#define FLASHSLOTH_WGMMA_SS(N, TYPE, D, O, P0, P1, P2, P3, P4, P5, P6)                                   \
  if constexpr (Registers == N / 2) {                                                                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P2                                                  \
                 ", 0;\n"                                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " P0 ", " P1 \
                 ", p, 1, 1, " P3 ", " P4 ";\n}"                                                         \
                 : O                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(A)),          \
                   "n"(static_cast<int>(B))                                                              \
                 : "memory");                                                                            \
  }
#define FLASHSLOTH_WGMMA_RS(N, TYPE, D, O, P0, P1, P2, P3, P4, P5, P6)                                            \
  if constexpr (Registers == N / 2) {                                                                             \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P5                                                           \
                 ", 0;\n"                                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, {" P0 ", " P1 ", " P2 \
                 ", " P3 "}, " P4 ", p, 1, 1, " P6 ";\n}"                                                         \
                 : O                                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),         \
                   "n"(static_cast<int>(B))                                                                       \
                 : "memory");                                                                                     \
  }

// D = A B + (accumulate ? D : 0), N = 2 Registers. Warp w of the group holds rows 16w to 16w + 15; in it
// d[4j + 0..1] = (g, 8j + 2t..2t+1) and d[4j + 2..3] = (g + 8, 8j + 2t..2t+1).
template <class T, Major A, Major B, int Registers>
__device__ __forceinline__ void wgmma_ss(float (&d)[Registers], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(Registers % 4 == 0 && Registers <= 128, "wgmma: N is a multiple of 8 up to 256");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "wgmma_ss takes bf16 or fp16");
  if constexpr (std::is_same_v<T, bf16>) {
    FLASHSLOTH_WGMMA_WIDTHS(FLASHSLOTH_WGMMA_SS, "bf16")
  } else {
    FLASHSLOTH_WGMMA_WIDTHS(FLASHSLOTH_WGMMA_SS, "f16")
  }
}

// The same with A in registers: each warp's 16 x 16 part as in mma_m16n8k16.
template <class T, Major B, int Registers>
__device__ __forceinline__ void wgmma_rs(float (&d)[Registers], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(Registers % 4 == 0 && Registers <= 128, "wgmma: N is a multiple of 8 up to 256");
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "wgmma_rs takes bf16 or fp16");
  if constexpr (std::is_same_v<T, bf16>) {
    FLASHSLOTH_WGMMA_WIDTHS(FLASHSLOTH_WGMMA_RS, "bf16")
  } else {
    FLASHSLOTH_WGMMA_WIDTHS(FLASHSLOTH_WGMMA_RS, "f16")
  }
}

#undef FLASHSLOTH_WGMMA_SS
#undef FLASHSLOTH_WGMMA_RS

}  // namespace flashsloth::cuda
#endif  // FLASHSLOTH_EMULATE
