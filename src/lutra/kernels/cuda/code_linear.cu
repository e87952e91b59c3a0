// y = x W^T for 8 tokens to any number of them, on fp16 tensor cores of Hopper (wgmma, sm_90a): up to 4
// bits, groups of 128 and more, scales in half.
//
// A weight is an integer times its group's step, and an offset. With uniform levels the integer is the
// code, an exact subnormal half (fields.cuh), and the offset is offset - ALL * alpha; free levels are
// integers below 2048 (levels.cuh). They are cut from the plane words in registers, the A operand; x is
// B. The sums of a row stay in the accumulators, in units of the current group's step: at a new group
// they are multiplied with step_before / step_now. Uniform levels are never rounded; free ones only where
// their alphas become integers. The offsets times the sums
// of x over each slice are a product of their own of 1/32 of the size, at the end: 4 slices are one step
// of 16, { offset: hi, lo; alpha: hi, lo } of the sums, each of which is two halves.
//
// A block takes WARPGROUPS x 64 rows and TOKENS tokens; one more warp (of it, one thread) fetches
// weights, scales and x into a ring. With AHEAD a warpgroup cuts a slice while the tensor core multiplies
// with the one before; else that is left to the other warpgroups. The blocks of a cluster split the
// inputs and add up through distributed shared memory, in order: two runs give the same bits.
//
// -D: TOKENS 8|16|32|64|128, WARPGROUPS, STAGES, BLOCKS (of a processor at a time), AHEAD 0|1.
// Grid: cluster size * row blocks * token tiles.

#include "fields.cuh"
#include "hopper.cuh"
#include "levels.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES groups
  TensorMap steps;         // free levels, see steps.cu: [tiles][groups * 8]; boxes: TILES groups
  const char* scales_at;
  const char* arranged;    // see arrange.cu
  const float* factors;
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;
  int tiles, items, groups, items_per_group;
  int row_blocks, token_tiles, near_tiles;   // token tiles of the same rows that run side by side
};

constexpr int ROWS = WARPGROUPS * 64;
constexpr int THREADS = WARPGROUPS * 128 + 32;
constexpr int X_BYTES = TOKENS * 256;
constexpr int GROUP_SCALE_BYTES = 16 * SLOTS * SCALE_SIZE;   // of 16 rows
constexpr int TILES = ROWS / 16;                      // of 16 rows; a warp has one
constexpr int PLANES = TILES * SLICE_BYTES;           // bytes of one slice in the ring
constexpr int SCALES = TILES * GROUP_SCALE_BYTES, STEPS = UNIFORM ? 0 : TILES * 32;
constexpr int STAGE_BYTES = X_BYTES + PLANES + SCALES + STEPS;
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr int PITCH = ROWS + 4;                       // of the block's sums in shared memory
constexpr float SUMS_UNIT = UNIFORM ? 1.f / 65536.f : 256.f;   // of the product with the sums of x


DEVICE void rescale(float (&sum)[SUMS], float2 ratio) {   // of rows g and g + 8
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    sum[i] *= ratio.x;
    sum[i + 1] *= ratio.x;
    sum[i + 2] *= ratio.y;
    sum[i + 3] *= ratio.y;
  }
}

// Integers of rows g and g + 8, and their steps. A step of 0 would leave no unit for the sums: it is 2^-60.
constexpr float LEAST = 8.6736174e-19f;
struct Slice {
  u32 a[8][4];

  // From addresses in shared memory: planes and scales of a tile, and its integers of steps.cu.
  DEVICE float2 cut(u32 planes, u32 scales, u32 steps, int lane) {
    float2 unit;
    u32 low[BITS], high[BITS];
#pragma unroll
    for (int q = 0; q < BITS; q++)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(low[q]), "=r"(high[q]) : "r"(planes + q * 256 + lane * 8));
    scales += (lane >> 2) * (4 * SLOTS);
    auto alpha_pair = [&](int q) {
      const u32 pair = load_word(scales + 4 * q);
      return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16)));
    };
    if (UNIFORM) {
      const float2 alpha = alpha_pair(0);
      unit.x = fabsf(alpha.x) < LEAST ? LEAST : alpha.x * (4.f / (1 << BITS));
      unit.y = fabsf(alpha.y) < LEAST ? LEAST : alpha.y * (4.f / (1 << BITS));
      Fields fields[2];
      fields[0].interleave(low);
      fields[1].interleave(high);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        a[j][0] = fields[0].pair(2 * j);
        a[j][1] = fields[1].pair(2 * j);
        a[j][2] = fields[0].pair(2 * j + 1);
        a[j][3] = fields[1].pair(2 * j + 1);
      }
    } else {
      const u32 step = load_word(steps + (lane >> 2) * 4);
      float2 alpha[BITS], largest = make_float2(0.f, 0.f);
#pragma unroll
      for (int q = 0; q < BITS; q++) {
        alpha[q] = alpha_pair(q);
        largest.x = fmaxf(largest.x, fabsf(alpha[q].x));
        largest.y = fmaxf(largest.y, fabsf(alpha[q].y));
      }
      const float2 m = make_float2((float)(step & 0xFFFFu), (float)(step >> 16));
      unit.x = largest.x < LEAST ? LEAST : divide(largest.x, m.x);
      unit.y = largest.y < LEAST ? LEAST : divide(largest.y, m.y);
      const float2 inverse = make_float2(divide(1.f, unit.x), divide(1.f, unit.y));
      u32 integers[BITS];
#pragma unroll
      for (int q = 0; q < BITS; q++)   // rounded by the addition; NaN stays
        integers[q] = half_pair((alpha[q].x * inverse.x + 12582912.f) - 12582912.f,
                                (alpha[q].y * inverse.y + 12582912.f) - 12582912.f);
      Levels levels;
      levels.make(integers);
      u32 pair[16];
      levels.pairs(0, low, pair);
#pragma unroll
      for (int b = 0; b < 16; b++) a[b >> 1][(b & 1) * 2] = pair[b];
      levels.pairs(1, high, pair);
#pragma unroll
      for (int b = 0; b < 16; b++) a[b >> 1][(b & 1) * 2 + 1] = pair[b];
    }
    return unit;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
