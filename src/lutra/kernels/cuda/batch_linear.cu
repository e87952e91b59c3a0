// y = x W^T for 5 to 64 tokens, on the fp16 tensor cores that every warp has for itself (mma.sync): up to
// 4 bits, groups of 128 and more, scales in half.
//
// x is B, in shared memory; of the weights A is made, as one of
//   codes    uniform levels: the integer is the code, an exact subnormal half (fields.cuh)
//   levels   free levels: integers below 2048 in units of a step (records.cuh)
//   signs    free levels: a sparse product (mma.sp) for each plane, of which no bit is unpacked
// The sums of a slice of integers are exact in fp32 until they are multiplied with the unit.
//
// A sparse product of 16 rows by 32 inputs takes 16 numbers of a row and, for each, the place of its
// input among four, as two bits of metadata. Here all the numbers of a row are the alpha of its group and
// of a plane, the inputs are -x and x in turn, and a bit of the plane, under a constant upper bit, is the
// place: 0 takes -x, 1 takes x. So one mask turns a word of a plane into the metadata of 16 weights of
// two rows, every product is one of the format, and the sums stay in the accumulators from the first
// input to the last, whatever the group.
//
// The blocks of a cluster split the inputs. A block keeps its inputs of all tokens, as operands, in shared
// memory (or, if they do not fit, one of PANELS parts of them at a time) and walks over its rows: each warp
// has units of TILES x 16 rows, whose weights it streams through a ring of its own (cp.async), and no warp
// waits for another until its unit is done; k_warps warps may share a unit. Then the sums of the block's
// warps and of the cluster's blocks meet in shared memory and are added in order: two runs give the same
// bits.
//
// Each block brings a token into range by a power of two, 2^14 to 2^15 for its largest |x| so far, so that
// x may be divided by the power of two at which a field lies in its word (see fields.cuh) without a loss
// but below 2^-30 of the largest.
//
// -D: TOKENS 8|16|32|64, TILES 1|2|4, WARPS, STAGES (slices in a warp's ring), PANELS, SIGNS 0|1|2 (free
// levels). Grid: cluster size * clusters; dynamic shared memory: see `batch_sizes` in batch_plans.py.

#include "fields.cuh"
#include "hopper.cuh"
#include "records.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const char* steps;       // levels: see steps.cu
  const u16* x;            // [tokens][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;   // tokens <= TOKENS
  int tiles, items, groups;        // groups stored per row
  int items_per_group;             // 1 unless GROUP == 256
  int k_warps;                     // warps that share a unit; divides WARPS
  int sums_offset;                 // in bytes, of the sums in shared memory
};

