// y = x W^T for 3 to 16 tokens, on 8-bit tensor cores.
//
// Masks turn a plane word into eight operands of four bytes: byte i of operand j is input j + 8 i of the
// word, as 0 or 128 if j is odd and as 0 or 64 if it is even, so that one shift serves two operands. The
// activations are integers per slice of 128 inputs, times one scale, those of even j twice as fine, as
// two signed bytes 256 hi + lo; the 8 columns of a product (m16n8k32) are hi and lo of four tokens, so
// that lane t holds both sums of token t. Sums are exact integers until the group's alpha multiplies
// them in fp32; two runs give the same bits. The rounding of x is 2^-15 of the largest |x| of its slice
// for odd j, 2^-16 for even. With uniform levels of up to 4 bits the planes of a code meet in a byte,
// each further one a bit lower, and are multiplied at once.
//
// A block of shared memory holds a slice of x of four tokens as [2 halves][32 lanes][4] words.

#include "few_tokens.cuh"

constexpr int SIDE = TOKENS > 8 ? 1 : (BITS <= 4 ? BITS : (BITS + 1) / 2);
constexpr bool CODES = UNIFORM && BITS <= 4;
constexpr int FOURS = TOKENS / 4;   // TOKENS is a multiple of 4; those past p.tokens are zero
// Slices that are unrolled, to hide each other's latency, where registers suffice.
constexpr int BESIDE = FOURS == 1 || (FOURS == 2 && (CODES || BITS <= 2)) ? 2 : 1;

DEVICE void byte_product(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, uint4 c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1),
        "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
}

struct Bytes {
  // One per slice, four tokens and split.
  struct Record {
    int4 start[4];    // of a token's sums, as the operand of a product
    float2 worth[4];  // of a token's integer sums; and the sum of x, which the offset multiplies
  };
  static constexpr int BLOCK_BYTES = 1024, RECORD = SPLITS * sizeof(Record);   // of a slice of four tokens
  static constexpr int X_BYTES = 2 * FOURS * BLOCK_BYTES, RECORD_BYTES = 2 * FOURS * RECORD;
  struct Sums { float2 row[FOURS]; };   // rows g and g + 8 of token 4 m + t
  struct Lane {
    u32 planes, scales, x, starts, worths;   // addresses, of the warp's first item
    int split;
    DEVICE Lane(int lane, u32 planes, u32 scales, u32 x, u32 records)
        : planes(kept(planes + lane * 8)), scales(kept(scales + (lane >> 2) * ROW_SCALES)), x(kept(x + lane * 16)),
          starts(kept(records + (lane & 3) * 16)), worths(kept(records + 64 + (lane & 3) * 8)),
          split((lane & 3) / (4 / SPLITS)) {}
  };
  struct Levels {   // scales of a whole row
    float2 alpha[WHOLE_ROW ? SLOTS - 1 : 1], offset;
    DEVICE void load(const Lane& lane, u32 stage) {
#pragma unroll
      for (int q = 0; q < (WHOLE_ROW ? SLOTS - 1 : 1); q++) alpha[q] = load_scales(lane.scales + stage, q);
      offset = load_scales(lane.scales + stage, SLOTS - 1);
    }
  };

