// The frame of the kernels for few tokens: streaming, panels, reduction. `few_tokens<Product>` is the
// body of a kernel; Product says what x looks like in shared memory and how an item is multiplied:
//
//   X_BYTES, RECORD_BYTES   of shared memory per item, all tokens
//   Sums                    what a lane adds up over its items, zero at first
//   cut(...)                writes x of one panel to shared memory, all threads of the block
//   multiply(...)           one item
//   collect(...)            a warp's sums as [TOKENS][16 rows]
//
// Block b takes tiles of 16 rows; its warps split the inputs (k_warps) and, if a row is short, several
// tiles. Every warp streams its items through its own ring in shared memory (cp.async), filled before
// the previous kernel has finished. Partial sums of the warps meet in shared memory, always in the same
// order. If x does not fit in shared memory, the rows are walked in panels, sums kept in `partial`.
//
// -D: TOKENS, WARPS, STAGES (items in a warp's ring). Grid: any number of blocks of WARPS x 32 threads;
// dynamic shared memory: see plan_few in products.py.

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const u16* x;            // [tokens][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;   // tokens <= TOKENS
  int tiles, items, groups;        // groups stored per row
  int items_per_group;             // 1 unless GROUP == 256
  int panel_items, k_warps;
};

constexpr int THREADS = WARPS * 32;
constexpr int STAGE_BYTES = PLANE_BYTES + SCALE_BYTES;
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: the float bits of MAGIC + i end in i
constexpr int MAGIC_BITS = 0x4B400000;

// One number per slice, split and token, beside x itself: a lane adds to its sum
//   scale * sum_q alpha_q b_q . x   +   minus * sum_q alpha_q   +   sum * offset
// (the second term turns b in {0, 1} into {-1, +1}).
// in a float4 (scale, minus, sum, unused).

// The scales of rows g and g + 8 in one group of an item.
struct Scales {
  const char* scales;
  int row;
  DEVICE Scales(const char* stage, int slice, int split, int g) {
    const int group = GROUP == 256 ? 0 : slice * SPLITS + split;
    scales = stage + PLANE_BYTES;
    row = (group * 8 + g) * SLOTS;
  }
  // Alpha of plane q; with uniform levels in units of alpha 0, which `add` multiplies in.
  DEVICE float2 alpha(int q) const {
    const float half_to_the_q = __uint_as_float((u32)(127 - q) << 23);
    return UNIFORM ? make_float2(half_to_the_q, half_to_the_q) : scale_pair(scales, row + q);
  }
  DEVICE void add(float2& total, float2 sum, float2 alphas, float4 record) const {
    const float2 offset = scale_pair(scales, row + SLOTS - 1);
    float2 level = make_float2(fmaf(record.x, sum.x, record.y * alphas.x),
                               fmaf(record.x, sum.y, record.y * alphas.y));
    if (UNIFORM) {
      const float2 first = scale_pair(scales, row);
      level.x *= first.x;
      level.y *= first.y;
    }
    total.x += fmaf(offset.x, record.z, level.x);
    total.y += fmaf(offset.y, record.z, level.y);
  }
};

// 32 inputs of one token as floats; zeros past the row.
DEVICE void load_block(const Arguments& p, int token, int k0, float (&v)[32]) {
  const u16* source = p.x + token * p.x_stride + k0;
  const bool active = token < p.tokens;
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
}

// What four neighbouring threads, one slice together, know of their inputs.
struct Slice {
  float largest, inverse;   // of the slice; inverse = LIMIT / largest
  float sum;                // of the group's share of the slice
  int total;                // the same of the integers
};

// x to 16-bit integers: the low half of each r[i] is round(v[i] * LIMIT / largest) + BIAS.
template <int LIMIT, int BIAS> DEVICE Slice round_block(const float (&v)[32], u32 (&r)[32]) {
  Slice s;
  s.largest = 0.f;
  s.sum = 0.f;
#pragma unroll
  for (int i = 0; i < 32; i++) { s.largest = fmaxf(s.largest, fabsf(v[i])); s.sum += v[i]; }
  s.largest = fmaxf(s.largest, __shfl_xor_sync(~0u, s.largest, 1));
  s.largest = fmaxf(s.largest, __shfl_xor_sync(~0u, s.largest, 2));
  // Below 2^-100 (bf16 only) the reciprocal could overflow: such a slice counts as zero.
  s.inverse = s.largest > 7.9e-31f ? (float)LIMIT / s.largest : 0.f;
  s.total = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    r[i] = __float_as_uint(fmaf(v[i], s.inverse, MAGIC + BIAS));
    s.total += (int)(r[i] - (MAGIC_BITS + BIAS));
  }
#pragma unroll
  for (int step = 1; step < 4 / SPLITS; step *= 2) {
    s.total += __shfl_xor_sync(~0u, s.total, step);
    s.sum += __shfl_xor_sync(~0u, s.sum, step);
  }
  return s;
}