constexpr bool LEVELS = !UNIFORM && !SIGNS;
constexpr int THREADS = WARPS * 32;
constexpr int UNIT_ROWS = TILES * 16;
constexpr int GROUP_SCALE_BYTES = 32 * SLOTS;         // of 16 rows
constexpr int TILE_BYTES = SLICE_BYTES + (LEVELS ? 0 : GROUP_SCALE_BYTES);
constexpr int STAGE_BYTES = TILES * TILE_BYTES;
constexpr int PARTS = TOKENS / 8;                     // products side by side
constexpr int SUMS = TOKENS / 2;                      // of a lane and tile
constexpr int X_BYTES = TOKENS * 256;                 // of a slice
constexpr int X_STRIDE = X_BYTES + TOKENS * 4;        // with the sums of x over it
// Accumulators of a sum, as a product waits for the one before it: SIGNS 1: of one tile or two, for two kinds
// of product; SIGNS 2: for each plane too.
constexpr int CHAINS = SIGNS == 2 ? (BITS == 2 ? 4 : BITS) : SIGNS && TILES < 4 ? 2 : 1;
constexpr bool TILE_BY_TILE = TOKENS <= 16;           // x of a slice stays in registers (codes)
constexpr int SUM_TOKENS = TOKENS < 16 ? TOKENS : 16;   // whose sums meet at a time
constexpr int KEPT = PANELS == 1 ? 4 : 2;             // pieces of x that stay in registers
// What a product of an integer, as its operand has it, counts.
constexpr float WORTH = SIGNS ? 1.f : LEVELS ? 2.f * 16777216.f : 4.f / (1 << BITS) * 16777216.f;

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void copy16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}
DEVICE u32 larger_pair(u32 a, u32 b) { u32 d; asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE void multiply_add(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Adds products in units of two rows.
DEVICE void add(float (&to)[SUMS], const float (&product)[SUMS], float2 unit) {
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    to[i] = fmaf(product[i], unit.x, to[i]);
    to[i + 1] = fmaf(product[i + 1], unit.x, to[i + 1]);
    to[i + 2] = fmaf(product[i + 2], unit.y, to[i + 2]);
    to[i + 3] = fmaf(product[i + 3], unit.y, to[i + 3]);
  }
}

// 16 rows by 16 weights of each, whose places are those of lanes 0 and 1 of every four (SELECTOR 0), or of
// 2 and 3. All weights of a row are the same number, `upper` in rows g and `lower` in rows g + 8.
template <int SELECTOR> DEVICE void multiply_add_sparse(float* d, u32 upper, u32 lower, const u32 (&x)[4], u32 places) {
  asm("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %4, %5}, "
      "{%6, %7, %8, %9}, {%0, %1, %2, %3}, %10, %11;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(upper), "r"(lower), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(places), "n"(SELECTOR));
}
DEVICE u32 places_of(u32 bits) {   // 0 or 1, and 2 or 3, of every four: bits 0, 2, 4 ... of a word
  u32 d;
  asm("lop3.b32 %0, %1, 0x55555555, %2, 0xEA;" : "=r"(d) : "r"(bits), "r"(0x88888888u));
  return d;
}
DEVICE void both_signs(u32& first, u32& second, u32 pair) {   // (-x, x) of the two inputs of a pair
  const u32 negative = pair ^ 0x80008000u;
  first = __byte_perm(pair, negative, 0x1054);
  second = __byte_perm(pair, negative, 0x3276);
}

// Codes of rows g and g + 8 of one slice, and what multiplies their products and the sum of x.
struct Cut {
  Fields fields[2];
  float2 unit, offset;

  DEVICE void read(const char* tile, int lane) {
    u32 low[BITS], high[BITS];
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      const uint2 words = *(const uint2*)(tile + q * 256 + lane * 8);
      low[q] = words.x;
      high[q] = words.y;
    }
    fields[0].interleave(low);
    fields[1].interleave(high);
    const u32* pairs = (const u32*)(tile + SLICE_BYTES) + (lane >> 2) * SLOTS;
    unit = halves(pairs[0]);
    offset = halves(pairs[SLOTS - 1]);
    offset.x = fmaf(-ALL, unit.x, offset.x);
    offset.y = fmaf(-ALL, unit.y, offset.y);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
batch_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // rings, records, x, sums of x over slices, sums
  __shared__ u32 largest_of[TOKENS];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const int g = lane >> 2, t = lane & 3;
  const int parts = cluster_size(), part = cluster_rank();
  const int clusters = gridDim.x / parts, cluster = blockIdx.x / parts;
  const int slices = p.items * 2, row_warps = WARPS / p.k_warps;
  const int row_warp = warp / p.k_warps, k_warp = warp % p.k_warps;
  const int block_begin = slices * part / parts, block_slices = slices * (part + 1) / parts - block_begin;
  // Slices of this warp in a panel, counted from the block's first.
  auto slices_of = [&](int panel, int& begin, int& count) {
    const int first = block_slices * panel / PANELS, all = block_slices * (panel + 1) / PANELS - first;
    begin = first + all * k_warp / p.k_warps;
    count = first + all * (k_warp + 1) / p.k_warps - begin;
  };
  const int units = (p.tiles + TILES - 1) / TILES, pass_units = clusters * row_warps;
  const int passes = (units + pass_units - 1) / pass_units;
  const int first_unit = cluster * row_warps + row_warp;
  const int own_passes = first_unit < units ? (units - first_unit + pass_units - 1) / pass_units : 0;
  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  char* records = shared + WARPS * STAGES * STAGE_BYTES + warp * (LEVELS ? TILES * RECORDS_BYTES : 0);
  char* x_at = shared + WARPS * (STAGES * STAGE_BYTES + (LEVELS ? TILES * RECORDS_BYTES : 0));
  float* sums = (float*)(shared + p.sums_offset);
  if (threadIdx.x < TOKENS) largest_of[threadIdx.x] = 0;
  let_next_kernel_start();

  // Half a warp copies a tile's slice: its planes, and (but for levels) its scales with one more instruction.
  constexpr int COPIERS = TILES == 1 ? 1 : TILES / 2, LANES = TILES == 1 ? 32 : 16;
  const int copier = lane & (LANES - 1);
  const bool copies_scales = !LEVELS && copier < SLOTS * 2;
  const char* planes_from[COPIERS];
  const char* scales_from[COPIERS];
  int fetch_left = 0, fetch_panel = 0, fetch_unit = first_unit, panel_left = 0, fetch_slice = 0;
  for (int panel = 0, begin, count; panel < PANELS; panel++) {
    slices_of(panel, begin, count);
    fetch_left += own_passes * count;
  }
  const u32 lane_offset = (TILES == 1 ? 0 : lane >> 4) * TILE_BYTES + copier * 16;
  auto fetch = [&](u32 stage) {
    if (fetch_left > 0) {
      while (panel_left == 0) {
        int begin;
        slices_of(fetch_panel, begin, panel_left);
        const int slice = fetch_slice = block_begin + begin;
#pragma unroll
        for (int i = 0; i < COPIERS; i++) {
          const int tile = min(fetch_unit * TILES + i * 2 + (TILES == 1 ? 0 : lane >> 4), p.tiles - 1);
          planes_from[i] = p.planes + ((long long)tile * slices + slice) * SLICE_BYTES + copier * 16;
          const long long group = (long long)tile * p.groups + (GROUP == 256 ? 0 : slice);
          scales_from[i] = p.scales + group * GROUP_SCALE_BYTES + copier * 16;
        }
        if (++fetch_panel == PANELS) { fetch_panel = 0; fetch_unit += pass_units; }
      }
      const u32 lane_at = stage + lane_offset;
#pragma unroll
      for (int i = 0; i < COPIERS; i++) {
        const u32 to = lane_at + i * 2 * TILE_BYTES;
#pragma unroll
        for (int c = 0; c < BITS * 16 / LANES; c++) copy16(to + c * LANES * 16, planes_from[i] + c * LANES * 16);
        if (BITS * 16 % LANES && copier < BITS * 16 % LANES)
          copy16(to + BITS * 16 / LANES * LANES * 16, planes_from[i] + BITS * 16 / LANES * LANES * 16);
        planes_from[i] += SLICE_BYTES;
        if (GROUP == 256) {
          const int group = fetch_slice / 2 / p.items_per_group;
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i] + group * GROUP_SCALE_BYTES);
        } else {
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i]);
          scales_from[i] += GROUP_SCALE_BYTES;
        }
      }
      if (GROUP == 256) fetch_slice++;
      fetch_left--;
      panel_left--;
    }
    commit_copies();
  };
  const u32 ring_begin = shared_address(ring);
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) fetch(ring_begin + s * STAGE_BYTES);

  // x: a piece is 8 tokens of a slice; lane 4 g + t takes 32 inputs of token g.
  __syncthreads();
  wait_for_previous_kernel();
  const bool wide = (((u64)p.x | (u64)p.x_stride * 2) & 15) == 0;
  auto load_piece = [&](int first_slice, int piece, u32 (&w)[16]) {
    const int token = piece % PARTS * 8 + g, k = (first_slice + piece / PARTS) * 128 + 32 * t;
    const u16* from = p.x + (long long)token * p.x_stride + k;
    if (token < p.tokens && wide && k + 32 <= p.in_features) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 v = ((const uint4*)from)[i];
        w[4 * i] = v.x; w[4 * i + 1] = v.y; w[4 * i + 2] = v.z; w[4 * i + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; i++) {
        const u32 low = token < p.tokens && k + 2 * i < p.in_features ? from[2 * i] : 0;
        const u32 high = token < p.tokens && k + 2 * i + 1 < p.in_features ? from[2 * i + 1] : 0;
        w[i] = low | high << 16;
      }
    }
  };
  auto find_largest = [&](int piece, const u32 (&w)[16]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) most = larger_pair(most, w[i] & 0x7FFF7FFFu);
    most = max(most & 0xFFFFu, most >> 16);
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    if (t == 0) atomicMax(largest_of + piece % PARTS * 8 + g, most);
  };
  auto exponent_of = [&](int token) {   // of the largest; very small or large ones cannot be brought into range
    return min(max((int)(__float_as_uint(x_to_float((u16)largest_of[token])) >> 23), 16), 254);
  };
  auto store_piece = [&](int piece, const u32 (&w)[16]) {
    const int slice = piece / PARTS, column = piece % PARTS;
    const float up = __uint_as_float((u32)(254 + 14 - exponent_of(column * 8 + g)) << 23 & 0x7F800000u);
    char* to = x_at + slice * X_STRIDE;
    float sum = 0.f;
    auto scaled_pair = [&](int first, int second, float scale) {   // of inputs of the lane's 32
      const float low = x_to_float((u16)(w[first >> 1] >> 16 * (first & 1)));
      const float high = x_to_float((u16)(w[second >> 1] >> 16 * (second & 1)));
      sum += low + high;
      return half_pair(low * scale, high * scale);
    };
    if (SIGNS) {
      // Word m of a lane's metadata (below) is of inputs 16 (m / 2) + m % 2 and every second one after
      // it. Lane 4 g + i multiplies numbers i and i + 4 of 8, s = 0 to 3 of the slice side by side.
#pragma unroll
      for (int m = 0; m < 4; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int input = 16 * (m >> 1) + (m & 1) + 2 * i;
          *(u32*)(to + (m * PARTS + column) * 512 + g * 64 + i * 16 + t * 4) = scaled_pair(input, input + 8, up);
        }
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        u32 pair[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int b = 2 * j + h;
          pair[h] = scaled_pair(b, b + 16, up * (1.f / (1 << field_position(b))));
        }
        const int v = j * PARTS + column;
        *(uint2*)(to + (v >> 1) * 512 + lane * 16 + (v & 1) * 8) = make_uint2(pair[0], pair[1]);
      }
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (t == 0) *(float*)(x_at + slice * X_STRIDE + X_BYTES + (column * 8 + g) * 4) = sum * up * (1.f / WORTH);
  };
  auto prepare = [&](int panel) {
    const int first = block_slices * panel / PANELS, first_slice = block_begin + first;
    const int pieces = (block_slices * (panel + 1) / PANELS - first) * PARTS;
    u32 kept[KEPT][16], w[16];
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) load_piece(first_slice, warp + i * WARPS, kept[i]);
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) find_largest(warp + i * WARPS, kept[i]);
#pragma unroll 1
    for (int piece = warp + KEPT * WARPS; piece < pieces; piece += WARPS) {
      load_piece(first_slice, piece, w);
      find_largest(piece, w);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) store_piece(warp + i * WARPS, kept[i]);