  static DEVICE int tasks(const Arguments& p) { return 8 * TOKENS; }   // of an item; 32 inputs each
  // Four neighbours share a slice of a token, the tokens of a slice follow each other.
  static DEVICE Raw<32> load(const Arguments& p, int task, int first_item) {
    const int slot = task >> 2;
    return load_raw<32>(p, slot % TOKENS, first_item * 256 + slot / TOKENS * 128 + (task & 3) * 32);
  }
  static DEVICE void cut(const Arguments& p, const Raw<32>& raw, int task, bool active, char* x, char* records) {
    constexpr int SHARE = 4 / SPLITS;   // neighbours that share a group
    const int t = task & 3, slot = task >> 2, four = slot >> 2, column = (slot & 3) * 2;
    u32 r[32];
    // r = x + 128: byte 1 is hi, byte 0 is lo + 128. Even inputs are in halves of the unit.
    const Block block = round_block<16256, 128, true>(raw, r);
    int halves = 0;   // the sum of the integers, in those
#pragma unroll
    for (int i = 0; i < 32; i++)
      halves += (int)(r[i] - (MAGIC_BITS + 128)) * (i & 1 ? 2 : 1);
    halves = sum_of_group<32>(halves);
    if (!active) return;
    uint4* words = (uint4*)(x + four * BLOCK_BYTES) + 4 * column + t;
    u32 hi[8], lo[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const u32 ab = __byte_perm(r[j], r[j + 8], 0x5140);
      const u32 cd = __byte_perm(r[j + 16], r[j + 24], 0x5140);
      lo[j] = __byte_perm(ab, cd, 0x5410) ^ 0x80808080u;
      hi[j] = __byte_perm(ab, cd, 0x7632);
    }
    words[0] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    words[4] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
    words[32] = make_uint4(hi[4], hi[5], hi[6], hi[7]);
    words[36] = make_uint4(lo[4], lo[5], lo[6], lo[7]);
    if (t % SHARE == 0) {
      Record& record = ((Record*)records)[four * SPLITS + t / SHARE];
      const int start = -(CODES ? 64 - (64 >> BITS) : 32) * halves;
      record.start[slot & 3] = make_int4(0, start, 0, start);
      record.worth[slot & 3] = make_float2(block.largest * (2.f / 128.f / 16256.f), block.sum);
    }
  }