// Position of a warp in its sequence of items: tile by tile, panel after panel.
struct Cursor {
  int tile, item, panel_begin, panel_end;   // panel_end = 0: past the last
  long long index;                          // of the item in the weight

  DEVICE void start(const Arguments& p, int first_tile, int k_part) {
    panel_begin = 0;
    panel_end = first_tile < p.tiles ? min(p.panel_items, p.items) : 0;
    enter(p, first_tile, k_part);
  }
  DEVICE bool done() const { return panel_end == 0; }
  DEVICE void enter(const Arguments& p, int new_tile, int k_part) {
    tile = new_tile;
    item = panel_begin + k_part;
    // Only the last panel can be too short for a warp, and then is so in every tile.
    if (item >= panel_end) panel_end = 0;
    index = (long long)tile * p.items + item;
  }
  DEVICE void advance(const Arguments& p, int first_tile, int tile_step, int k_part) {
    item += p.k_warps;
    index += p.k_warps;
    if (item < panel_end) return;
    if (tile + tile_step < p.tiles) {
      enter(p, tile + tile_step, k_part);
    } else if (panel_end < p.items) {
      panel_begin = panel_end;
      panel_end = min(panel_end + p.panel_items, p.items);
      enter(p, first_tile, k_part);
    } else {
      panel_end = 0;
    }
  }
};

DEVICE void fetch(const Arguments& p, const Cursor& c, u32 stage, int lane, u64 policy) {
  if (!c.done()) {
    const char* planes = p.planes + lane * 16 + c.index * PLANE_BYTES;
#pragma unroll
    for (int q = 0; q < BITS; q++) copy16_async(stage + q * 512 + lane * 16, planes + q * 512, policy);
    // Groups smaller than an item are stored item by item.
    const long long group = (long long)c.tile * p.groups + c.item / p.items_per_group;
    const char* scales =
        p.scales + lane * 16 + (GROUP == 256 ? group * (16 * SLOTS * SCALE_SIZE) : c.index * SCALE_BYTES);
#pragma unroll
    for (int i = 0; i < SCALE_BYTES; i += 512)
      if (i + lane * 16 < SCALE_BYTES) copy16_async(stage + PLANE_BYTES + i + lane * 16, scales + i, policy);
  }
  commit_copies();
}

template <class Product> DEVICE void few_tokens(const Arguments& p) {
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int k_part = warp % p.k_warps, row_part = warp / p.k_warps, row_parts = WARPS / p.k_warps;
  const int first_tile = blockIdx.x * row_parts + row_part, tile_step = gridDim.x * row_parts;
  constexpr int TILE_VALUES = TOKENS * TILE_ROWS;

  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  char* x = shared + WARPS * STAGES * STAGE_BYTES;
  char* records = x + p.panel_items * Product::X_BYTES;
  float* meet = (float*)(records + p.panel_items * Product::RECORD_BYTES);   // [2][WARPS][TILE_VALUES]
  float* partial = meet + 2 * WARPS * TILE_VALUES;                           // [step][row_parts][TILE_VALUES]

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
    Product::cut(p, x, records, panel, panel_end - panel);
    __syncthreads();
    int step = 0;
    for (int block_tile = blockIdx.x * row_parts; block_tile < p.tiles; block_tile += tile_step, step++) {
      typename Product::Sums sums = {};
      if (block_tile + row_part < p.tiles) {
        for (int item = panel + k_part; item < panel_end; item += p.k_warps) {
          wait_copies<STAGES - 1>();
          __syncwarp();
          Product::multiply(ring + stage * STAGE_BYTES, x + (item - panel) * Product::X_BYTES,
                            records + (item - panel) * Product::RECORD_BYTES, lane, sums);
          __syncwarp();
          fetch(p, ahead, shared_address(ring + stage * STAGE_BYTES), lane, policy);
          if (!ahead.done()) ahead.advance(p, first_tile, tile_step, k_part);
          stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
      }
      Product::collect(sums, lane, meet + (buffer * WARPS + warp) * TILE_VALUES);
      __syncthreads();
      for (int o = threadIdx.x; o < row_parts * TILE_VALUES; o += THREADS) {
        const int part = o / TILE_VALUES, value = o % TILE_VALUES;
        float total = 0.f;
        for (int w = 0; w < p.k_warps; w++)
          total += meet[(buffer * WARPS + part * p.k_warps + w) * TILE_VALUES + value];
        if (panel) total += partial[step * row_parts * TILE_VALUES + o];
        const int row = (block_tile + part) * TILE_ROWS + value % 16, token = value / 16;
        if (panel_end < p.items) partial[step * row_parts * TILE_VALUES + o] = total;
        else if (row < p.rows && token < p.tokens)
          p.y[token * p.y_stride + row] = float_to_x(total + (p.bias ? x_to_float(p.bias[row]) : 0.f));
      }
      buffer ^= 1;
    }
  }
  wait_copies<0>();
}