#pragma unroll 1
    for (int piece = warp + KEPT * WARPS; piece < pieces; piece += WARPS) {
      load_piece(first_slice, piece, w);
      store_piece(piece, w);
    }
    __syncthreads();
  };

  if (PANELS == 1) prepare(0);

  const int pitch = row_warps * UNIT_ROWS + 4;
  u32 last = ring_begin + (STAGES - 1) * STAGE_BYTES;   // the stage that has been used
  const char* at = ring;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    float sum[CHAINS][TILES][SUMS];
#pragma unroll
    for (int h = 0; h < CHAINS; h++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < SUMS; j++) sum[h][i][j] = 0.f;
#pragma unroll 1
    for (int panel = 0; panel < PANELS; panel++) {
      if (PANELS > 1) {   // else x has been prepared
        int before[PARTS][2];
#pragma unroll
        for (int c = 0; c < PARTS; c++)
          for (int e = 0; e < 2; e++) before[c][e] = exponent_of(8 * c + 2 * t + e);
        __syncthreads();
        prepare(panel);
        // The range of a token may have become larger.
#pragma unroll
        for (int c = 0; c < PARTS; c++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int shift = before[c][e] - exponent_of(8 * c + 2 * t + e);
            const float factor = __uint_as_float((u32)max(127 + shift, 0) << 23);
#pragma unroll
            for (int h = 0; h < CHAINS; h++)
#pragma unroll
              for (int i = 0; i < TILES; i++) {
                sum[h][i][4 * c + e] *= factor;
                sum[h][i][4 * c + 2 + e] *= factor;
              }
          }
      }
      int begin, count;
      slices_of(panel, begin, count);
      const int first_slice = begin;
      begin -= block_slices * panel / PANELS;   // of the panel
      const char* x = x_at + begin * X_STRIDE + lane * 16;
      const float* x_sum = (const float*)(x_at + begin * X_STRIDE + X_BYTES) + 2 * t;
      if (pass >= own_passes) count = 0;
      // Records of levels are made from scales that were fetched four slices ahead.
      const int rows_begin = (first_unit + pass * pass_units) * TILES;   // in tiles
      RecordSource source[TILES];
      auto fetch_scales = [&](int n) {
        const int slice = block_begin + first_slice + min(n + t, count - 1);
        const int group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
#pragma unroll
        for (int i = 0; i < TILES; i++)
          source[i].fetch(p.scales, p.steps, ((long long)min(rows_begin + i, p.tiles - 1) * p.groups + group) * 8 + g);
      };
      if (LEVELS && count > 0) fetch_scales(0);
#pragma unroll 1
      for (int n = 0; n < count; n++) {
        wait_copies<STAGES - 2>();
        __syncwarp();
        fetch(last);
        auto add_offset = [&](float (&to)[SUMS], float2 offset) {
#pragma unroll
          for (int i = 0; i < PARTS; i++) {
            const float2 s = *(const float2*)(x_sum + 8 * i);
            to[4 * i] = fmaf(s.x, offset.x, to[4 * i]);
            to[4 * i + 1] = fmaf(s.y, offset.x, to[4 * i + 1]);
            to[4 * i + 2] = fmaf(s.x, offset.y, to[4 * i + 2]);
            to[4 * i + 3] = fmaf(s.y, offset.y, to[4 * i + 3]);
          }
        };
        if constexpr (SIGNS) {
          u32 words[TILES][BITS][2], alpha[TILES][BITS][2];   // bits 0 to 15 of both rows, and 16 to 31
          float2 offset[TILES];
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            const char* tile = at + i * TILE_BYTES;
            const u32* pairs = (const u32*)(tile + SLICE_BYTES) + g * SLOTS;
#pragma unroll
            for (int q = 0; q < BITS; q++) {
              const uint2 rows = *(const uint2*)(tile + q * 256 + lane * 8);
              words[i][q][0] = __byte_perm(rows.x, rows.y, 0x5410);
              words[i][q][1] = __byte_perm(rows.x, rows.y, 0x7632);
              alpha[i][q][0] = __byte_perm(pairs[q], 0, 0x1010);
              alpha[i][q][1] = __byte_perm(pairs[q], 0, 0x3232);
            }
            offset[i] = halves(pairs[BITS]);
          }
#pragma unroll
          for (int m = 0; m < 4; m++) {   // the even inputs of 0 to 15, the odd ones, those of 16 to 31
            u32 places[TILES][BITS];
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
              for (int q = 0; q < BITS; q++)
                places[i][q] = places_of(words[i][q][m >> 1] >> (m & 1));
#pragma unroll
            for (int c = 0; c < PARTS; c++) {
              const uint4 dense = *(const uint4*)(x + (m * PARTS + c) * 512);
              u32 operand[2][4];
              both_signs(operand[0][0], operand[0][1], dense.x);
              both_signs(operand[0][2], operand[0][3], dense.y);
              both_signs(operand[1][0], operand[1][1], dense.z);
              both_signs(operand[1][2], operand[1][3], dense.w);
#pragma unroll
              for (int q = 0; q < BITS; q++)
#pragma unroll
                for (int i = 0; i < TILES; i++)
                  multiply_add_sparse<0>(sum[SIGNS == 2 ? q : 0][i] + 4 * c, alpha[i][q][0], alpha[i][q][1], operand[0], places[i][q]);
#pragma unroll
              for (int q = 0; q < BITS; q++)
#pragma unroll
                for (int i = 0; i < TILES; i++)
                  multiply_add_sparse<1>(sum[SIGNS == 2 ? q + CHAINS - BITS : CHAINS - 1][i] + 4 * c, alpha[i][q][0], alpha[i][q][1], operand[1], places[i][q]);
            }
          }
#pragma unroll
          for (int i = 0; i < TILES; i++) add_offset(sum[0][i], offset[i]);
        } else if constexpr (LEVELS) {
          if ((n & 3) == 0) {
#pragma unroll
            for (int i = 0; i < TILES; i++) {
              Record record;
              record.make(source[i]);
              record.write(records + ((i * 4 + t) * 8 + g) * RECORD_BYTES);
            }
            fetch_scales(n + 4);
            __syncwarp();
          }
          Record record[TILES];
          Planes planes[TILES][2];
          float product[TILES][SUMS];
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            record[i].read_integers(records + ((i * 4 + (n & 3)) * 8 + g) * RECORD_BYTES);
#pragma unroll
            for (int q = 0; q < BITS; q++) {
              const uint2 words = *(const uint2*)(at + i * TILE_BYTES + q * 256 + lane * 8);
              planes[i][0].fields[q].interleave(&words.x);
              planes[i][1].fields[q].interleave(&words.y);
            }
#pragma unroll
            for (int s = 0; s < SUMS; s++) product[i][s] = 0.f;
          }
#pragma unroll
          for (int r = 0; r < 4; r++) {
            // With 8 tokens 16 bytes of x are of two steps.
            uint4 operand[PARTS];
#pragma unroll
            for (int v = 0; v < PARTS; v++) operand[v] = *(const uint4*)(x + (r * PARTS + v) * 512);
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
              for (int i = 0; i < TILES; i++) {
                u32 a[4];
#pragma unroll
                for (int k = 0; k < 4; k++) a[k] = planes[i][k & 1].pair(4 * r + 2 * h + (k >> 1), record[i].integers[k & 1]);
#pragma unroll
                for (int c = 0; c < PARTS; c++) {
                  const int v = h * PARTS + c;
                  const uint4 b = operand[v >> 1];
                  multiply_add(product[i] + 4 * c, a[0], a[1], a[2], a[3], v & 1 ? b.z : b.x, v & 1 ? b.w : b.y);
                }
              }
          }
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            record[i].read_units(records + ((i * 4 + (n & 3)) * 8 + g) * RECORD_BYTES);
            add(sum[0][i], product[i], record[i].unit);
            add_offset(sum[0][i], record[i].offset);
          }
        } else if constexpr (TILE_BY_TILE) {
          uint4 operand[TOKENS / 2];
#pragma unroll
          for (int v = 0; v < TOKENS / 2; v++) operand[v] = *(const uint4*)(x + v * 512);
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            Cut a;
            a.read(at + i * TILE_BYTES, lane);
            float product[SUMS];
#pragma unroll
            for (int s = 0; s < SUMS; s++) product[s] = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++) {
              const u32 a0 = a.fields[0].pair(2 * j), a1 = a.fields[1].pair(2 * j);
              const u32 a2 = a.fields[0].pair(2 * j + 1), a3 = a.fields[1].pair(2 * j + 1);
#pragma unroll
              for (int c = 0; c < PARTS; c++) {
                const int v = j * PARTS + c;
                const uint4 b = operand[v >> 1];
                multiply_add(product + 4 * c, a0, a1, a2, a3, v & 1 ? b.z : b.x, v & 1 ? b.w : b.y);
              }
            }
            add(sum[0][i], product, a.unit);
            add_offset(sum[0][i], a.offset);
          }
        } else {
          Cut a[TILES];
          float product[TILES][SUMS];
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            a[i].read(at + i * TILE_BYTES, lane);
#pragma unroll
            for (int s = 0; s < SUMS; s++) product[i][s] = 0.f;
          }
