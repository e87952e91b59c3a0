// y = x W^T for 3 to 8 tokens, on 8-bit tensor cores.
//
// Eight masks turn a plane word into eight operands of four bytes, each 0 or 128: byte i of mask j is
// input j + 8 i of the word. The activations are 16-bit integers per slice of 128 inputs, times one
// scale, as two signed bytes 256 hi + lo; the 8 columns of a product (m16n8k32) are hi and lo of four
// tokens, so that lane t holds both sums of token t. Sums are exact integers until the group's alpha
// multiplies them in fp32; two runs give the same bits.
//
// Shared memory per slice and four tokens: x [2 halves][32 lanes][4] words; records [SPLITS][4 tokens].

#include "few_tokens.cuh"

constexpr int SIDE = TOKENS > 8 ? (BITS < 2 ? 1 : 2) : (BITS <= 4 ? BITS : (BITS + 1) / 2);
constexpr int FOURS = TOKENS / 4;   // TOKENS is a multiple of 4; those past p.tokens are zero

DEVICE void byte_product(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

struct Bytes {
  static constexpr int SLICE_X_BYTES = 1024, SLICE_RECORDS = SPLITS * 4;   // of four tokens
  static constexpr int X_BYTES = 2 * FOURS * SLICE_X_BYTES;
  static constexpr int RECORD_BYTES = 2 * FOURS * SLICE_RECORDS * 16;
  struct Sums { float2 row[FOURS]; };   // rows g and g + 8 of token 4 m + t

  // One thread takes 32 inputs of one token; four neighbours are a slice.
  static DEVICE void cut(const Arguments& p, char* x, char* records, int first_item, int items) {
    const int blocks = items * 8, tasks = blocks * TOKENS;
    for (int base = 0; base < tasks; base += THREADS) {
      const int task = base + threadIdx.x, token = task / blocks, block = task % blocks;
      const int t = block & 3, slice = block >> 2, four = token >> 2, column = (token & 3) * 2;
      float v[32];
      u32 r[32];
      load_block(p, task < tasks ? token : TOKENS, (first_item * 8 + block) * 32, v);
      const Slice s = round_block<32512, 128>(v, r);   // r = x + 128: byte 1 is hi, byte 0 is lo + 128
      if (task < tasks) {
        u32 hi[8], lo[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
          const u32 ab = __byte_perm(r[j], r[j + 8], 0x5140);
          const u32 cd = __byte_perm(r[j + 16], r[j + 24], 0x5140);
          lo[j] = __byte_perm(ab, cd, 0x5410) ^ 0x80808080u;
          hi[j] = __byte_perm(ab, cd, 0x7632);
        }
        uint4* words = (uint4*)(x + (slice * FOURS + four) * SLICE_X_BYTES) + 4 * column + t;
        words[0] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
        words[4] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
        words[32] = make_uint4(hi[4], hi[5], hi[6], hi[7]);
        words[36] = make_uint4(lo[4], lo[5], lo[6], lo[7]);
        constexpr int SHARE = 4 / SPLITS;   // neighbours that share a group
        const float scale = s.largest * (1.f / 32512.f);
        if (t % SHARE == 0)
          ((float4*)records)[((slice * FOURS + four) * SPLITS + t / SHARE) * 4 + (token & 3)] =
              make_float4(scale * (2.f / 128.f), -scale * (float)s.total, s.sum, 0.f);
      }
    }
  }

  static DEVICE void multiply(const char* stage, const char* x, const char* records, int lane,
                              Sums& sums) {
    const int t = lane & 3, g = lane >> 2;
#pragma unroll 1
    for (int slice = 0; slice < 2; slice++) {
      const uint2* planes = (const uint2*)(stage + slice * SLICE_BYTES) + lane;
      uint4 b[FOURS][2];
#pragma unroll
      for (int m = 0; m < FOURS; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          b[m][h] = ((const uint4*)(x + (slice * FOURS + m) * SLICE_X_BYTES))[h * 32 + lane];
#pragma unroll 1
      for (int split = 0; split < SPLITS; split++) {
        const Scales scales(stage, slice, split, g);
        const bool mine = SPLITS == 1 || t / (4 / SPLITS) == split;
        float2 sum[FOURS] = {}, alphas = make_float2(0.f, 0.f);
#pragma unroll 1
        for (int first = 0; first < BITS; first += SIDE) {   // planes side by side hide the latency
          uint2 w[SIDE];
          int d[SIDE][FOURS][4] = {};
#pragma unroll
          for (int q = 0; q < SIDE; q++) {
            w[q] = mine && first + q < BITS ? planes[(first + q) * 32] : make_uint2(0, 0);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) {
            // Left shifts by multiplication run beside the masks, on another pipe.
            const u32 even = 1u << (7 - 2 * i), odd = 1u << (6 - 2 * i);
#pragma unroll
            for (int q = 0; q < SIDE; q++) {
              const u32 a[4] = {(w[q].x * even) & 0x80808080u, (w[q].y * even) & 0x80808080u,
                                (w[q].x * odd) & 0x80808080u, (w[q].y * odd) & 0x80808080u};
#pragma unroll
              for (int m = 0; m < FOURS; m++) {
                const uint4 half = b[m][i >> 1];
                if (i & 1) byte_product(d[q][m], a, half.z, half.w);
                else byte_product(d[q][m], a, half.x, half.y);
              }
            }
          }
#pragma unroll
          for (int q = 0; q < SIDE; q++) {
            if (first + q >= BITS) break;
            const float2 alpha = scales.alpha(first + q);
            alphas.x += alpha.x;
            alphas.y += alpha.y;
#pragma unroll
            for (int m = 0; m < FOURS; m++) {
              sum[m].x = fmaf(alpha.x, (float)(256 * d[q][m][0] + d[q][m][1]), sum[m].x);
              sum[m].y = fmaf(alpha.y, (float)(256 * d[q][m][2] + d[q][m][3]), sum[m].y);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < FOURS; m++) {
          const float4 record =
              ((const float4*)records)[((slice * FOURS + m) * SPLITS + split) * 4 + t];
          scales.add(sums.row[m], sum[m], alphas, record);
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
