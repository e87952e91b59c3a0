// y = x W^T for 5 to 64 tokens, on the fp16 tensor cores that every warp has for itself (mma.sync): up to
// 4 bits, groups of 128 and more, scales in half.
//
// A weight is an integer times its group's unit, and an offset. The integers are cut from the plane words
// in registers and are the A operand; x is B, in shared memory. One of
//   codes    uniform levels: the integer is the code, an exact subnormal half (fields.cuh)
//   levels   free levels: integers below 2048 in units of a step (levels.cuh)
//   signs    free levels: one product for each plane, of its bits alone; exact, and less to cut, but a
//            product for each plane
// The sums of a slice are exact integers times x in fp32 until they are multiplied with the unit.
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
// -D: TOKENS 8|16|32|64, TILES 1|2|4, WARPS, STAGES (slices in a warp's ring), PANELS, SIGNS 0|1 (free
// levels). Grid: cluster size * clusters; dynamic shared memory: see `batch_sizes` in batch_plans.py.

#include "fields.cuh"
#include "hopper.cuh"
#include "levels.cuh"

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
constexpr int TILE_BYTES = SLICE_BYTES + GROUP_SCALE_BYTES + (LEVELS ? 32 : 0);
constexpr int STAGE_BYTES = TILES * TILE_BYTES;
constexpr int PARTS = TOKENS / 8;                     // products side by side
constexpr int SUMS = TOKENS / 2;                      // of a lane and tile
constexpr int X_BYTES = TOKENS * 256;                 // of a slice
constexpr int X_STRIDE = X_BYTES + TOKENS * 4;        // with the sums of x over it
constexpr int PRODUCTS = SIGNS ? BITS : 1;            // per weight
constexpr bool TILE_BY_TILE = TOKENS <= 16;           // x of a slice stays in registers
constexpr int SUM_TOKENS = TOKENS < 16 ? TOKENS : 16;   // whose sums meet at a time
constexpr int KEPT = PANELS == 1 ? 4 : 2;             // pieces of x that stay in registers
// What a product of an integer, as its operand has it, counts.
constexpr float WORTH = LEVELS ? 1.f : SIGNS ? 2.f * 16777216.f : 4.f / (1 << BITS) * 16777216.f;

__host__ __device__ constexpr int input_of(int b, int e) { return LEVELS ? level_input(b, e) : b + 16 * e; }
__host__ __device__ constexpr int position_of(int b) { return LEVELS ? 0 : field_position(b); }

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
DEVICE float divide(float a, float b) {   // within 2 units in the last place; b is no subnormal
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}
DEVICE float2 halves(u32 pair) { return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16))); }

// Operands of a tile: rows g and g + 8 of one slice, of all planes or of one.
struct Cut {
  Fields fields[2];
  u32 pairs[2][16];
  DEVICE u32 pair(int row, int b) const { return LEVELS ? pairs[row][b] : fields[row].pair(b); }
};

// Scales of rows g and g + 8, what multiplies the products, and the sum of x.
struct Units {
  float2 unit[PRODUCTS], offset;
  u32 integers[BITS];   // levels

