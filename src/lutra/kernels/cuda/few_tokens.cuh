// The frame of the kernels for few tokens: streaming, panels, reduction. `few_tokens<Product>` is the
// body of a kernel; Product says what x looks like in shared memory and how an item is multiplied:
//
//   SLOT_BYTES              of shared memory for x of one slice and token, 256 or 288
//   Sums                    what a lane adds up over its items, zero at first
//   cut(...)                turns 32 inputs of one token into operands; four neighbouring lanes are one
//                           slice of one token
//   multiply(...)           one item
//   collect(...)            a warp's sums as [TOKENS][16 rows]
//
// Block b takes tiles of 16 rows; its warps split the inputs (k_warps) and, if a row is short, several
// tiles. Every warp streams its items through its own ring in shared memory (cp.async). A part of the
// ring is filled before the previous kernel has finished, the rest after x has been asked for: x would
// wait for whatever was asked for before. x is copied as it is to where its operands will be; every
// warp copies what it cuts itself, so that none waits for another. Partial sums of the warps of a tile
// meet in shared memory, always in the same order; the warps take turns to add them. If x does not fit
// in shared memory, the rows are walked in panels, sums kept in `partial`.
//
// -D: TOKENS (a power of two), WARPS, STAGES (items in a warp's ring), EARLY (those fetched ahead). Grid: any number of blocks of
// WARPS x 32 threads; dynamic shared memory: see `_few_plan` in plans.py.

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

DEVICE int multiply_add(int a, int b, int c) {   // the compiler would turn these into shifts and sums
  int d;
  asm("mad.lo.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// One per slice and split, for the four lanes of a row. Bits of the weight are 0 and 1 in the products but
// mean -1 and +1; `start` makes the difference: sums start at minus half the sum of the integers of x.
struct Record {
  int4 start[4];    // as the operand of a product
  float2 worth[4];  // of a lane's integer sums; and the sum of x, which the offset multiplies
};

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
  // `sum` as it came from the alphas above.
  DEVICE void add(float2& total, float2 sum, float2 worth) const {
    const float2 offset = scale_pair(scales, row + SLOTS - 1);
    if (UNIFORM) {
      const float2 first = scale_pair(scales, row);
      sum.x *= first.x;
      sum.y *= first.y;
    }
    total.x = fmaf(offset.x, worth.y, fmaf(worth.x, sum.x, total.x));
    total.y = fmaf(offset.y, worth.y, fmaf(worth.x, sum.y, total.y));
  }
};

// x of one slice and token is a slot: 16 pieces of 8 inputs, four for each word of a plane. Slot i of a
// panel is token i % TOKENS of slice i / TOKENS. Where a piece lies keeps the banks of those apart that
// the lanes of a warp read together.
template <int SLOT_BYTES> DEVICE int piece_offset(int slot, int word, int part) {
  const int turn = SLOT_BYTES % 128 ? word >> 1 : word >> 1 | (slot & 1) << 1;
  return slot * SLOT_BYTES + word * 64 + (part ^ turn) * 16;
}

// Copy what this warp cuts of a panel: slots 8 warp .. 8 warp + 7 of every 8 WARPS. Zeros past the row
// and past the last token.
template <int SLOT_BYTES> DEVICE void copy_x(const Arguments& p, char* x, int first_item, int slots) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const bool aligned = (((u64)p.x | (u64)p.x_stride * 2) & 15) == 0;
  for (int first = warp * 8; first < slots; first += WARPS * 8) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int slot = first + 2 * j + (lane >> 4), piece = lane & 15, token = slot % TOKENS;
      const int k = (first_item * 2 + slot / TOKENS) * 128 + piece * 8;
      const int inputs = token < p.tokens ? min(max(p.in_features - k, 0), 8) : 0;
      const u16* source = p.x + (inputs ? token * p.x_stride + k : 0);
      char* target = x + piece_offset<SLOT_BYTES>(slot, piece >> 2, piece & 3);
      if (slot >= slots) continue;
      if (aligned) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(shared_address(target)), "l"(source), "r"(inputs * 2) : "memory");
      } else {
        for (int i = 0; i < 8; i++) ((u16*)target)[i] = i < inputs ? source[i] : 0;
      }
    }
  }
}

