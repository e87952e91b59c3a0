// The frame of the kernels for few tokens: streaming, panels, sums. `few_tokens<Product>` is the body of
// a kernel; Product says what x looks like in shared memory and how an item is multiplied:
//
//   X_BYTES, RECORD_BYTES   of shared memory for x of an item, all tokens, and what goes with it
//   Sums                    what a lane adds up over its items, zero at first
//   Lane                    what a lane knows of its place: addresses in shared memory, constants
//   Levels                  scales of a whole row, in registers
//   tasks(), load(), cut()  x of a panel into operands, 16 or 32 inputs of a token at a time; neighbouring
//                           lanes share a slice of a token
//   multiply(...)           one item
//   collect(...)            a warp's sums as [TOKENS][16 rows]
//
// Block b takes tiles of 16 rows; its warps split the inputs (k_warps) and, if a row is short, several
// tiles. Every warp streams its items through its own ring in shared memory (cp.async). A part of the
// ring is filled before the previous kernel has finished, the rest after x has been asked for: x would
// wait for whatever was asked for before. x comes into registers and is cut there. Partial sums of the
// warps of a tile meet in shared memory every ROUNDS tiles, always in the same order. If x does not fit
// in shared memory, the rows are walked in panels, sums kept in `partial`.
//
// -D: TOKENS (a power of two), WARPS, STAGES (items in a warp's ring), EARLY (those fetched ahead), BLOCKS,
// WHOLE_ROW 0|1 (one group per row). Grid: any number of blocks of WARPS x 32 threads; dynamic shared
// memory: see `_FewSizes` in plans.py.

#include "few_arguments.cuh"

constexpr int THREADS = WARPS * 32;
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: the float bits of MAGIC + i end in i
constexpr int MAGIC_BITS = 0x4B400000;
constexpr int STAGE_BYTES = PLANE_BYTES + SCALE_BYTES;
constexpr int ROUNDS = TOKENS > 4 ? 2 : 4;      // tiles of a warp between two meetings of the warps

DEVICE int multiply_add(int a, int b, int c) {   // the compiler would turn these into shifts and sums
  int d;
  asm("mad.lo.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// A value that is not computed again at every use, as the compiler likes to do with addresses.
DEVICE u32 kept(u32 value) { asm volatile("" : "+r"(value)); return value; }

DEVICE u32 load4(u32 shared) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared)); return v; }
DEVICE uint2 load8(u32 shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared));
  return v;
}
DEVICE uint4 load16(u32 shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared));
  return v;
}
DEVICE float2 load_floats(u32 shared) {
  const uint2 v = load8(shared);
  return make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
}

// Slot `slot` of the scales of rows g and g + 8 of a group; `at`: their slot 0.
DEVICE float2 load_scales(u32 at, int slot) {
  if (SCALE_FLOAT) return load_floats(at + slot * 8);
  const u32 pair = load4(at + slot * 4);
  return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16)));
}
constexpr int ROW_SCALES = SLOTS * 2 * SCALE_SIZE;   // bytes of rows g and g + 8
constexpr int GROUP_SCALES = 8 * ROW_SCALES;         // bytes of a tile

// INPUTS inputs of one token as they lie in memory; zeros past the row and past the last token.
template <int INPUTS> struct Raw { uint4 part[INPUTS / 8]; };

