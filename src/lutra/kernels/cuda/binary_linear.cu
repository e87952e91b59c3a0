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
// even by the lowest bit of one of them. With uniform levels the planes are added up as integers.
//
// -D: CUT, the inputs that a thread cuts at a time, 16 or 32; others in few_tokens.cuh.
//
// A slot of shared memory, one slice and token, holds bits [32 lanes][2 products] words, and 32 bytes
// that keep the banks of neighbouring slots apart.

#include "few_tokens.cuh"

#if __CUDA_ARCH__ >= 900
constexpr int UNROLLED = 8;   // products of an item for which both slices are unrolled
#else
constexpr int UNROLLED = 4;   // more spill there
#endif
constexpr bool CODES = UNIFORM && BITS <= 6;   // sums of all planes fit in 32 bits, and float has 24

DEVICE void binary_product(int (&d)[4], u32 a0, u32 a1, u32 b, uint4 c) {
  asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(b), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
}

// The words of a lane's inputs to one word per bit: bit j of 8 or 16 words becomes word j.
template <int SHIFT, int WORDS> DEVICE void transpose_step(u32 (&r)[WORDS], u32 mask) {
#pragma unroll
  for (int j = 0; j < WORDS; j++)
    if (!(j & SHIFT)) {
      const u32 a = r[j], b = r[j + SHIFT];
      r[j] = (a & mask) | ((b << SHIFT) & ~mask);
      r[j + SHIFT] = ((a >> SHIFT) & mask) | (b & ~mask);
    }
}
template <int WORDS> DEVICE void transpose_bytes(u32 (&r)[WORDS]) {
  transpose_step<4>(r, 0x0F0F0F0Fu);
  transpose_step<2>(r, 0x33333333u);
  transpose_step<1>(r, 0x55555555u);
}

// Bit k of the integers `wide` to its place: column 2 (k / 4) + (k & 1) of product (k >> 1) & 1.
DEVICE void store_bits(char* out, const u32 (&wide)[32]) {
  u32 r[16];
#pragma unroll
  for (int j = 0; j < 8; j++) {   // with the step of 8, which moves bytes
    const u32 a = __byte_perm(wide[j], wide[j + 16], 0x5410), b = __byte_perm(wide[j + 8], wide[j + 24], 0x5410);
    r[j] = __byte_perm(a, b, 0x6240);
    r[j + 8] = __byte_perm(a, b, 0x7351);
  }
  transpose_bytes(r);
#pragma unroll
  for (int g = 0; g < 8; g++) {
    const int k = 4 * (g / 2) + (g & 1);
    *(uint2*)(out + g * 32) = make_uint2(r[k], r[k + 2]);
  }
}
DEVICE void store_bits(char* out, const u32 (&wide)[16]) {
  u32 r[8];   // words of bits k (low half) and k + 8
#pragma unroll
  for (int j = 0; j < 8; j++) r[j] = __byte_perm(wide[j], wide[j + 8], 0x5140);
  transpose_bytes(r);
#pragma unroll
  for (int k = 0; k < 16; k++)
    *(u16*)(out + (2 * (k / 4) + (k & 1)) * 32 + (k >> 1 & 1) * 4) = (u16)(r[k & 7] >> (k & 8) * 2);
}

struct Binary {
  // One per slot and split, for the four lanes of a row.
  struct Record {
    int4 start[4];    // of the sums, as the operand of a product
    float2 worth[4];  // of a lane's integer sums; and the sum of x, which the offset multiplies
  };
  static constexpr int SLOT_BYTES = 288, X_BYTES = 2 * TOKENS * SLOT_BYTES;
  static constexpr int SLOT_RECORDS = SPLITS * sizeof(Record), RECORD_BYTES = 2 * TOKENS * SLOT_RECORDS;
  struct Sums { float2 row[TOKENS]; };   // rows g and g + 8
  struct Lane {
    u32 planes, scales, bits, starts, worths;   // addresses, of the warp's first item
    int top, split;                             // bit 15 of two's complement is negative
    DEVICE Lane(int lane, u32 planes, u32 scales, u32 x, u32 records)
        : planes(kept(planes + lane * 8)), scales(kept(scales + (lane >> 2) * ROW_SCALES)), bits(kept(x + lane * 8)),
          starts(kept(records + (lane & 3) * 16)), worths(kept(records + 64 + (lane & 3) * 8)),
          top(kept((lane & 3) == 3 ? -8 : 8)), split((lane & 3) / (4 / SPLITS)) {}
  };
  // Scales of a whole row.
  struct Levels {
    float2 alpha[WHOLE_ROW ? SLOTS - 1 : 1], offset;
    DEVICE void load(const Lane& lane, u32 stage) {
#pragma unroll
      for (int q = 0; q < (WHOLE_ROW ? SLOTS - 1 : 1); q++) alpha[q] = load_scales(lane.scales + stage, q);
      offset = load_scales(lane.scales + stage, SLOTS - 1);
    }
  };