code_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // the ring, later the sums [TOKENS][PITCH]
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const u32 parts = cluster_size(), part = cluster_rank();
  const int slices = p.items * 2, sum_slices = (slices + 31) >> 5;
  const int begin = p.items * (int)part / (int)parts * 2, end = p.items * (int)(part + 1) / (int)parts * 2;
  const int sums_begin = sum_slices * part / parts, sums_end = sum_slices * (part + 1) / parts;
  const int count = end - begin, stages = count + sums_end - sums_begin;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 ring = shared_address(shared);
  // Blocks of the same rows are neighbours, so that the weights of one serve the others from L2.
  const int together = p.near_tiles * p.row_blocks, index = blockIdx.x / parts;
  const int far = index / together, inside = index % together;
  const int near = min(p.near_tiles, p.token_tiles - far * p.near_tiles);
  const int row_block = inside / near, token_tile = far * p.near_tiles + inside % near;
  if (threadIdx.x == 0) {
    init_ring(full, empty, STAGES, WARPGROUPS * 4);
  }
  __syncthreads();
  let_next_kernel_start();

  if (warp == WARPGROUPS * 4 && lane == 0) {   // the fetching thread
    // Blocks of other rows begin elsewhere, so that they do not all ask for the same x at once.
    const int first = row_block * 7 % count;
    auto slice_of = [&](int n) { return begin + (first + n < count ? first + n : first + n - count); };
    const char* x = p.arranged + (long long)token_tile * (slices + sum_slices) * X_BYTES;
    auto fetch_weights = [&](int n) {
      const int stage = n % STAGES;
      const u32 at = ring + stage * STAGE_BYTES + X_BYTES, barrier = full + 8 * stage;
      barrier_expect(barrier, n < count ? STAGE_BYTES : X_BYTES);
      if (n >= count) return;
      const int slice = slice_of(n), group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
      copy_box(at, p.planes, slice * (SLICE_BYTES / 4), row_block * TILES, barrier);
      copy_box(at + PLANES, p.scales, group * (GROUP_SCALE_BYTES / 4), row_block * TILES, barrier);
      if (!UNIFORM) copy_box(at + PLANES + SCALES, p.steps, group * 8, row_block * TILES, barrier);
    };
    auto fetch_x = [&](int n) {
      const int stage = n % STAGES, slice = n < count ? slice_of(n) : slices + sums_begin + n - count;
      copy_bulk(ring + stage * STAGE_BYTES, x + (long long)slice * X_BYTES, X_BYTES, full + 8 * stage);
    };
    for (int n = 0; n < min(STAGES, stages); n++) fetch_weights(n);
    wait_for_previous_kernel();
    for (int n = 0; n < min(STAGES, stages); n++) fetch_x(n);
    for (int n = STAGES; n < stages; n++) {
      barrier_wait(empty + 8 * (n % STAGES), (n / STAGES - 1) & 1);
      fetch_weights(n);
      fetch_x(n);
    }
  }
  __syncwarp();

  float sum[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
  if (warp < WARPGROUPS * 4) {
    int stage = 0;
    u32 parity = 0;
    auto multiply = [&](u32 (&a)[8][4]) {
#pragma unroll
      for (int j = 0; j < 8; j++)   // ready before the products begin, whatever the compiler thinks
        asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]));
      const u32 x = x_descriptor(ring + stage * STAGE_BYTES);
      products_begin();
