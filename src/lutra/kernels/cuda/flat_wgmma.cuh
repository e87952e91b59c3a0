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
