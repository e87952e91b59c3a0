// y = x W^T for 8 to 64 tokens with uniform levels, on fp16 tensor cores of Hopper (wgmma, sm_90a): up to 4
// bits, groups of 128 and more, scales in half.
//
// A weight is a code, an exact subnormal half (fields.cuh), times its group's unit, and an offset. Codes are
// cut from the plane words in registers, the A operand; x is B. With few tokens the products of a slice
// are added to the sums, times the unit; with more the accumulators are the sums, in the unit of the current
// group, and are multiplied with unit_before / unit_now at a new one. The offsets times the sums of x over
// each slice are a product of their own at the end (prefill.cuh).
//
// A block has GROUPS warpgroups of TALL x 64 rows each, of which K_GROUPS share the same rows and take slices
// in turn; one more (of it, one thread) fetches weights, scales and x into a ring. While the tensor core
// multiplies with one set of codes, a warpgroup cuts the next: those of its other 64 rows, or of the next slice.
// With SHARE 2, the two blocks of a cluster take different rows and fetch half of x for each other; else the
// blocks of a cluster split the inputs. Sums are added in a fixed order: two runs give the same bits.
//
// -D: TOKENS 8|16|32|64, GROUPS 2 to 4, K_GROUPS, TALL 1|2, STAGES, SHARE 1|2.
// Grid: cluster size * row blocks (SHARE 1), or row blocks, rounded up to a multiple of 2.

#include "prefill.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES groups
  const char* scales_at;
  const char* arranged;    // see prefill.cuh
  const float* factors;
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;        // tokens <= TOKENS
  int tiles, items, groups, items_per_group;
};

constexpr int ROW_GROUPS = GROUPS / K_GROUPS, ROWS = ROW_GROUPS * TALL * 64;
constexpr int THREADS = GROUPS * 128 + 128;
constexpr int FETCH_REGISTERS = 24;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;   // of a thread, as launched: what the compiler takes
constexpr int MULTIPLY_REGISTERS = (START_REGISTERS * (GROUPS + 1) - FETCH_REGISTERS) / GROUPS / 8 * 8;
constexpr bool FRESH = TOKENS <= (TALL == 2 ? 32 : 16);   // products are added to the sums; needs registers
constexpr int GROUP_SCALE_BYTES = 16 * SLOTS * 2;     // of 16 rows
constexpr int TILES = ROWS / 16;                      // of 16 rows; a warp has one
constexpr int PLANES = TILES * SLICE_BYTES;           // bytes of one slice in the ring
constexpr int SCALES = TILES * GROUP_SCALE_BYTES;
constexpr int SHARE_BYTES = X_BYTES + PLANES + SCALES;   // one slice of a stage, which has K_GROUPS
constexpr int STAGE_BYTES = K_GROUPS * SHARE_BYTES;
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr int PITCH = ROWS + 4;                       // of sums in shared memory
constexpr float SUMS_UNIT = 1.f / 65536.f;            // of the product with the sums of x
constexpr int AT_ONCE = TALL == 1 ? 4 : 2;            // parts of sums whose terms are in registers
constexpr float LEAST = 8.6736174e-19f;               // unit of a group whose scale is 0

// d = A x, as multiply_add of hopper.cuh.
template <int N> DEVICE void multiply(float (&d)[N / 2], const u32 (&a)[4], u32 x);
template <> DEVICE void multiply<8>(float (&d)[4], const u32 (&a)[4], u32 x) {
  asm volatile("{ .reg .b64 x; mov.b64 x, {%8, %9};\n"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {"
    "%0, %1, %2, %3"
    "}, {%4, %5, %6, %7}, x, 0, 1, 1, 0; }"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES));
}
template <> DEVICE void multiply<16>(float (&d)[8], const u32 (&a)[4], u32 x) {
  asm volatile("{ .reg .b64 x; mov.b64 x, {%12, %13};\n"
    "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7"
    "}, {%8, %9, %10, %11}, x, 0, 1, 1, 0; }"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),
      "=f"(d[7])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES));
}
template <> DEVICE void multiply<32>(float (&d)[16], const u32 (&a)[4], u32 x) {
  asm volatile("{ .reg .b64 x; mov.b64 x, {%20, %21};\n"
    "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
    "}, {%16, %17, %18, %19}, x, 0, 1, 1, 0; }"
    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),
      "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]),
      "=f"(d[14]), "=f"(d[15])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES));
}
template <int N> DEVICE void multiply_step(float (&d)[N / 2], const u32 (&a)[4], u32 x, bool first) {
  if constexpr (N <= 32) if (first) return multiply<N>(d, a, x);
  multiply_add<N>(d, a, x);
}