// The larger of two magnitudes; NaN if either is.
DEVICE float larger(float a, float b) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(fabsf(b)));
  return a;
}

DEVICE float reciprocal(float a) { asm("rcp.approx.f32 %0, %0;" : "+f"(a)); return a; }

// The sum of a group over the lanes that hold it.
template <class T> DEVICE T sum_of_group(T total) {
#pragma unroll
  for (int step = 1; step < 4 / SPLITS; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  return total;
}

// The 32 inputs of a lane to 16-bit integers: the low half of each r[i] is round(x[i] * LIMIT / largest)
// + BIAS; with FINE, x[i] of even i counts double. A slice with a NaN becomes zero, `largest` NaN.
struct Block { float largest, sum; };   // of the slice; of the group's share of it

template <int LIMIT, int BIAS, bool FINE, int SLOT_BYTES>
DEVICE Block round_block(const char* x, int slot, u32 (&r)[32]) {
  float v[32], largest = 0.f, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint4 part = *(const uint4*)(x + piece_offset<SLOT_BYTES>(slot, threadIdx.x & 3, i));
    const u32 words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[8 * i + 2 * j] = x_to_float((u16)words[j]);
      v[8 * i + 2 * j + 1] = x_to_float((u16)(words[j] >> 16));
    }
  }
#pragma unroll
  for (int i = 0; i < 32; i++) { largest = larger(largest, v[i]); sum += v[i]; }
  largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
  // Below 2^-100 (bf16 only) the reciprocal could overflow: such a slice counts as zero.
  const float inverse = largest > 7.9e-31f ? (float)LIMIT * reciprocal(largest) : 0.f;
#pragma unroll
  for (int i = 0; i < 32; i++)
    r[i] = __float_as_uint(fmaf(v[i], FINE && i % 2 == 0 ? 2.f * inverse : inverse, MAGIC + BIAS));
  return {largest, sum_of_group(sum)};
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
    const u32 group = (u32)tile * p.groups + item / p.items_per_group;
    scales = lane + group * (SLOTS * SCALE_SIZE);
  }
  DEVICE void advance(const Arguments& p, int first_tile, int tile_step, int k_part, int lane) {
    item += p.k_warps;
    planes += p.k_warps * (PLANE_BYTES / 16);
    scales += p.k_warps * (SCALE_BYTES / 16);
    if (item < panel_end) {
      place_large_group(p, lane);
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
#pragma unroll
    for (int i = 0; i < SCALE_BYTES; i += 512)
      if (i + lane * 16 < SCALE_BYTES) copy16_async(stage + PLANE_BYTES + i, p.scales + c.scales * 16ull + i, policy);
    c.advance(p, first_tile, tile_step, k_part, lane);
  }
  commit_copies();
}

