// Integer products of Hopper's tensor cores: d (+)= A B, 64 rows by TOKENS columns by 32 inputs, A from
// shared memory (a descriptor) or from registers, B from shared memory.
//
// d of a warp: rows 16 w + g and 16 w + g + 8 (g = lane / 4); d[4 i], d[4 i + 1] are columns
// 8 i + 2 t, + 1 of the first row (t = lane % 4), d[4 i + 2], d[4 i + 3] the same of the second.

// Rows of 128 bytes in 128-byte swizzle, eight rows every 1024 bytes; 32 inputs further is + 2.
DEVICE u64 descriptor(u32 shared) {
  return (u64)((shared & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}

#define R10(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define R0_9 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
#define D4(i) "+r"(d[i]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3])
#define D16(i) D4(i), D4((i) + 4), D4((i) + 8), D4((i) + 12)
#define D32(i) D16(i), D16((i) + 16)

#if TOKENS == 8
#define SHAPE "m64n8k32"
#define D_NAMES "%0, %1, %2, %3"
#define D_LIST D4(0)
#define O0 "%4"
#define O1 "%5"
#define O2 "%6"
#define O3 "%7"
#define O4 "%8"
#define O5 "%9"
#elif TOKENS == 16
#define SHAPE "m64n16k32"
#define D_NAMES "%0, %1, %2, %3, %4, %5, %6, %7"
#define D_LIST D4(0), D4(4)
#define O0 "%8"
#define O1 "%9"
#define O2 "%10"
#define O3 "%11"
#define O4 "%12"
#define O5 "%13"
#elif TOKENS == 32
#define SHAPE "m64n32k32"
#define D_NAMES R0_9 "%10, %11, %12, %13, %14, %15"
#define D_LIST D16(0)
#define O0 "%16"
#define O1 "%17"
#define O2 "%18"
#define O3 "%19"
#define O4 "%20"
#define O5 "%21"
#elif TOKENS == 64
#define SHAPE "m64n64k32"
#define D_NAMES R0_9 R10(1) R10(2) "%30, %31"
#define D_LIST D32(0)
#define O0 "%32"
#define O1 "%33"
#define O2 "%34"
#define O3 "%35"
#define O4 "%36"
#define O5 "%37"
#elif TOKENS == 128
#define SHAPE "m64n128k32"
#define D_NAMES R0_9 R10(1) R10(2) R10(3) R10(4) R10(5) "%60, %61, %62, %63"
#define D_LIST D32(0), D32(32)
#define O0 "%64"
#define O1 "%65"
#define O2 "%66"
#define O3 "%67"
#define O4 "%68"
#define O5 "%69"
#elif TOKENS == 192
#define SHAPE "m64n192k32"
#define D_NAMES R0_9 R10(1) R10(2) R10(3) R10(4) R10(5) R10(6) R10(7) R10(8) "%90, %91, %92, %93, %94, %95"
#define D_LIST D32(0), D32(32), D32(64)
#define O0 "%96"
#define O1 "%97"
#define O2 "%98"
#define O3 "%99"
#define O4 "%100"
#define O5 "%101"
#elif TOKENS == 256
#define SHAPE "m64n256k32"
#define D_NAMES R0_9 R10(1) R10(2) R10(3) R10(4) R10(5) R10(6) R10(7) R10(8) R10(9) R10(10) R10(11) \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define D_LIST D32(0), D32(32), D32(64), D32(96)
#define O0 "%128"
#define O1 "%129"
#define O2 "%130"
#define O3 "%131"
#define O4 "%132"
#define O5 "%133"
#endif

constexpr int SUMS = TOKENS / 2;   // of a lane

DEVICE void product(int (&d)[SUMS], u64 a, u64 b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " O2 ", 0;\n"
               "wgmma.mma_async.sync.aligned." SHAPE ".s32.s8.s8 {" D_NAMES "}, " O0 ", " O1 ", p; }"
               : D_LIST : "l"(a), "l"(b), "r"(add));
}
DEVICE void product(int (&d)[SUMS], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " O5 ", 0;\n"
               "wgmma.mma_async.sync.aligned." SHAPE ".s32.s8.s8 {" D_NAMES "}, "
               "{" O0 ", " O1 ", " O2 ", " O3 "}, " O4 ", p; }"
               : D_LIST : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#if OVERLAP
// The products of tokens 128 HALF and on: d[64 HALF] and on, b points at these tokens.
#define HALF_NAMES R0_9 R10(1) R10(2) R10(3) R10(4) R10(5) "%60, %61, %62, %63"
#define HALF_LIST(i) D32(i), D32((i) + 32)
template <int HALF> DEVICE void product_half(int (&d)[SUMS], u64 a, u64 b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" HALF_NAMES "}, %64, %65, p; }"
               : HALF_LIST(64 * HALF) : "l"(a), "l"(b), "r"(add));
}
template <int HALF> DEVICE void product_half(int (&d)[SUMS], const u32 (&a)[4], u64 b, int add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" HALF_NAMES "}, {%64, %65, %66, %67}, %68, p; }"
               : HALF_LIST(64 * HALF) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
#endif

// The operand of 64 rows and 128 inputs, in four products.
struct Operand {
#if WEIGHT_BITS == 8
  u64 a;
  DEVICE void load(u32 tile) { a = descriptor(tile); }
  DEVICE u64 part(int j) const { return a + 2 * j; }
#else
  u32 a[4][4];
  DEVICE void load(u32 tile) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = load_shared(tile + half * 2048 + (threadIdx.x & 127) * 16);
      const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[2 * half + i / 2][2 * (i % 2)] = word[i] << 4 & 0xF0F0F0F0;
        a[2 * half + i / 2][2 * (i % 2) + 1] = word[i] & 0xF0F0F0F0;
      }
    }
  }
  DEVICE const u32 (&part(int j) const)[4] { return a[j]; }
#endif
  // x: the first 32 of the inputs.
  DEVICE void multiply(int (&sum)[SUMS], int j, u64 x, int add) const { product(sum, part(j), x + 2 * j, add); }
#if OVERLAP
  template <int HALF> DEVICE void multiply_half(int (&sum)[SUMS], int j, u64 x, int add) const {
    product_half<HALF>(sum, part(j), x + 2 * j + HALF * (TOKENS * 64 >> 4), add);
  }
#endif
};