// A copy that arrives at the same place in both blocks of a cluster.
DEVICE void copy_to_both(u32 shared, const void* global, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1], %2, [%3], %4;"
               :: "r"(shared), "l"(global), "r"(bytes), "r"(barrier), "h"((u16)3) : "memory");
}

DEVICE void group_barrier() { asm volatile("bar.sync 1, %0;" :: "n"(GROUPS * 128) : "memory"); }

// What the sums of x are multiplied with: see prefill.cuh. Alphas and offsets of rows g and g + 8 and of the
// slices that a lane has in a part of the sums.
struct Terms {
  uint2 pairs[16 / TERMS];

  DEVICE void load(const Arguments& p, const char* scales, int first) {   // of a tile; of a part
#pragma unroll
    for (int i = 0; i < 16 / TERMS; i++) {
      const int slice = first + 4 * i, group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
      pairs[i] = slice < p.items * 2 ? *(const uint2*)(scales + group * GROUP_SCALE_BYTES) : make_uint2(0, 0);
    }
  }
  DEVICE void order(u32 (&a)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (TERMS == 4) {
        a[j][0] = __byte_perm(pairs[j].y, 0, 0x1010);
        a[j][1] = __byte_perm(pairs[j].y, 0, 0x3232);
        a[j][2] = __byte_perm(pairs[j].x, 0, 0x1010);
        a[j][3] = __byte_perm(pairs[j].x, 0, 0x3232);
      } else {
        const uint2 here = pairs[2 * j % (16 / TERMS)], next = pairs[(2 * j + 1) % (16 / TERMS)];
        a[j][0] = __byte_perm(here.y, here.x, 0x5410);
        a[j][1] = __byte_perm(here.y, here.x, 0x7632);
        a[j][2] = __byte_perm(next.y, next.x, 0x5410);
        a[j][3] = __byte_perm(next.y, next.x, 0x7632);
      }
    }
  }
};

DEVICE void rescale(float (&sum)[SUMS], float2 ratio) {   // of rows g and g + 8
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    sum[i] *= ratio.x;
    sum[i + 1] *= ratio.x;
    sum[i + 2] *= ratio.y;
    sum[i + 3] *= ratio.y;
  }
}

// What a warp reads of its 16 rows and a slice before it cuts.
struct Words {
  u32 low[BITS], high[BITS];

  DEVICE void load(u32 planes, int lane) {   // address in shared memory
#pragma unroll
    for (int q = 0; q < BITS; q++)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(low[q]), "=r"(high[q]) : "r"(planes + q * 256 + lane * 8));
  }
  DEVICE void cut(u32 (&a)[8][4]) const {
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
  }
};