  // One slice of uniform levels; sums in units of plane 0.
  static DEVICE void multiply_codes(u32 planes, const uint4 (&b)[FOURS][2], u32 x_slice, u32 starts, bool mine,
                                    float2 (&sum)[FOURS]) {
    uint2 w[BITS];
    int d[FOURS][4];
#pragma unroll
    for (int q = 0; q < BITS; q++) w[q] = mine ? load8(planes + q * 256) : make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32 a[4] = {};
#pragma unroll
      for (int q = 0; q < BITS; q++) {
        const int left = 6 - 2 * i - q;
        const u32 low = left < 0 ? w[q].x >> -left : w[q].x * (1u << (left & 31));
        const u32 high = left < 0 ? w[q].y >> -left : w[q].y * (1u << (left & 31));
        a[0] |= low & (0x40404040u >> q);
        a[1] |= high & (0x40404040u >> q);
        a[2] |= low & (0x80808080u >> q);
        a[3] |= high & (0x80808080u >> q);
      }
#pragma unroll
      for (int m = 0; m < FOURS; m++) {
        const uint4 half = FOURS > 2 ? load16(x_slice + m * BLOCK_BYTES + (i >> 1) * 512) : b[m][i >> 1];
        const uint4 c = i ? make_uint4(d[m][0], d[m][1], d[m][2], d[m][3]) : load16(starts + m * RECORD);
        byte_product(d[m], a, i & 1 ? half.z : half.x, i & 1 ? half.w : half.y, c);
      }
    }
#pragma unroll
    for (int m = 0; m < FOURS; m++)
      sum[m] = make_float2((float)multiply_add(d[m][0], 256, d[m][1]),
                           (float)multiply_add(d[m][2], 256, d[m][3]));
  }

  static DEVICE void multiply(const Lane& lane, u32 stage, u32 item_x, u32 item_records, const Levels& levels,
                              Sums& sums) {
    const u32 x_at = lane.x + item_x;
#pragma unroll (BESIDE)
    for (int slice = 0; slice < 2; slice++) {
      const u32 planes = lane.planes + stage + slice * SLICE_BYTES, x_slice = x_at + slice * (FOURS * BLOCK_BYTES);
      uint4 b[FOURS][2];   // of 16 tokens, loaded where it is used: registers
#pragma unroll
      for (int m = 0; m < (FOURS > 2 ? 0 : FOURS); m++)
#pragma unroll
        for (int h = 0; h < 2; h++) b[m][h] = load16(x_slice + m * BLOCK_BYTES + h * 512);
#pragma unroll 1
      for (int split = 0; split < SPLITS; split++) {
        const u32 scales = lane.scales + stage + (GROUP == 256 ? 0 : slice * SPLITS + split) * GROUP_SCALES;
        const bool mine = SPLITS == 1 || lane.split == split;
        const u32 record = item_records + slice * (FOURS * RECORD) + split * (int)sizeof(Record);
        const u32 starts = lane.starts + record, worths = lane.worths + record;
        const float2 first_level = WHOLE_ROW ? levels.alpha[0] : load_scales(scales, 0);
        float2 sum[FOURS] = {};
        if (CODES) multiply_codes(planes, b, x_slice, starts, mine, sum);
#pragma unroll (WHOLE_ROW ? 8 : 1)
        for (int first = CODES ? BITS : 0; first < BITS; first += SIDE) {   // side by side: latency
          uint2 w[SIDE];
          int d[SIDE][FOURS][4];
#pragma unroll
          for (int q = 0; q < SIDE; q++)
            w[q] = mine && first + q < BITS ? load8(planes + (first + q) * 256) : make_uint2(0, 0);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            // Left shifts by multiplication run beside the masks, on another pipe.
            const u32 shift = 1u << (6 - 2 * i);
#pragma unroll
            for (int q = 0; q < SIDE; q++) {
              const u32 low = w[q].x * shift, high = w[q].y * shift;
              const u32 a[4] = {low & 0x40404040u, high & 0x40404040u, low & 0x80808080u,
                                high & 0x80808080u};
#pragma unroll
              for (int m = 0; m < FOURS; m++) {
                const uint4 half = FOURS > 2 ? load16(x_slice + m * BLOCK_BYTES + (i >> 1) * 512) : b[m][i >> 1];
                int(&here)[4] = d[q][m];
                const uint4 c = i ? make_uint4(here[0], here[1], here[2], here[3]) : load16(starts + m * RECORD);
                byte_product(here, a, i & 1 ? half.z : half.x, i & 1 ? half.w : half.y, c);
              }
            }
          }
#pragma unroll
          for (int q = 0; q < SIDE; q++) {
            if (first + q >= BITS) break;
            const float half_to_the_q = __uint_as_float((u32)(127 - first - q) << 23);
            float2 alpha = make_float2(half_to_the_q, half_to_the_q);   // in units of plane 0
            if (!UNIFORM) alpha = WHOLE_ROW ? levels.alpha[first + q] : load_scales(scales, first + q);
#pragma unroll
            for (int m = 0; m < FOURS; m++) {
              sum[m].x = fmaf(alpha.x, (float)multiply_add(d[q][m][0], 256, d[q][m][1]), sum[m].x);
              sum[m].y = fmaf(alpha.y, (float)multiply_add(d[q][m][2], 256, d[q][m][3]), sum[m].y);
            }
          }
        }
        const float2 offset = WHOLE_ROW ? levels.offset : load_scales(scales, SLOTS - 1);
#pragma unroll
        for (int m = 0; m < FOURS; m++) {
          const float2 worth = load_floats(worths + m * RECORD);
          if (UNIFORM) sum[m] = make_float2(sum[m].x * first_level.x, sum[m].y * first_level.y);
          sums.row[m].x = fmaf(offset.x, worth.y, fmaf(worth.x, sum[m].x, sums.row[m].x));
          sums.row[m].y = fmaf(offset.y, worth.y, fmaf(worth.x, sum[m].y, sums.row[m].y));
        }
      }
    }
  }

  static DEVICE void collect(Sums& sums, int lane, float* out) {
#pragma unroll
    for (int m = 0; m < FOURS; m++) {
      out[(4 * m + (lane & 3)) * 16 + (lane >> 2)] = sums.row[m].x;
      out[(4 * m + (lane & 3)) * 16 + (lane >> 2) + 8] = sums.row[m].y;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
byte_linear(const __grid_constant__ Arguments p) { few_tokens<Bytes>(p); }