#pragma unroll
          for (int j = 0; j < 8; j++) {
            uint4 operand[(PARTS + 1) / 2];
#pragma unroll
            for (int v = 0; v < PARTS / 2; v++) operand[v] = *(const uint4*)(x + (j * (PARTS / 2) + v) * 512);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
              const u32 a0 = a[i].fields[0].pair(2 * j), a1 = a[i].fields[1].pair(2 * j);
              const u32 a2 = a[i].fields[0].pair(2 * j + 1), a3 = a[i].fields[1].pair(2 * j + 1);
#pragma unroll
              for (int c = 0; c < PARTS; c++) {
                const uint4 b = operand[c >> 1];
                multiply_add(product[i] + 4 * c, a0, a1, a2, a3, c & 1 ? b.z : b.x, c & 1 ? b.w : b.y);
              }
            }
          }
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            add(sum[0][i], product[i], a[i].unit);
            add_offset(sum[0][i], a[i].offset);
          }
        }
        x += X_STRIDE;
        x_sum += X_STRIDE / 4;
        last = shared_address(at);
        at += STAGE_BYTES;
        if (at == ring + STAGES * STAGE_BYTES) at = ring;
      }
    }

#pragma unroll
    for (int h = 1; h < CHAINS; h++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < SUMS; j++) sum[0][i][j] += sum[h][i][j];
    // A few tokens at a time, so that their sums find room.
    const int quads = row_warps * (UNIT_ROWS / 4);
    const int first_row = (pass * clusters + cluster) * row_warps * UNIT_ROWS;