DEVICE float2 load_unit(u32 scales, int lane) {   // of rows g and g + 8, from a tile's scales
  const u32 alpha = load_word(scales + (lane >> 2) * (4 * SLOTS));
  float2 u = make_float2(half_to_float((u16)alpha), half_to_float((u16)(alpha >> 16)));
  if (FRESH) return u;
  u.x = fabsf(u.x) < LEAST ? LEAST : u.x;
  u.y = fabsf(u.y) < LEAST ? LEAST : u.y;
  return u;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
code_batch(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // the ring, later sums [K_GROUPS][TOKENS][PITCH]
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  __shared__ float factors[TOKENS];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const u32 parts = SHARE == 1 ? cluster_size() : 1, part = SHARE == 1 ? cluster_rank() : 0;
  const int slices = p.items * 2, sum_parts = (slices + PART_SLICES - 1) / PART_SLICES;
  const int begin = slices * (int)part / (int)parts, count = slices * (int)(part + 1) / (int)parts - begin;
  const int sums_begin = sum_parts * part / parts, sums_count = sum_parts * (part + 1) / parts - sums_begin;
  const int steps = (count + K_GROUPS - 1) / K_GROUPS, stages = steps + (sums_count + K_GROUPS - 1) / K_GROUPS;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 ring = shared_address(shared);
  const int row_block = blockIdx.x / parts;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS * 4 * SHARE);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (SHARE > 1) cluster_sync(); else __syncthreads();
  let_next_kernel_start();

  if (warp >= GROUPS * 4) {
    give_registers<FETCH_REGISTERS>();
    if (warp == GROUPS * 4 && lane == 0) {   // the fetching thread
      // Blocks of other rows begin elsewhere, so that they do not all ask for the same x at once.
      const int first = row_block / SHARE * 7 % steps;
      auto slice_of = [&](int n, int k) {
        return (first + n < steps ? first + n : first + n - steps) * K_GROUPS + k;   // of the block's
      };
      auto fetch_weights = [&](int n) {
        const u32 stage = ring + n % STAGES * STAGE_BYTES, barrier = full + 8 * (n % STAGES);
        int bytes = 0;
#pragma unroll
        for (int k = 0; k < K_GROUPS; k++)
          bytes += n < steps ? (slice_of(n, k) < count ? SHARE_BYTES : 0)
                             : (n - steps) * K_GROUPS + k < sums_count ? PART_BYTES : 0;
        barrier_expect(barrier, bytes);
        if (n >= steps) return;
#pragma unroll
        for (int k = 0; k < K_GROUPS; k++) {
          const int slice = begin + slice_of(n, k);
          if (slice >= begin + count) continue;
          const int group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
          const u32 at = stage + k * SHARE_BYTES + X_BYTES;
          copy_box(at, p.planes, slice * (SLICE_BYTES / 4), row_block * TILES, barrier);
          copy_box(at + PLANES, p.scales, group * (GROUP_SCALE_BYTES / 4), row_block * TILES, barrier);
        }
      };
      auto fetch_x = [&](int n) {
        const u32 stage = ring + n % STAGES * STAGE_BYTES, barrier = full + 8 * (n % STAGES);
#pragma unroll
        for (int k = 0; k < K_GROUPS; k++) {
          const int at = n < steps ? slice_of(n, k) : (n - steps) * K_GROUPS + k;
          if (at >= (n < steps ? count : sums_count)) continue;
          const char* x = n < steps ? p.arranged + (long long)(begin + at) * X_BYTES
                                    : p.arranged + (long long)slices * X_BYTES + (sums_begin + at) * PART_BYTES;
          const int size = n < steps ? X_BYTES : PART_BYTES;
          if (SHARE > 1) {
            const int half = cluster_rank() * (size / 2);
            copy_to_both(stage + k * SHARE_BYTES + half, x + half, size / 2, barrier);
          } else {
            copy_bulk(stage + k * SHARE_BYTES, x, size, barrier);
          }
        }
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
    cluster_sync();
    cluster_sync();
    return;
  }
  take_registers<MULTIPLY_REGISTERS>();
  float sum[TALL][SUMS];
#pragma unroll
  for (int t = 0; t < TALL; t++)
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[t][i] = 0.f;
  const int group = warp >> 2, k_group = group / ROW_GROUPS;
  auto tile_of = [&](int t) { return (group % ROW_GROUPS * TALL + t) * 4 + (warp & 3); };   // of the block's
  {
    // Addresses that go along are cheaper than a stage's number: those of a stage and of its barrier.
    struct Place {
      u32 stage, filled, parity;
      DEVICE void next(u32 full) {
        stage += STAGE_BYTES;
        filled += 8;
        if (filled == full + 8 * STAGES) {
          stage -= STAGES * STAGE_BYTES;
          filled = full;
          parity ^= 1;
        }
      }
    };
    Place read = {ring + k_group * SHARE_BYTES, full, 0}, used = read;
    auto release = [&]() {
      __syncwarp();
      if (SHARE > 1) {
        if (lane < SHARE) barrier_arrive_at(used.filled + 8 * STAGES, lane);
      } else if (lane == 0) {
        barrier_arrive(used.filled + 8 * STAGES);
      }
      used.next(full);
    };
    u32 a[2][8][4];
    float2 unit[TALL], next_unit[TALL];
#pragma unroll
    for (int t = 0; t < TALL; t++) unit[t] = make_float2(1.f, 1.f);
    auto cut = [&](u32 (&to)[8][4], int t) {   // tile t of the slice to be read
      Words words;
      const u32 at = read.stage + X_BYTES;
      words.load(at + tile_of(t) * SLICE_BYTES, lane);
      if (t == 0)
#pragma unroll
        for (int i = 0; i < TALL; i++)
          next_unit[i] = load_unit(at + PLANES + tile_of(i) * GROUP_SCALE_BYTES, lane);
      words.cut(to);
    };
    auto multiply_all = [&](auto& by, float (&d)[SUMS], u32 stage, bool first) {
      constexpr int STEPS = sizeof(by) / 16;
#pragma unroll
      for (int j = 0; j < STEPS; j++)   // ready before the products begin, whatever the compiler thinks
        asm volatile("" : "+r"(by[j][0]), "+r"(by[j][1]), "+r"(by[j][2]), "+r"(by[j][3]));
      const u32 x = x_descriptor(stage);
      products_begin();
#pragma unroll
      for (int j = 0; j < STEPS; j++) multiply_step<TOKENS>(d, by[j], x + j * (TOKENS * 2), first && j == 0);
      products_commit();
    };
    float product[TALL][SUMS];
    auto start = [&](int t, u32 (&by)[8][4]) {
      if (t == 0) {   // all sums, before products with any are queued
#pragma unroll
        for (int i = 0; i < TALL; i++) {
          if (!FRESH)
            rescale(sum[i], make_float2(divide(unit[i].x, next_unit[i].x), divide(unit[i].y, next_unit[i].y)));
          unit[i] = next_unit[i];
        }
      }
      if constexpr (FRESH) multiply_all(by, product[t], used.stage, true);
      else multiply_all(by, sum[t], used.stage, false);
    };
    auto finish = [&](int t) {   // after its products
      if constexpr (FRESH) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(product[t][i]));
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
          sum[t][i] = fmaf(product[t][i], unit[t].x, sum[t][i]);
          sum[t][i + 1] = fmaf(product[t][i + 1], unit[t].x, sum[t][i + 1]);
          sum[t][i + 2] = fmaf(product[t][i + 2], unit[t].y, sum[t][i + 2]);
          sum[t][i + 3] = fmaf(product[t][i + 3], unit[t].y, sum[t][i + 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[t][i]));
      }
    };
    auto wait = [&]() { barrier_wait(read.filled, read.parity); };
    // The last step may have no slice for this warpgroup, if it is in turns that do not come out even.
    const int first = row_block / SHARE * 7 % steps;
    auto has = [&](int n) {
      if (K_GROUPS == 1) return true;
      return (first + n < steps ? first + n : first + n - steps) * K_GROUPS + k_group < count;
    };
    auto scales_of = [&](int t) {   // of all groups
      const int of = min(row_block * TILES + tile_of(t), p.tiles - 1);
      return p.scales_at + (long long)of * p.groups * GROUP_SCALE_BYTES;
    };
    wait();
    if (has(0)) cut(a[0], 0);
    auto step = [&](u32 (&now)[8][4], u32 (&other)[8][4], int n) {   // multiply with one, meanwhile cut the other
      const bool more = n + 1 < steps;
      if (has(n)) {
        start(0, now);
        if (TALL == 2) {
          cut(other, 1);
          start(1, other);
          products_wait<1>();
          finish(0);
        }
      }
      read.next(full);
      if (more) {
        wait();
        if (has(n + 1)) cut(TALL == 2 ? now : other, 0);
      }
      products_wait<0>();
      if (has(n)) finish(TALL - 1);
      release();
    };
    int n = 0;
    if (TALL == 2) {
#pragma unroll 1
      for (; n < steps; n++) step(a[0], a[1], n);
    } else {
#pragma unroll 1
      for (; n + 1 < steps; n += 2) {
        step(a[0], a[1], n);
        step(a[1], a[0], n + 1);
      }
      if (n < steps) step(a[0], a[1], n);
    }
    const float each = 4.f / (1 << BITS) / SUMS_UNIT;
#pragma unroll
    for (int t = 0; t < TALL; t++)
      rescale(sum[t], FRESH ? make_float2(each, each) : make_float2(unit[t].x * each, unit[t].y * each));
    wait_for_previous_kernel();
    if (threadIdx.x < TOKENS) factors[threadIdx.x] = p.factors[threadIdx.x] * 256.f;
    // Those of several parts are asked for at once: there is nothing else to do until they come.
#pragma unroll 1
    for (int n = 0; n < stages - steps; n += AT_ONCE) {
      Terms terms[AT_ONCE][TALL];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int m = (n + i) * K_GROUPS + k_group;
#pragma unroll
        for (int t = 0; t < TALL; t++)
          terms[i][t].load(p, scales_of(t) + (lane >> 2) * (4 * SLOTS),
                           m < sums_count ? (sums_begin + m) * PART_SLICES + (lane & 3) : slices);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        if (n + i >= stages - steps) break;
        wait();
        if (K_GROUPS == 1 || (n + i) * K_GROUPS + k_group < sums_count) {
          u32 by[TALL][4][4];
#pragma unroll
          for (int t = 0; t < TALL; t++) terms[i][t].order(by[t]);
#pragma unroll
          for (int t = 0; t < TALL; t++) multiply_all(by[t], sum[t], used.stage, false);
          products_wait<0>();
        }
        release();
        read.next(full);
      }
    }
  }
  group_barrier();   // the ring has been used

  float* sums = (float*)shared;