  // NEIGHBOURS lanes share a slice of a token, the tokens of a slice follow each other.
  static constexpr int NEIGHBOURS = 128 / CUT;
  static DEVICE int tasks(const Arguments& p) { return 2 * NEIGHBOURS * TOKENS; }   // of an item
  static DEVICE Raw<CUT> load(const Arguments& p, int task, int first_item) {
    const int slot = task / NEIGHBOURS;
    return load_raw<CUT>(p, slot % TOKENS, first_item * 256 + slot / TOKENS * 128 + task % NEIGHBOURS * CUT);
  }
  static DEVICE void cut(const Arguments& p, const Raw<CUT>& raw, int task, bool active, char* x, char* records) {
    constexpr int SHARE = NEIGHBOURS / SPLITS;         // neighbours that share a group
    constexpr int EACH = SHARE < 4 ? 4 / SHARE : 1;    // lanes of a row that one writes for
    const int part = task % NEIGHBOURS, slot = task / NEIGHBOURS;
    u32 wide[CUT];
    const Block block = round_block<32767, 0, false>(raw, wide);
    int total = 0;
#pragma unroll
    for (int j = 0; j < CUT; j++) total += (int)(wide[j] - MAGIC_BITS);
    total = sum_of_group<CUT>(total);
    if (part % SHARE == 0 && total & 1) {
      total += wide[0] & 1 ? -1 : 1;
      wide[0] ^= 1;
    }
    if (!active) return;
    store_bits(x + slot * SLOT_BYTES + part * CUT / 32 * 8 + part * CUT % 32 / 8, wide);
    const float scale = block.largest * (CODES ? 1.f / (1 << (BITS - 1)) / 32767.f : 1.f / 32767.f);
    Record& record = ((Record*)records)[slot * SPLITS + part / SHARE];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int lane_t = part % SHARE * EACH + i;
      if (lane_t >= 4) break;
      const bool once = lane_t == 0;   // the lanes of a row are added up
      const int start = once ? -total / 2 : 0;
      record.start[lane_t] = make_int4(start, 0, start, 0);
      record.worth[lane_t] = make_float2(scale * (float)(2 << (4 * lane_t)), once ? block.sum : 0.f);
    }
  }

  static DEVICE void multiply(const Lane& lane, u32 stage, u32 item_x, u32 item_records, const Levels& levels,
                              Sums& sums) {
    const u32 bits_at = lane.bits + item_x, starts_at = lane.starts + item_records;
    const u32 worths_at = lane.worths + item_records;
    const u32 planes_at = lane.planes + stage, item_scales = lane.scales + stage;
#pragma unroll (BITS * TOKENS * SPLITS <= UNROLLED ? 2 : 1)
    for (int slice = 0; slice < 2; slice++) {
      uint2 bits[TOKENS];
#pragma unroll
      for (int m = 0; m < TOKENS; m++) bits[m] = load8(bits_at + (slice * TOKENS + m) * SLOT_BYTES);
#pragma unroll (BITS * TOKENS <= 4 ? SPLITS : 1)
      for (int split = 0; split < SPLITS; split++) {
        const u32 scales = item_scales + (GROUP == 256 ? 0 : slice * SPLITS + split) * GROUP_SCALES;
        const bool mine = SPLITS == 1 || lane.split == split;
        const int record = slice * TOKENS * SLOT_RECORDS + split * (int)sizeof(Record);
        const float2 first = WHOLE_ROW ? levels.alpha[0] : load_scales(scales, 0);
        float2 sum[TOKENS] = {};
        int2 code[TOKENS] = {};   // integer sums of all planes
        uint4 start[TOKENS];
#pragma unroll
        for (int m = 0; m < TOKENS; m++) start[m] = load16(starts_at + record + m * SLOT_RECORDS);
#pragma unroll (BITS * TOKENS <= 16 ? BITS : 2)
        for (int q = 0; q < BITS; q++) {
          const uint2 w = load8(planes_at + slice * SLICE_BYTES + q * 256);
          float2 alpha = first;
          if (!UNIFORM && q) alpha = WHOLE_ROW ? levels.alpha[q] : load_scales(scales, q);
          const float half_to_the_q = __uint_as_float((u32)(127 - q) << 23);
          if (UNIFORM) alpha = make_float2(half_to_the_q, half_to_the_q);   // in units of plane 0
#pragma unroll
          for (int m = 0; m < TOKENS; m++) {
            int d[4], e[4];
            binary_product(d, w.x, w.y, mine ? bits[m].x : 0, start[m]);
            binary_product(e, w.x, w.y, mine ? bits[m].y : 0, make_uint4(0, 0, 0, 0));
            const int low = multiply_add(e[1], lane.top, multiply_add(e[0], 4, multiply_add(d[1], 2, d[0])));
            const int high = multiply_add(e[3], lane.top, multiply_add(e[2], 4, multiply_add(d[3], 2, d[2])));
            if (CODES) {
              code[m].x = q ? multiply_add(code[m].x, 2, low) : low;
              code[m].y = q ? multiply_add(code[m].y, 2, high) : high;
            } else {
              sum[m].x = fmaf(alpha.x, (float)low, sum[m].x);
              sum[m].y = fmaf(alpha.y, (float)high, sum[m].y);
            }
          }
        }
        const float2 offset = WHOLE_ROW ? levels.offset : load_scales(scales, SLOTS - 1);
#pragma unroll
        for (int m = 0; m < TOKENS; m++) {
          const float2 worth = load_floats(worths_at + record + m * SLOT_RECORDS);
          if (CODES) sum[m] = make_float2((float)code[m].x, (float)code[m].y);
          if (UNIFORM) sum[m] = make_float2(sum[m].x * first.x, sum[m].y * first.y);
          sums.row[m].x = fmaf(offset.x, worth.y, fmaf(worth.x, sum[m].x, sums.row[m].x));
          sums.row[m].y = fmaf(offset.y, worth.y, fmaf(worth.x, sum[m].y, sums.row[m].y));
        }
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