template <class Product> DEVICE void few_tokens(const Arguments& p) {
  constexpr int X_BYTES = 2 * TOKENS * Product::SLOT_BYTES;   // of an item
  constexpr int RECORD_BYTES = 2 * Product::RECORDS * SPLITS * sizeof(Record);
  constexpr int TILE_VALUES = TOKENS * TILE_ROWS;
  extern __shared__ __align__(128) char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int k_part = warp % p.k_warps, row_part = warp / p.k_warps, row_parts = WARPS / p.k_warps;
  const int first_tile = blockIdx.x * row_parts + row_part, tile_step = gridDim.x * row_parts;

  char* ring = shared + warp * (STAGES * STAGE_BYTES);
  char* x = shared + WARPS * STAGES * STAGE_BYTES;
  char* records = x + p.panel_items * X_BYTES;
  float* meet = (float*)(records + p.panel_items * RECORD_BYTES) + row_part * p.k_warps * TILE_VALUES;
  constexpr int BUFFER_VALUES = WARPS * TILE_VALUES;
  float* partial = (float*)(records + p.panel_items * RECORD_BYTES) + 2 * BUFFER_VALUES +
                   row_part * TILE_VALUES;   // [step][row_parts][TILE_VALUES]

  let_next_kernel_start();
  const u64 policy = evict_first_policy();
  const u32 first_stage = shared_address(ring) + lane * 16;
  Cursor ahead;
  ahead.start(p, first_tile, k_part, lane);
#pragma unroll
  for (int s = 0; s < EARLY; s++)
    fetch(p, ahead, first_stage + s * STAGE_BYTES, first_tile, tile_step, k_part, lane, policy);
  wait_for_previous_kernel();
  copy_x<Product::SLOT_BYTES>(p, x, 0, min(p.panel_items, p.items) * 2 * TOKENS);
  commit_copies();
#pragma unroll
  for (int s = EARLY; s < STAGES; s++)
    fetch(p, ahead, first_stage + s * STAGE_BYTES, first_tile, tile_step, k_part, lane, policy);

  constexpr u32 LAST_STAGE = (STAGES - 1) * STAGE_BYTES;
  u32 stage = first_stage;
  const char* item_weights = ring;
  int round = 0;   // tiles begun
  for (int panel = 0; panel < p.items; panel += p.panel_items) {
    const int panel_end = min(panel + p.panel_items, p.items), slots = (panel_end - panel) * 2 * TOKENS;
    if (panel) {
      __syncthreads();
      copy_x<Product::SLOT_BYTES>(p, x, panel, slots);
      commit_copies();
      wait_copies<0>();
    } else {
      wait_copies<STAGES - EARLY>();
    }
    __syncwarp();
    for (int first = warp * 8; first < slots; first += WARPS * 8) {
      const int slot = first + (lane >> 2);
      Product::cut(slot < slots ? slot : first, slot < slots, x, records);
    }
    __syncthreads();
    int step = 0;
    for (int first = blockIdx.x * row_parts; first < p.tiles; first += tile_step, step++, round++) {
      const int tile = first + row_part;
      const bool there = tile < p.tiles;
      typename Product::Sums sums = {};
      const char* item_x = x + k_part * X_BYTES;
      const char* item_records = records + k_part * RECORD_BYTES;
      for (int item = panel + k_part; there && item < panel_end; item += p.k_warps) {
        wait_copies<STAGES - 1>();
        __syncwarp();
        Product::multiply(item_weights, item_x, item_records, lane, sums);
        __syncwarp();
        fetch(p, ahead, stage, first_tile, tile_step, k_part, lane, policy);
        const bool last = item_weights == ring + LAST_STAGE;
        stage = last ? first_stage : stage + STAGE_BYTES;
        item_weights = last ? ring : item_weights + STAGE_BYTES;
        item_x += p.k_warps * X_BYTES;
        item_records += p.k_warps * RECORD_BYTES;
      }
      float* here = meet + (round & 1) * BUFFER_VALUES;
      Product::collect(sums, lane, here + k_part * TILE_VALUES);
      __syncthreads();
      if (!there || step % p.k_warps != k_part) continue;
      for (int value = lane; value < TILE_VALUES; value += 32) {
        float total = 0.f;
        for (int w = 0; w < p.k_warps; w++) total += here[w * TILE_VALUES + value];
        float& kept = partial[step * row_parts * TILE_VALUES + value];
        if (panel) total += kept;
        const int row = tile * TILE_ROWS + value % 16, token = value / 16;
        if (panel_end < p.items) kept = total;
        else if (row < p.rows && token < p.tokens)
          p.y[token * p.y_stride + row] = float_to_x(total + (p.bias ? x_to_float(p.bias[row]) : 0.f));
      }
    }
  }
  wait_copies<0>();
}