#pragma unroll
  for (int t = 0; t < TALL; t++) {
    float* to = sums + k_group * (TOKENS * PITCH) + 2 * (lane & 3) * PITCH + tile_of(t) * 16 + (lane >> 2);
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      float* at = to + 2 * i * PITCH;
      at[0] = sum[t][i];
      at[PITCH] = sum[t][i + 1];
      at[8] = sum[t][i + 2];
      at[PITCH + 8] = sum[t][i + 3];
    }
  }
  cluster_sync();
  // Each block of the cluster finishes a share of the tokens.
  for (int o = part * (GROUPS * 128) + threadIdx.x; o < p.tokens * (ROWS / 4); o += parts * (GROUPS * 128)) {
    const int token = o / (ROWS / 4), row = o % (ROWS / 4) * 4, y_row = row_block * ROWS + row;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    auto add = [&](float4 v) { total.x += v.x; total.y += v.y; total.z += v.z; total.w += v.w; };
    const float* own = sums + token * PITCH + row;
    if (parts == 1) {
#pragma unroll
      for (int k = 0; k < K_GROUPS; k++) add(*(const float4*)(own + k * (TOKENS * PITCH)));
    } else {
      for (u32 r = 0; r < parts; r++)
#pragma unroll
        for (int k = 0; k < K_GROUPS; k++) add(load_cluster(shared_address(own + k * (TOKENS * PITCH)), r));
    }
    const float values[4] = {total.x, total.y, total.z, total.w};
    float bias[4] = {0.f, 0.f, 0.f, 0.f};
    if (p.bias) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (y_row + i < p.rows) bias[i] = x_to_float(p.bias[y_row + i]);
    }
    u16 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = float_to_x(fmaf(values[i], factors[token], bias[i]));
    u16* y = p.y + token * p.y_stride + y_row;
    if (y_row + 4 <= p.rows && ((u64)y & 7) == 0) {
      *(uint2*)y = make_uint2((u32)out[0] | (u32)out[1] << 16, (u32)out[2] | (u32)out[3] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (y_row + i < p.rows) y[i] = out[i];
    }
  }
  cluster_sync();   // no block leaves while another reads its sums
}