template <int INPUTS> DEVICE Raw<INPUTS> load_raw(const Arguments& p, int token, int k) {
  Raw<INPUTS> raw = {};
  const u16* source = p.x + token * p.x_stride + k;
  if (token >= p.tokens || k >= p.in_features) return raw;
  if (k + INPUTS <= p.in_features && ((u64)source & 15) == 0) {
#pragma unroll
    for (int i = 0; i < INPUTS / 8; i++) raw.part[i] = ((const uint4*)source)[i];
  } else {
    u32 words[INPUTS / 2];
#pragma unroll
    for (int i = 0; i < INPUTS / 2; i++) {
      words[i] = k + 2 * i < p.in_features ? source[2 * i] : 0;
      if (k + 2 * i + 1 < p.in_features) words[i] |= (u32)source[2 * i + 1] << 16;
    }
#pragma unroll
    for (int i = 0; i < INPUTS / 8; i++)
      raw.part[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
  return raw;
}

// The larger of two magnitudes; NaN if either is.
DEVICE float larger(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(fabsf(b)));
  return a;
}

DEVICE float reciprocal(float a) { asm("rcp.approx.f32 %0, %0;" : "+f"(a)); return a; }

// The sum of a group over the lanes that hold it.
template <int INPUTS, class T> DEVICE T sum_of_group(T total) {
#pragma unroll
  for (int step = 1; step < 128 / INPUTS / SPLITS; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  return total;
}

// The inputs of a lane to 16-bit integers: the low half of each r[i] is round(x[i] * LIMIT / largest)
// + BIAS; with FINE, x[i] of even i counts double. A slice with a NaN becomes zero, `largest` NaN.
struct Block { float largest, sum; };   // of the slice; of the group's share of it

template <int LIMIT, int BIAS, bool FINE, int INPUTS>
DEVICE Block round_block(const Raw<INPUTS>& raw, u32 (&r)[INPUTS]) {
  float v[INPUTS], largest = 0.f, sum = 0.f;
#pragma unroll
  for (int i = 0; i < INPUTS / 8; i++) {
    const u32 words[4] = {raw.part[i].x, raw.part[i].y, raw.part[i].z, raw.part[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[8 * i + 2 * j] = x_to_float((u16)words[j]);
      v[8 * i + 2 * j + 1] = x_to_float((u16)(words[j] >> 16));
    }
  }
#pragma unroll
  for (int i = 0; i < INPUTS; i++) { largest = larger(largest, v[i]); sum += v[i]; }
#pragma unroll
  for (int step = 1; step < 128 / INPUTS; step *= 2)
    largest = larger(largest, __shfl_xor_sync(~0u, largest, step));
  // Below 2^-100 (bf16 only) the reciprocal could overflow: such a slice counts as zero.
  const float inverse = largest > 7.9e-31f ? (float)LIMIT * reciprocal(largest) : 0.f;
#pragma unroll
  for (int i = 0; i < INPUTS; i++) 
    r[i] = __float_as_uint(fmaf(v[i], FINE && i % 2 == 0 ? 2.f * inverse : inverse, MAGIC + BIAS));
  return {largest, sum_of_group<INPUTS>(sum)};
}

// Position of a warp in its sequence of items: tile by tile, panel after panel.
struct Cursor {
  int tile, item, panel_begin, panel_end;   // panel_end = 0: past the last
  u32 planes, scales;                       // of the item, from this lane on, in 16 bytes

  DEVICE void start(const Arguments& p, int first_tile, int k_part, int lane) {
    panel_begin = 0;
    panel_end = first_tile < p.tiles ? min(p.panel_items, p.items) : 0;
    enter(p, first_tile, k_part, lane);
  }
  DEVICE bool done() const { return panel_end == 0; }
  DEVICE void enter(const Arguments& p, int new_tile, int k_part, int lane) {
    tile = new_tile;
    item = panel_begin + k_part;
    // Only the last panel can be too short for a warp, and then is so in every tile.
    if (item >= panel_end) panel_end = 0;
    const u32 index = (u32)tile * p.items + item;
    planes = lane + index * (PLANE_BYTES / 16);
    scales = lane + index * (SCALE_BYTES / 16);
    place_large_group(p, lane);
  }
  // Groups smaller than an item are stored item by item; the others are looked up.
  DEVICE void place_large_group(const Arguments& p, int lane) {
    if (GROUP != 256) return;
    const u32 group = WHOLE_ROW ? tile : (u32)tile * p.groups + item / p.items_per_group;
    scales = lane + group * (SCALE_BYTES / 16);
  }
  DEVICE void advance(const Arguments& p, int first_tile, int tile_step, int k_part, int lane) {
    item += p.k_warps;
    planes += p.k_warps * (PLANE_BYTES / 16);
    if (GROUP != 256) scales += p.k_warps * (SCALE_BYTES / 16);
    if (item < panel_end) {
      if (!WHOLE_ROW) place_large_group(p, lane);
    } else if (tile + tile_step < p.tiles) {
      enter(p, tile + tile_step, k_part, lane);
    } else if (panel_end < p.items) {
      panel_begin = panel_end;
      panel_end = min(panel_end + p.panel_items, p.items);
      enter(p, first_tile, k_part, lane);
    } else {
      panel_end = 0;
    }
  }
};

// Ask for the item at the cursor, as one group of copies, and move on. `stage` is that of this lane: an
// address that is the same in all lanes but for a sum gets ptxas 13.0 to make an illegal instruction.
DEVICE void fetch(const Arguments& p, Cursor& c, u32 stage, int first_tile, int tile_step, int k_part,
                  int lane, u64 policy) {
  if (!c.done()) {
#pragma unroll
    for (int q = 0; q < BITS; q++)
      copy16_async(stage + q * 512, p.planes + c.planes * 16ull + q * 512, policy);
    // The scales of a whole row come with the first item of a tile.
    if (!WHOLE_ROW || c.item - k_part == c.panel_begin) {
#pragma unroll
      for (int i = 0; i < SCALE_BYTES; i += 512)
        if (i + lane * 16 < SCALE_BYTES)
          copy16_async(stage + PLANE_BYTES + i, p.scales + c.scales * 16ull + i, policy);
    }
    c.advance(p, first_tile, tile_step, k_part, lane);
  }
  commit_copies();
}

template <class Product> DEVICE void few_tokens(const Arguments& p) {
  constexpr int TILE_VALUES = TOKENS * TILE_ROWS;
  extern __shared__ __align__(128) char shared[];
  // Where instructions bind, the lane's number is not worked out again at every item.
  const int lane = TOKENS >= 4 ? kept(threadIdx.x & 31) : threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int k_part = warp % p.k_warps, row_part = warp / p.k_warps, row_parts = WARPS / p.k_warps;
  const int first_tile = blockIdx.x * row_parts + row_part, tile_step = gridDim.x * row_parts;

  char* x = shared + WARPS * STAGES * STAGE_BYTES;
  char* records = x + p.panel_items * Product::X_BYTES;
  constexpr int ROUND_VALUES = WARPS * TILE_VALUES;
  float* meet = (float*)(records + p.panel_items * Product::RECORD_BYTES);   // [ROUNDS][WARPS][TILE_VALUES]
  float* partial = meet + ROUNDS * ROUND_VALUES;                             // [step][row_parts][TILE_VALUES]

  let_next_kernel_start();
  const u64 policy = evict_first_policy();
  const u32 ring = shared_address(shared) + warp * (STAGES * STAGE_BYTES);
  const u32 first_stage = kept(ring + lane * 16);
  Cursor ahead;
  ahead.start(p, first_tile, k_part, lane);
#pragma unroll
  for (int s = 0; s < EARLY; s++)
    fetch(p, ahead, first_stage + s * STAGE_BYTES, first_tile, tile_step, k_part, lane, policy);
  wait_for_previous_kernel();
  auto raw = Product::load(p, threadIdx.x, 0);
#pragma unroll
  for (int s = EARLY; s < STAGES; s++)
    fetch(p, ahead, first_stage + s * STAGE_BYTES, first_tile, tile_step, k_part, lane, policy);

  const typename Product::Lane place(lane, ring, ring + PLANE_BYTES, shared_address(x) + k_part * Product::X_BYTES,
                                     shared_address(records) + k_part * Product::RECORD_BYTES);
  const u32 x_step = p.k_warps * Product::X_BYTES, record_step = p.k_warps * Product::RECORD_BYTES;
  u32 stage = 0, fetch_stage = first_stage;   // offset in the ring; address for copies
  for (int panel = 0; panel < p.items; panel += p.panel_items) {
    const int panel_end = min(panel + p.panel_items, p.items);
    if (panel) {
      __syncthreads();
      raw = Product::load(p, threadIdx.x, panel);
    }
    const int tasks = (panel_end - panel) * Product::tasks(p);
    for (int task = threadIdx.x; task - lane < tasks; task += THREADS) {
      const auto next = Product::load(p, task + THREADS < tasks ? task + THREADS : task, panel);
      Product::cut(p, raw, task, task < tasks, x, records);
      raw = next;
    }
    __syncthreads();
    for (int first = blockIdx.x * row_parts, step = 0, kept_steps = 0; first < p.tiles; first += tile_step) {
      const bool there = first + row_part < p.tiles;
      typename Product::Sums sums = {};
      typename Product::Levels levels;
      u32 item_x = 0, item_records = 0;
      for (int item = panel + k_part; there && item < panel_end; item += p.k_warps) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        if (WHOLE_ROW && item_x == 0) levels.load(place, stage);
        Product::multiply(place, stage, item_x, item_records, levels, sums);
        __syncwarp();
        fetch(p, ahead, fetch_stage, first_tile, tile_step, k_part, lane, policy);
        const bool wraps = stage == (STAGES - 1) * STAGE_BYTES;
        stage = wraps ? 0 : stage + STAGE_BYTES;
        fetch_stage = kept(wraps ? first_stage : fetch_stage + STAGE_BYTES);
        item_x += x_step;
        item_records += record_step;
      }
      Product::collect(sums, lane, meet + step * ROUND_VALUES + warp * TILE_VALUES);
      const bool last = first + tile_step >= p.tiles;
      if (++step < ROUNDS && !last) continue;
      __syncthreads();
      for (int i = threadIdx.x; i < step * row_parts * TILE_VALUES; i += THREADS) {
        const int value = i % TILE_VALUES, part = i / TILE_VALUES % row_parts, back = i / TILE_VALUES / row_parts;
        const float* here = meet + back * ROUND_VALUES + part * p.k_warps * TILE_VALUES + value;
        float total = 0.f;
        for (int w = 0; w < p.k_warps; w++) total += here[w * TILE_VALUES];
        float& before = partial[kept_steps * row_parts * TILE_VALUES + i];
        if (panel) total += before;
        const int tile = first - (step - 1 - back) * tile_step + part;
        const int row = tile * TILE_ROWS + value % 16, token = value / 16;
        if (panel_end < p.items) before = total;
        else if (row < p.rows && token < p.tokens)
          p.y[token * p.y_stride + row] = float_to_x(total + (p.bias ? x_to_float(p.bias[row]) : 0.f));
      }
      if (!last) __syncthreads();
      kept_steps += step;
      step = 0;
    }
  }
  wait_copies<0>();
}