  DEVICE void read(const char* tile, int lane) {
    const u32* pairs = (const u32*)(tile + SLICE_BYTES) + (lane >> 2) * SLOTS;
    offset = halves(pairs[SLOTS - 1]);
    if (UNIFORM) {
      unit[0] = halves(pairs[0]);
      offset.x = fmaf(-ALL, unit[0].x, offset.x);
      offset.y = fmaf(-ALL, unit[0].y, offset.y);
    } else if (SIGNS) {
#pragma unroll
      for (int q = 0; q < PRODUCTS; q++) {
        unit[q] = halves(pairs[q]);
        offset.x -= unit[q].x;
        offset.y -= unit[q].y;
      }
    } else {
      const u32 step = *(const u32*)(tile + SLICE_BYTES + GROUP_SCALE_BYTES + (lane >> 2) * 4);
      constexpr float LEAST = 8.6736174e-19f;
      float2 alpha[BITS], largest = make_float2(LEAST, LEAST);
#pragma unroll
      for (int q = 0; q < BITS; q++) {
        alpha[q] = halves(pairs[q]);
        largest.x = fmaxf(largest.x, fabsf(alpha[q].x));
        largest.y = fmaxf(largest.y, fabsf(alpha[q].y));
      }
      const float2 m = make_float2((float)(step & 0xFFFFu), (float)(step >> 16));
      unit[0] = make_float2(divide(largest.x, m.x), divide(largest.y, m.y));
      const float2 inverse = make_float2(divide(m.x, largest.x), divide(m.y, largest.y));
#pragma unroll
      for (int q = 0; q < BITS; q++)   // rounded by the addition; NaN stays
        integers[q] = half_pair(fmaf(alpha[q].x, inverse.x, 12582912.f) - 12582912.f,
                                fmaf(alpha[q].y, inverse.y, 12582912.f) - 12582912.f);
    }
  }
};

DEVICE void cut(Cut& to, const Units& units, const char* tile, int product, int lane) {
  u32 low[BITS], high[BITS];
#pragma unroll
  for (int q = 0; q < (SIGNS ? 1 : BITS); q++) {
    const uint2 words = *(const uint2*)(tile + (SIGNS ? product : q) * 256 + lane * 8);
    low[q] = words.x;
    high[q] = words.y;
  }
  if (LEVELS) {
    Levels levels;
    levels.make(units.integers);
    levels.pairs(0, low, to.pairs[0]);
    levels.pairs(1, high, to.pairs[1]);
  } else {
    to.fields[0].interleave(low);
    to.fields[1].interleave(high);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
batch_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // rings, x, sums of x over slices, sums
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
  char* x_at = shared + WARPS * STAGES * STAGE_BYTES;
  float* sums = (float*)(shared + p.sums_offset);
  if (threadIdx.x < TOKENS) largest_of[threadIdx.x] = 0;
  let_next_kernel_start();

  // Half a warp copies a tile's slice: its planes, and its scales and steps with one more instruction.
  constexpr int COPIERS = TILES == 1 ? 1 : TILES / 2, LANES = TILES == 1 ? 32 : 16;
  const int copier = lane & (LANES - 1);
  const bool copies_scales = copier < SLOTS * 2 + (LEVELS ? 2 : 0), copies_steps = copier >= SLOTS * 2;
  const char* planes_from[COPIERS];
  const char* scales_from[COPIERS];
  const int scales_step = copies_steps ? 32 : GROUP_SCALE_BYTES;
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
          scales_from[i] = copies_steps ? p.steps + group * 32 + (copier - SLOTS * 2) * 16
                                        : p.scales + group * GROUP_SCALE_BYTES + copier * 16;
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
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i] + group * scales_step);
        } else {
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i]);
          scales_from[i] += scales_step;
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
    char* to = x_at + slice * X_STRIDE + lane * 16;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      u32 pair[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int b = 2 * j + h, first = input_of(b, 0), second = input_of(b, 1);
        const float low = x_to_float((u16)(w[first >> 1] >> 16 * (first & 1)));
        const float high = x_to_float((u16)(w[second >> 1] >> 16 * (second & 1)));
        const float scale = up * (1.f / (1 << position_of(b)));
        pair[h] = half_pair(low * scale, high * scale);
        sum += low + high;
      }
      const int v = j * PARTS + column;
      *(uint2*)(to + (v >> 1) * 512 + (v & 1) * 8) = make_uint2(pair[0], pair[1]);
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
    float sum[TILES][SUMS];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < SUMS; j++) sum[i][j] = 0.f;
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
            for (int i = 0; i < TILES; i++) {
              sum[i][4 * c + e] *= factor;
              sum[i][4 * c + 2 + e] *= factor;
            }
          }
      }
      int begin, count;
      slices_of(panel, begin, count);
      begin -= block_slices * panel / PANELS;   // of the panel
      const char* x = x_at + begin * X_STRIDE + lane * 16;
      const float* x_sum = (const float*)(x_at + begin * X_STRIDE + X_BYTES) + 2 * t;
      if (pass >= own_passes) count = 0;