#pragma unroll
      for (int j = 0; j < 8; j++) multiply_add<TOKENS>(sum, a[j], x + j * (TOKENS * 2));
      products_commit();
    };
    auto release = [&]() {
      products_wait<0>();
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
      if (++stage == STAGES) { stage = 0; parity ^= 1; }
    };
    auto cut = [&](Slice& slice, int at_stage, u32 at_parity) {
      barrier_wait(full + 8 * at_stage, at_parity);
      const u32 at = ring + at_stage * STAGE_BYTES + X_BYTES;
      return slice.cut(at + warp * SLICE_BYTES, at + PLANES + warp * GROUP_SCALE_BYTES,
                       at + PLANES + SCALES + warp * 32, lane);
    };
    float2 unit = make_float2(1.f, 1.f);
    auto change_unit = [&](float2 next) {
      rescale(sum, make_float2(divide(unit.x, next.x), divide(unit.y, next.y)));
      unit = next;
    };
    Slice even, odd;
    if (AHEAD) {
      // Multiply with one slice and meanwhile cut the next (after the last one, that one again). Stores
      // that never happen keep the compiler from cutting after the wait.
      const u32 never = (u32)p.tiles >> 30;
      auto step = [&](Slice& now, Slice& next, int n) {
        multiply(now.a);
        const bool more = n + 1 < count, wraps = stage + 1 == STAGES;
        const float2 next_unit =
            cut(next, more ? (wraps ? 0 : stage + 1) : stage, more && wraps ? parity ^ 1 : parity);
#pragma unroll
        for (int j = 0; j < 8; j++)
          asm volatile("{ .reg .pred p; setp.ne.u32 p, %4, 0; @p st.shared.v4.u32 [%4], {%0, %1, %2, %3}; }"
                       :: "r"(next.a[j][0]), "r"(next.a[j][1]), "r"(next.a[j][2]), "r"(next.a[j][3]), "r"(never)
                       : "memory");
        release();
        change_unit(next_unit);
      };
      unit = cut(even, 0, 0);
      int n = 0;
#pragma unroll 1
      for (; n + 1 < count; n += 2) {
        step(even, odd, n);
        step(odd, even, n + 1);
      }
      if (n < count) step(even, odd, n);
    } else {
#pragma unroll 1
      for (int n = 0; n < count; n++) {
        change_unit(cut(even, stage, parity));
        multiply(even.a);
        release();
      }
    }
    rescale(sum, make_float2(unit.x * (1.f / SUMS_UNIT), unit.y * (1.f / SUMS_UNIT)));
    wait_for_previous_kernel();
    // A lane takes the scales of slice 4 j + t of the 32 of each step.
    const int tile = min(row_block * TILES + warp, p.tiles - 1);
    const char* scales = p.scales_at + ((long long)tile * p.groups * 8 + (lane >> 2)) * (2 * SLOTS * SCALE_SIZE);
#pragma unroll 1
    for (int n = sums_begin; n < sums_end; n++) {
      barrier_wait(full + 8 * stage, parity);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int of = n * 32 + j * 4 + (lane & 3);
        const int group = GROUP == 256 ? of / 2 / p.items_per_group : of;
        u32 alpha = 0, offset = 0;   // of rows g and g + 8
        if (of < slices) {
          const u32* pairs = (const u32*)(scales + group * GROUP_SCALE_BYTES);
          if (UNIFORM) alpha = pairs[0];
          offset = pairs[SLOTS - 1];
        }
        even.a[j][0] = __byte_perm(offset, 0, 0x1010);
        even.a[j][1] = __byte_perm(offset, 0, 0x3232);
        even.a[j][2] = __byte_perm(alpha, 0, 0x1010);
        even.a[j][3] = __byte_perm(alpha, 0, 0x3232);
      }
      multiply(even.a);
      release();
    }
  }
  __syncthreads();   // the ring has been used

  float* sums = (float*)shared;
  if (warp < WARPGROUPS * 4) {
    const int tile_row = warp * 16 + (lane >> 2), first_token = 2 * (lane & 3);
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      float* at = sums + (2 * i + first_token) * PITCH + tile_row;
      at[0] = sum[i];
      at[PITCH] = sum[i + 1];
      at[8] = sum[i + 2];
      at[PITCH + 8] = sum[i + 3];
    }
  }
  cluster_sync();
  // Each block of the cluster finishes a share of the tokens.
  const int tokens = min(TOKENS, p.tokens - token_tile * TOKENS);
  for (int o = part * THREADS + threadIdx.x; o < tokens * (ROWS / 4); o += parts * THREADS) {
    const int token = o / (ROWS / 4), row = o % (ROWS / 4) * 4, y_row = row_block * ROWS + row;
    const u32 at = shared_address(sums + token * PITCH + row);
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (u32 r = 0; r < parts; r++) {
      const float4 v = load_cluster(at, r);
      total.x += v.x; total.y += v.y; total.z += v.z; total.w += v.w;
    }
    const float values[4] = {total.x, total.y, total.z, total.w};
    const long long y_token = (long long)token_tile * TOKENS + token;
    const float factor = p.factors[y_token] * 256.f;
    u16 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float bias = p.bias && y_row + i < p.rows ? x_to_float(p.bias[y_row + i]) : 0.f;
      out[i] = float_to_x(values[i] * factor + bias);
    }
    store_four(p.y + y_token * p.y_stride + y_row, out, y_row, p.rows);
  }
  cluster_sync();   // no block leaves while another reads its sums
}
