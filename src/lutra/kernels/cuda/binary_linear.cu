// y = x W^T for 1 to 4 tokens, on binary tensor cores.
//
// A plane word is already an operand of the binary product (m16n8k128, AND + population count), so no
// weight bit is ever unpacked. The activations are cut into bits instead: in every slice of 128 inputs
// x becomes 16-bit integers times one power-free scale, and each of the 16 bits is one column:
//
//   sum_i b_i x_i = scale * sum_j 2^j popcount(b & bit_j(x))        (bit 15 counts negative)
//
// Sums are exact integers until the group's alpha multiplies them in fp32; two runs give the same bits.
// The rounding of x is 2^-16 of the largest |x| of its slice, well below the rounding of a half result.
// A column pair (2t, 2t+1) of two products holds bits 4t .. 4t+3, so a lane needs three
// multiply-adds to combine them; the factor 16^t is part of the lane's scale.
//
// Work: block b takes tiles of 16 rows; its warps split the inputs (k_warps) and, if a row is short,
// several tiles. Every warp streams its items through its own ring in shared memory (cp.async), filled
// before the previous kernel has finished. Partial sums of the warps meet in shared memory, in order.
// If the bits of x do not fit in shared memory, the row is walked in panels, sums kept in `partial`.
//
// Further -D: TOKENS 1..4, WARPS, STAGES (items in a warp's ring).
// Grid: any number of blocks of WARPS x 32 threads; dynamic shared memory: see launch.py.

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const u16* x;            // [TOKENS][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [TOKENS][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features;
  int tiles, items, groups;        // groups stored per row
  int items_per_group;             // 1 unless GROUP == 256
  int panel_items, k_warps;
};

constexpr int THREADS = WARPS * 32;
constexpr int STAGE_BYTES = PLANE_BYTES + SCALE_BYTES;
constexpr int BITS_BYTES = 512;                 // bits of x of one item and token
constexpr int RECORD_BYTES = 2 * SPLITS * 64;   // records of one item and token
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: float bits of MAGIC + i end in i
constexpr int MAGIC_BITS = 0x4B400000;

// What a lane needs per slice, split and token beside the bits of x.
struct Record {
  int start;      // float bits of MAGIC, less half the sum of the integers (t = 0 only): b in {0,1} -> {-1,+1}
  float sum;      // sum of x (t = 0 only), for the offset
  float scale;    // 2 * 16^t * scale of the integers
  float unused;
};

