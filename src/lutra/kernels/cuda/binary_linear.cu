// y = x W^T for one or two tokens, on binary tensor cores.
//
// A plane word is already an operand of the binary product (m16n8k128, AND + population count), so no
// weight bit is ever unpacked. The activations are cut into bits instead: in every slice of 128 inputs
// x becomes 16-bit integers times one scale, and each of the 16 bits is one column:
//
//   sum_i b_i x_i = scale * sum_j 2^j popcount(b & bit_j(x))        (bit 15 counts negative)
//
// Sums are exact integers until the group's alpha multiplies them in fp32; two runs give the same bits.
// The rounding of x is 2^-16 of the largest |x| of its slice, well below the rounding of a half result.
// A column pair (2t, 2t+1) of two products holds bits 4t .. 4t+3, so a lane needs three integer
// multiply-adds to combine them; the factor 16^t is part of the lane's scale. Bits of the weight are
// 0 and 1 here but mean -1 and +1: the sums start at minus half the sum of the integers, which is made
// even by the lowest bit of one of them.
//
// A slot of shared memory holds bits [32 lanes][2 products] words, and 32 bytes that keep the banks of
// neighbouring slots apart.

#include "few_tokens.cuh"

#if __CUDA_ARCH__ >= 900
constexpr int UNROLLED = 8;   // products of an item for which both slices are unrolled
#else
constexpr int UNROLLED = 4;   // more spill there
#endif

DEVICE void binary_product(int (&d)[4], u32 a0, u32 a1, u32 b, int4 c) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
}

// 16 words of two 16-bit columns each -> word k holds bit k of all 32 columns.
template <int SHIFT> DEVICE void transpose_step(u32 (&r)[16], u32 mask) {
#pragma unroll
  for (int j = 0; j < 16; j++)
    if (!(j & SHIFT)) {
      const u32 a = r[j], b = r[j + SHIFT];
      r[j] = (a & mask) | ((b & mask) << SHIFT);
      r[j + SHIFT] = ((a >> SHIFT) & mask) | (b & ~mask);
    }
}

struct Binary {
  static constexpr int SLOT_BYTES = 288, RECORDS = TOKENS;
  struct Sums { float2 row[TOKENS]; };   // rows g and g + 8

  static DEVICE void cut(int slot, bool active, char* x, char* records) {
    constexpr int SHARE = 4 / SPLITS;   // neighbours that share a group
    const int t = threadIdx.x & 3;
    u32 wide[32], r[16];
    const Block block = round_block<32767, 0, false, SLOT_BYTES>(x, slot, wide);
    int total = 0;
#pragma unroll
    for (int j = 0; j < 16; j++) {
      r[j] = __byte_perm(wide[j], wide[j + 16], 0x5410);
      asm("dp2a.lo.s32.s32 %0, %1, %2, %0;" : "+r"(total) : "r"(r[j]), "r"(0x0101));
    }
    total = sum_of_group(total);
    if (t % SHARE == 0 && total & 1) {
      total += r[0] & 1 ? -1 : 1;
      r[0] ^= 1;
    }
    transpose_step<8>(r, 0x00FF00FFu);
    transpose_step<4>(r, 0x0F0F0F0Fu);
    transpose_step<2>(r, 0x33333333u);
    transpose_step<1>(r, 0x55555555u);
    __syncwarp();   // x of the slot has been read
    if (!active) return;
    // Bit k lies in column 2 (k / 4) + (k & 1) of product (k >> 1) & 1.
    uint2* words = (uint2*)(x + slot * SLOT_BYTES);
#pragma unroll
    for (int g = 0; g < 8; g++) {
      const int k = 4 * (g / 2) + (g & 1);
      words[4 * g + t] = make_uint2(r[k], r[k + 2]);
    }
    const float scale = block.largest * (1.f / 32767.f);
    Record& record = ((Record*)records)[slot * SPLITS + t / SHARE];
#pragma unroll
    for (int i = 0; i < SPLITS; i++) {
      const int lane_t = (t % SHARE) * SPLITS + i;
      const bool once = lane_t == 0;   // the lanes of a row are added up
      const int start = once ? -total / 2 : 0;
      record.start[lane_t] = make_int4(start, 0, start, 0);
      record.worth[lane_t] = make_float2(scale * (float)(2 << (4 * lane_t)), once ? block.sum : 0.f);
    }
  }

  static DEVICE void multiply(const char* stage, const char* x, const char* records, int lane,
                              Sums& sums) {
    const int t = lane & 3, g = lane >> 2;
    const int top = t == 3 ? -8 : 8;    // bit 15 of two's complement is negative
#pragma unroll (BITS * TOKENS * SPLITS <= UNROLLED ? 2 : 1)
    for (int slice = 0; slice < 2; slice++) {
      const uint2* planes = (const uint2*)(stage + slice * SLICE_BYTES) + lane;
      uint2 bits[TOKENS];
#pragma unroll
      for (int m = 0; m < TOKENS; m++)
        bits[m] = ((const uint2*)(x + (slice * TOKENS + m) * SLOT_BYTES))[lane];
#pragma unroll (BITS * TOKENS <= 4 ? SPLITS : 1)
      for (int split = 0; split < SPLITS; split++) {
        const Scales scales(stage, slice, split, g);
        const bool mine = SPLITS == 1 || t / (4 / SPLITS) == split;
        const Record* record = (const Record*)records + slice * TOKENS * SPLITS + split;
        float2 sum[TOKENS] = {};
        int4 start[TOKENS];
#pragma unroll
        for (int m = 0; m < TOKENS; m++) start[m] = record[m * SPLITS].start[t];
#pragma unroll (BITS * TOKENS <= 16 ? BITS : 2)
        for (int q = 0; q < BITS; q++) {
          const uint2 w = planes[q * 32];
          const float2 alpha = scales.alpha(q);
#pragma unroll
          for (int m = 0; m < TOKENS; m++) {
            int d[4], e[4];
            binary_product(d, w.x, w.y, mine ? bits[m].x : 0, start[m]);
            binary_product(e, w.x, w.y, mine ? bits[m].y : 0, make_int4(0, 0, 0, 0));
            const int low = multiply_add(e[1], top, multiply_add(e[0], 4, multiply_add(d[1], 2, d[0])));
            const int high = multiply_add(e[3], top, multiply_add(e[2], 4, multiply_add(d[3], 2, d[2])));
            sum[m].x = fmaf(alpha.x, (float)low, sum[m].x);
            sum[m].y = fmaf(alpha.y, (float)high, sum[m].y);
          }
        }
#pragma unroll
        for (int m = 0; m < TOKENS; m++)
          scales.add(sums.row[m], sum[m], record[m * SPLITS].worth[t]);
      }
    }
  }

  static DEVICE void collect(Sums& sums, int lane, float* out) {
#pragma unroll
    for (int m = 0; m < TOKENS; m++) {
      float2 total = sums.row[m];
#pragma unroll
      for (int s = 1; s <= 2; s *= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, s);
        total.y += __shfl_xor_sync(~0u, total.y, s);
      }
      if ((lane & 3) == (m & 3)) {
        out[m * 16 + (lane >> 2)] = total.x;
        out[m * 16 + (lane >> 2) + 8] = total.y;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
binary_linear(const __grid_constant__ Arguments p) { few_tokens<Binary>(p); }