#pragma unroll
    for (int first = 0; first < TOKENS; first += SUM_TOKENS) {
      if (pass || first) cluster_wait();   // the sums before have been read
      else __syncthreads();                // the sums may lie where x was
#pragma unroll
      for (int c = 0; c < SUM_TOKENS / 8; c++) {
        const int column = 8 * c + 2 * t, token = first + column;
        const float down = __uint_as_float((u32)(exponent_of(token) - 14) << 23);
        const float down_next = __uint_as_float((u32)(exponent_of(token + 1) - 14) << 23);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          float* at = sums + (k_warp * SUM_TOKENS + column) * pitch + row_warp * UNIT_ROWS + i * 16 + g;
          const float* from = sum[0][i] + first / 2 + 4 * c;
          at[0] = from[0] * WORTH * down;
          at[pitch] = from[1] * WORTH * down_next;
          at[8] = from[2] * WORTH * down;
          at[pitch + 8] = from[3] * WORTH * down_next;
        }
      }
      cluster_arrive();
      cluster_wait();
      // Each block of the cluster finishes a share of the sums.
      const int tokens = min(p.tokens - first, SUM_TOKENS);
      for (int o = part * THREADS + threadIdx.x; o < tokens * quads; o += parts * THREADS) {
        const int token = o / quads, row = o % quads * 4, y_row = first_row + row;
        const u32 at = shared_address(sums + token * pitch + row);
        float4 whole = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int r = 0; r < parts; r++)
          for (int k = 0; k < p.k_warps; k++) {
            const float4 v = load_cluster(at + k * (SUM_TOKENS * 4) * pitch, r);
            whole.x += v.x; whole.y += v.y; whole.z += v.z; whole.w += v.w;
          }
        const float values[4] = {whole.x, whole.y, whole.z, whole.w};
        u16 out[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float bias = p.bias && y_row + i < p.rows ? x_to_float(p.bias[y_row + i]) : 0.f;
          out[i] = float_to_x(values[i] + bias);
        }
        u16* y = p.y + (first + token) * p.y_stride + y_row;
        if (y_row + 4 <= p.rows && ((u64)y & 7) == 0) {
          *(uint2*)y = make_uint2((u32)out[0] | (u32)out[1] << 16, (u32)out[2] | (u32)out[3] << 16);
        } else {
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (y_row + i < p.rows) y[i] = out[i];
        }
      }
      cluster_arrive();
    }
  }
  cluster_wait();   // no block leaves while another reads its sums
}