DEVICE void binary_product(int (&d)[4], u32 a0, u32 a1, u32 b, int start) {
  asm volatile("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc "
               "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%7,%8};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a0), "r"(a1), "r"(b), "r"(start), "r"(0));
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

// Cut x of one panel into bits. One thread takes 32 inputs of one token; four neighbours are a slice.
DEVICE void cut_activations(const Arguments& p, char* bits, Record* records, int first_item, int items) {
  const int blocks = items * 8, tasks = blocks * TOKENS;
  for (int base = 0; base < tasks; base += THREADS) {
    const int task = base + threadIdx.x, token = task / blocks, block = task % blocks;
    const bool active = task < tasks;
    const int k0 = (first_item * 8 + block) * 32;
    const u16* source = p.x + token * p.x_stride + k0;
    float v[32];
    if (active && k0 + 32 <= p.in_features && ((u64)source & 15) == 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint4 four = ((const uint4*)source)[i];
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          v[8 * i + 2 * j] = x_to_float((u16)words[j]);
          v[8 * i + 2 * j + 1] = x_to_float((u16)(words[j] >> 16));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 32; i++)
        v[i] = active && k0 + i < p.in_features ? x_to_float(source[i]) : 0.f;
    }
    float largest = 0.f, sum = 0.f;
#pragma unroll
    for (int i = 0; i < 32; i++) { largest = fmaxf(largest, fabsf(v[i])); sum += v[i]; }
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // Tiny slices (bf16 down to 1e-38) would overflow the reciprocal: they count as zero below 2^-100.
    const float inverse = largest > 7.9e-31f ? 32767.f / largest : 0.f;
    int total = 0;
    u32 r[16];
#pragma unroll
    for (int j = 0; j < 16; j++) {
      const u32 lo = __float_as_uint(fmaf(v[j], inverse, MAGIC));
      const u32 hi = __float_as_uint(fmaf(v[j + 16], inverse, MAGIC));
      total += (int)(lo - MAGIC_BITS) + (int)(hi - MAGIC_BITS);
      r[j] = __byte_perm(lo, hi, 0x5410);
    }
    transpose_step<8>(r, 0x00FF00FFu);
    transpose_step<4>(r, 0x0F0F0F0Fu);
    transpose_step<2>(r, 0x33333333u);
    transpose_step<1>(r, 0x55555555u);
    const int t = block & 3, slice = (block >> 2) & 1, item = block >> 3;
    constexpr int SHARE = 4 / SPLITS;   // neighbours that share a group
#pragma unroll
    for (int s = 1; s < SHARE; s *= 2) {
      total += __shfl_xor_sync(~0u, total, s);
      sum += __shfl_xor_sync(~0u, sum, s);
    }
    if (active) {
      // Bit k lies in column 2 (k / 4) + (k & 1) of product (k >> 1) & 1.
      uint2* words = (uint2*)(bits + ((item * 2 + slice) * TOKENS + token) * (BITS_BYTES / 2));
#pragma unroll
      for (int g = 0; g < 8; g++) {
        const int k = 4 * (g / 2) + (g & 1);
        words[4 * g + t] = make_uint2(r[k], r[k + 2]);
      }
      Record* record = records + (((item * 2 + slice) * TOKENS + token) * SPLITS + t / SHARE) * 4;
#pragma unroll
      for (int i = 0; i < SPLITS; i++) {
        const int lane_t = (t % SHARE) * SPLITS + i;
        Record out;
        out.start = MAGIC_BITS - (lane_t == 0 ? total >> 1 : 0);
        out.sum = lane_t == 0 ? sum : 0.f;
        out.scale = largest * (2.f / 32767.f) * (float)(1 << (4 * lane_t));
        out.unused = 0.f;
        record[lane_t] = out;
      }
    }
  }
}

// Position of a warp in its sequence of items: tile by tile, panel after panel.
struct Cursor {
  int tile, item, panel_end;
  DEVICE void start(const Arguments& p, int first_tile, int k_part) {
    tile = first_tile; item = k_part; panel_end = min(p.panel_items, p.items);
    if (tile >= p.tiles) panel_end = item = 0;
    settle(p, first_tile, k_part);
  }
  DEVICE bool done() const { return panel_end == 0; }
  DEVICE void advance(const Arguments& p, int first_tile, int tile_step, int k_part) {
    item += p.k_warps;
    if (item < panel_end) return;
    tile += tile_step;
    next_tile(p, first_tile, k_part);
  }
  DEVICE void next_tile(const Arguments& p, int first_tile, int k_part) {
    if (tile < p.tiles) {
      item = panel_end - min(p.panel_items, panel_end - panel_begin(p)) + k_part;
    } else if (panel_end < p.items) {
      tile = first_tile; item = panel_end + k_part; panel_end = min(panel_end + p.panel_items, p.items);
    } else {
      panel_end = 0;
      return;
    }
    settle(p, first_tile, k_part);
  }
  DEVICE int panel_begin(const Arguments& p) const { return (panel_end - 1) / p.panel_items * p.panel_items; }
  DEVICE void settle(const Arguments& p, int first_tile, int k_part) {
    // A warp without an item in this panel (short last panel) has none in any of its tiles.
    if (panel_end && item >= panel_end) {
      if (panel_end < p.items) {
        tile = first_tile; item = panel_end + k_part; panel_end = min(panel_end + p.panel_items, p.items);
        if (item >= panel_end) panel_end = 0;
      } else panel_end = 0;
    }
  }
};

DEVICE void fetch(const Arguments& p, const Cursor& c, u32 stage, int lane, u64 policy) {
  if (!c.done()) {
    const long long index = (long long)c.tile * p.items + c.item;
    const char* planes = p.planes + index * PLANE_BYTES + lane * 16;
#pragma unroll
    for (int q = 0; q < BITS; q++) copy16_async(stage + q * 512 + lane * 16, planes + q * 512, policy);
    const int group = GROUP == 256 ? c.item / p.items_per_group : c.item * ITEM_GROUPS;
    const char* scales = p.scales + ((long long)c.tile * p.groups + group) * (16 * SLOTS * SCALE_SIZE);
#pragma unroll
    for (int i = 0; i < SCALE_BYTES; i += 512)
      if (i + lane * 16 < SCALE_BYTES)
        copy16_async(stage + PLANE_BYTES + i + lane * 16, scales + i + lane * 16, policy);
  }
  commit_copies();
}

// One item: 16 rows x 256 inputs x BITS planes x TOKENS. acc[token] = rows g and g + 8.
DEVICE void multiply(const char* stage, const char* bits, const Record* records, int lane,
                     float2 (&acc)[TOKENS]) {
  const int t = lane & 3, g = lane >> 2;
  const int top = t == 3 ? -8 : 8;    // bit 15 of two's complement is negative
#pragma unroll (BITS * TOKENS * SPLITS <= 8 ? 2 : 1)
  for (int slice = 0; slice < 2; slice++) {
    const uint2* planes = (const uint2*)(stage + slice * SLICE_BYTES) + lane;
    uint2 x[TOKENS];
#pragma unroll
    for (int m = 0; m < TOKENS; m++)
      x[m] = ((const uint2*)(bits + (slice * TOKENS + m) * (BITS_BYTES / 2)))[lane];
#pragma unroll (BITS * TOKENS <= 4 ? SPLITS : 1)
    for (int split = 0; split < SPLITS; split++) {
      const int group = GROUP == 256 ? 0 : (GROUP == 128 ? slice : slice * SPLITS + split);
      const char* scales = stage + PLANE_BYTES;
      const int row = (group * 8 + g) * SLOTS;
      const bool mine = SPLITS == 1 || t / (4 / SPLITS) == split;
      const Record* record = records + (slice * TOKENS * SPLITS + split) * 4 + t;
      float2 sum[TOKENS];
      int start[TOKENS];
#pragma unroll
      for (int m = 0; m < TOKENS; m++) {
        sum[m] = make_float2(0.f, 0.f);
        start[m] = record[m * SPLITS * 4].start;
      }
#pragma unroll (BITS * TOKENS <= 16 ? BITS : 2)
      for (int q = 0; q < BITS; q++) {
        const uint2 w = planes[q * 32];
        const float2 alpha = UNIFORM ? make_float2(1.f / (1 << q), 1.f / (1 << q))
                                     : scale_pair(scales, row + q);
#pragma unroll
        for (int m = 0; m < TOKENS; m++) {
          const u32 b0 = mine ? x[m].x : 0, b1 = mine ? x[m].y : 0;
          int d[4], e[4];
          binary_product(d, w.x, w.y, b0, start[m]);
          binary_product(e, w.x, w.y, b1, 0);
          const int v0 = d[0] + 2 * d[1] + 4 * e[0] + top * e[1];
          const int v1 = d[2] + 2 * d[3] + 4 * e[2] + top * e[3];
          sum[m].x = fmaf(alpha.x, __int_as_float(v0) - MAGIC, sum[m].x);
          sum[m].y = fmaf(alpha.y, __int_as_float(v1) - MAGIC, sum[m].y);
        }
      }
      const float2 offset = scale_pair(scales, row + SLOTS - 1);
      const float2 first = UNIFORM ? scale_pair(scales, row) : make_float2(1.f, 1.f);
#pragma unroll
      for (int m = 0; m < TOKENS; m++) {
        const Record& r = record[m * SPLITS * 4];
        acc[m].x = fmaf(r.scale * first.x, sum[m].x, fmaf(offset.x, r.sum, acc[m].x));
        acc[m].y = fmaf(r.scale * first.y, sum[m].y, fmaf(offset.y, r.sum, acc[m].y));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
binary_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int k_part = warp % p.k_warps, row_part = warp / p.k_warps, row_parts = WARPS / p.k_warps;
  const int first_tile = blockIdx.x * row_parts + row_part, tile_step = gridDim.x * row_parts;

  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  char* bits = shared + WARPS * STAGES * STAGE_BYTES;
  Record* records = (Record*)(bits + p.panel_items * TOKENS * BITS_BYTES);
  float* meet = (float*)((char*)records + p.panel_items * TOKENS * RECORD_BYTES);  // [2][WARPS][TOKENS][16]
  float* partial = meet + 2 * WARPS * TOKENS * 16;                                 // [step][row_parts][TOKENS][16]

  let_next_kernel_start();
  const u64 policy = evict_first_policy();
  Cursor ahead;
  ahead.start(p, first_tile, k_part);
#pragma unroll
  for (int s = 0; s < STAGES; s++) {
    fetch(p, ahead, shared_address(ring + s * STAGE_BYTES), lane, policy);
    if (!ahead.done()) ahead.advance(p, first_tile, tile_step, k_part);
  }
  wait_for_previous_kernel();

  int stage = 0, buffer = 0;
  for (int panel = 0; panel < p.items; panel += p.panel_items) {
    const int panel_end = min(panel + p.panel_items, p.items);
    if (panel) __syncthreads();
    cut_activations(p, bits, records, panel, panel_end - panel);
    __syncthreads();
    int step = 0;
    for (int block_tile = blockIdx.x * row_parts; block_tile < p.tiles; block_tile += tile_step, step++) {
      float2 acc[TOKENS];
#pragma unroll
      for (int m = 0; m < TOKENS; m++) acc[m] = make_float2(0.f, 0.f);
      if (block_tile + row_part < p.tiles) {
        for (int item = panel + k_part; item < panel_end; item += p.k_warps) {
          wait_copies<STAGES - 1>();
          __syncwarp();
          const int local = item - panel;
          multiply(ring + stage * STAGE_BYTES, bits + local * TOKENS * BITS_BYTES,
                   (const Record*)((const char*)records + local * TOKENS * RECORD_BYTES), lane, acc);
          __syncwarp();
          fetch(p, ahead, shared_address(ring + stage * STAGE_BYTES), lane, policy);
          if (!ahead.done()) ahead.advance(p, first_tile, tile_step, k_part);
          stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
      }
      // The four lanes of a row, then the warps of a tile, always in the same order.
#pragma unroll
      for (int m = 0; m < TOKENS; m++) {
#pragma unroll
        for (int s = 1; s <= 2; s *= 2) {
          acc[m].x += __shfl_xor_sync(~0u, acc[m].x, s);
          acc[m].y += __shfl_xor_sync(~0u, acc[m].y, s);
        }
        if ((lane & 3) == (m & 3)) {
          float* mine = meet + ((buffer * WARPS + warp) * TOKENS + m) * 16 + (lane >> 2);
          mine[0] = acc[m].x;
          mine[8] = acc[m].y;
        }
      }
      __syncthreads();
      for (int o = threadIdx.x; o < row_parts * TOKENS * 16; o += THREADS) {
        const int part = o / (TOKENS * 16), value = o % (TOKENS * 16);
        float total = 0.f;
        for (int w = 0; w < p.k_warps; w++)
          total += meet[(buffer * WARPS + part * p.k_warps + w) * TOKENS * 16 + value];
        if (panel) total += partial[step * row_parts * TOKENS * 16 + o];
        const int row = (block_tile + part) * TILE_ROWS + value % 16, token = value / 16;
        if (panel_end < p.items) partial[step * row_parts * TOKENS * 16 + o] = total;
        else if (row < p.rows)
          p.y[token * p.y_stride + row] = float_to_x(total + (p.bias ? x_to_float(p.bias[row]) : 0.f));
      }
      buffer ^= 1;
    }
  }
  wait_copies<0>();
}
