// y = x W^T in integers on any card from compute capability 8.0: the tensor cores' warp-wide products, of 8
// bits (m16n8k32) or, with DIGIT_BITS = 4, of 4 bits (m16n8k64), which are integers of hardware on 8.0 to 8.9.
//
//   acc[n][m] = base * (sum over the first `high` products) + (sum over the others)           int32
//   y[m][n]   = float(acc) * (step[m] * scale[n]) + bias[n]                                     16 bit
//
// Weights and activations are rows of digits: int8, or two 4-bit columns a byte. Both widths are 32 bytes of
// a row per product and the same registers, so everything but the instruction is the same. A k-tile is 128
// columns. A block of eight warps takes 128 features and TOKENS tokens; 64 bytes of each row at a time come
// through a ring of STAGES by asynchronous copies. In a ring row, 16-byte piece c of row r lies at
// c ^ (r >> 1 & 3), so that eight rows of a piece are in different banks.
//
// Rows of weights are padded to 128 features, rows of activations are not: rows past the last token are
// fetched from the last one and not stored.
//
// -D: TOKENS 16|32|64|128, STAGES, DIGIT_BITS 4|8, HORNER 0|1, Y_BF16 0|1.
// Grid: (feature tiles, token tiles), 256 threads.

#include "flat.cuh"

struct Arguments {
  const char* w;        // [features padded][pitch bytes]
  const char* x;        // [tokens][pitch bytes]
  u16* y;               // 16 bit [tokens][features], rows y_stride elements apart
  const float* step;    // [tokens]
  const float* scale;   // [features]
  const void* bias;     // [features] or null
  long long pitch, y_stride;
  int features, tokens;
  int k_tiles, high, base;   // tiles of 128 columns; high columns in products of 32 bytes
  int bias_kind;        // see flat.cuh
};

constexpr int FEATURES = 128;
constexpr int SLICE = 64;                             // bytes of a row in a stage
constexpr int SLICES_OF_TILE = DIGIT_BITS == 8 ? 2 : 1;
constexpr int STAGE_BYTES = (FEATURES + TOKENS) * SLICE;
constexpr int THREADS = 256;
constexpr int WARPS_ACROSS = TOKENS >= 32 ? 2 : 1;    // of tokens; the other warps divide the features
constexpr int WARP_TOKENS = TOKENS / WARPS_ACROSS;
constexpr int WARP_FEATURES = FEATURES / (8 / WARPS_ACROSS);
constexpr int ROWS16 = WARP_FEATURES / 16, COLUMNS8 = WARP_TOKENS / 8;

DEVICE void copy16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
DEVICE void product(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if DIGIT_BITS == 4
  asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
               "{%8, %9}, {%0, %1, %2, %3};"
#endif
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 piece_address(u32 rows, int row, int piece) {
  return rows + row * SLICE + ((piece ^ (row >> 1 & 3)) << 4);
}

extern "C" __global__ void __launch_bounds__(THREADS)
flat_mma(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char dynamic[];
  const u32 ring = shared_address(dynamic);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const long long feature = (long long)blockIdx.x * FEATURES, token = (long long)blockIdx.y * TOKENS;
  const int slices = p.k_tiles * SLICES_OF_TILE;
  wait_for_previous_kernel();
  const auto fetch = [&](int slice) {
    if (slice < slices) {
      const u32 stage = ring + slice % STAGES * STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < (FEATURES + TOKENS) * 4 / THREADS + ((FEATURES + TOKENS) * 4 % THREADS != 0); i++) {
        const int index = i * THREADS + threadIdx.x, row = index >> 2, piece = index & 3;
        if ((FEATURES + TOKENS) * 4 % THREADS != 0 && row >= FEATURES + TOKENS) break;
        const char* from = row < FEATURES ? p.w + (feature + row) * p.pitch
                                          : p.x + min(token + row - FEATURES, (long long)p.tokens - 1) * p.pitch;
        copy16(piece_address(stage, row, piece), from + (long long)slice * SLICE + piece * 16);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fetch(s);
  const int first_row = warp / WARPS_ACROSS * WARP_FEATURES, first_column = warp % WARPS_ACROSS * WARP_TOKENS;
  int sum[ROWS16][COLUMNS8][4];
#pragma unroll
  for (int i = 0; i < ROWS16; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS8; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) sum[i][j][k] = 0;
  for (int slice = 0; slice < slices; slice++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    fetch(slice + STAGES - 1);
    const u32 w = ring + slice % STAGES * STAGE_BYTES, x = w + FEATURES * SLICE;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (HORNER && 2 * slice + half == p.high) {   // there are always columns after the high ones
#pragma unroll
        for (int i = 0; i < ROWS16; i++)
#pragma unroll
          for (int j = 0; j < COLUMNS8; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) sum[i][j][k] *= p.base;
      }
      u32 a[ROWS16][4];
#pragma unroll
      for (int i = 0; i < ROWS16; i++)   // rows 0-7 and 8-15, then the same 16 bytes further
        load_matrices(a[i], piece_address(w, first_row + 16 * i + (lane & 15), 2 * half + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < COLUMNS8; j += 2) {
        u32 b[4];   // tokens 0-7: both pieces, then tokens 8-15; with one group of eight the rest is not used
        const int row = COLUMNS8 > 1 ? (lane & 7) + (lane >> 4) * 8 : lane & 7;
        load_matrices(b, piece_address(x, first_column + 8 * j + row, 2 * half + (lane >> 3 & 1)));
#pragma unroll
        for (int i = 0; i < ROWS16; i++) {
          product(sum[i][j], a[i], b[0], b[1]);
          if (j + 1 < COLUMNS8) product(sum[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
  wait_copies<0>();
  let_next_kernel_start();
#pragma unroll
  for (int i = 0; i < ROWS16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const long long n = feature + first_row + 16 * i + 8 * half + (lane >> 2);
      if (n >= p.features) continue;
      const float scale = p.scale[n], bias = bias_of(p.bias, p.bias_kind, (int)n);
#pragma unroll
      for (int j = 0; j < COLUMNS8; j++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const long long m = token + first_column + 8 * j + 2 * (lane & 3) + k;
          if (m >= p.tokens) continue;
          p.y[m * p.y_stride + n] = rounded<Y_BF16>(dequantized<8>(sum[i][j][2 * half + k], p.step[m], scale, bias));
        }
    }
}