#pragma unroll 1
      for (int n = 0; n < count; n++) {
        wait_copies<STAGES - 2>();
        __syncwarp();
        fetch(last);
        auto add = [&](float (&to)[SUMS], const float (&product)[SUMS], float2 unit) {
#pragma unroll
          for (int i = 0; i < SUMS; i += 4) {
            to[i] = fmaf(product[i], unit.x, to[i]);
            to[i + 1] = fmaf(product[i + 1], unit.x, to[i + 1]);
            to[i + 2] = fmaf(product[i + 2], unit.y, to[i + 2]);
            to[i + 3] = fmaf(product[i + 3], unit.y, to[i + 3]);
          }
        };
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
        if (TILE_BY_TILE) {
          uint4 operand[TOKENS / 2];
#pragma unroll
          for (int v = 0; v < TOKENS / 2; v++) operand[v] = *(const uint4*)(x + v * 512);
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            Units units;
            units.read(at + i * TILE_BYTES, lane);
#pragma unroll
            for (int q = 0; q < PRODUCTS; q++) {
              Cut a;
              cut(a, units, at + i * TILE_BYTES, q, lane);
              float product[SUMS];
#pragma unroll
              for (int s = 0; s < SUMS; s++) product[s] = 0.f;
#pragma unroll
              for (int j = 0; j < 8; j++) {
                const u32 a0 = a.pair(0, 2 * j), a1 = a.pair(1, 2 * j);
                const u32 a2 = a.pair(0, 2 * j + 1), a3 = a.pair(1, 2 * j + 1);
#pragma unroll
                for (int c = 0; c < PARTS; c++) {
                  const int v = j * PARTS + c;
                  const uint4 b = operand[v >> 1];
                  multiply_add(product + 4 * c, a0, a1, a2, a3, v & 1 ? b.z : b.x, v & 1 ? b.w : b.y);
                }
              }
              add(sum[i], product, units.unit[q]);
            }
            add_offset(sum[i], units.offset);
          }
        } else {
          Units units[TILES];
#pragma unroll
          for (int i = 0; i < TILES; i++) units[i].read(at + i * TILE_BYTES, lane);
#pragma unroll
          for (int q = 0; q < PRODUCTS; q++) {
            Cut a[TILES];
            float product[TILES][SUMS];
#pragma unroll
            for (int i = 0; i < TILES; i++) {
              cut(a[i], units[i], at + i * TILE_BYTES, q, lane);
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
                const u32 a0 = a[i].pair(0, 2 * j), a1 = a[i].pair(1, 2 * j);
                const u32 a2 = a[i].pair(0, 2 * j + 1), a3 = a[i].pair(1, 2 * j + 1);
#pragma unroll
                for (int c = 0; c < PARTS; c++) {
                  const uint4 b = operand[c >> 1];
                  multiply_add(product[i] + 4 * c, a0, a1, a2, a3, c & 1 ? b.z : b.x, c & 1 ? b.w : b.y);
                }
              }
            }
#pragma unroll
            for (int i = 0; i < TILES; i++) add(sum[i], product[i], units[i].unit[q]);
          }
          for (int i = 0; i < TILES; i++) add_offset(sum[i], units[i].offset);
        }
        x += X_STRIDE;
        x_sum += X_STRIDE / 4;
        last = shared_address(at);
        at += STAGE_BYTES;
        if (at == ring + STAGES * STAGE_BYTES) at = ring;
      }
    }

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
          const float* from = sum[i] + first / 2 + 4 * c;
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
