// y = x W^T for 8 to 64 tokens with uniform levels, on fp16 tensor cores of Hopper (wgmma, sm_90a): up to 4
// bits, groups of 128 and more, scales in half.
//
// A weight is a code, an exact subnormal half (fields.cuh), times its group's unit, and an offset. Codes are
// cut from the plane words in registers, the A operand; x is B. With few tokens the products of a slice
// are added to the sums, times the unit; with more the accumulators are the sums, in the unit of the current
// group, and are multiplied with unit_before / unit_now at a new one. The offsets times the sums of x over
// each slice are a product of their own (prefill.cuh) ahead of every CHUNK slices; from the scales of these, a
// lane finds the units, or their ratios, of one slice in four, and leaves them in shared memory for the others.
//
// A block has GROUPS warpgroups of TALL x 64 rows each; one more (of it, one thread) fetches weights, scales and
// x into a ring. While the tensor core multiplies with one set of codes, a warpgroup cuts the next: those of its
// other 64 rows, or of the next slice; the words of the set after that are in registers by then. Without SPLIT, a
// block takes one block of rows after the other, and its ring runs on from one to the next. With SPLIT, inputs are
// split between the blocks of a cluster, and in a block between K_GROUPS sets of warpgroups that have the same
// rows; their sums meet in shared memory. Sums are added in a fixed order: two runs give the same bits.
//
// -D: TOKENS 8|16|32|64, GROUPS 2 to 3, K_GROUPS, TALL 1|2, STAGES, SPLIT 0|1.
// Grid: SPLIT: cluster size * row blocks, else as many blocks as the card has processors, or fewer.

#include "prefill.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES x CHUNK groups
  const char* arranged;    // see prefill.cuh
  const float* factors;
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;        // tokens <= TOKENS
  int tiles, items, groups, items_per_group;
  int row_blocks;
};

constexpr int ROW_GROUPS = GROUPS / K_GROUPS, ROWS = ROW_GROUPS * TALL * 64;
constexpr int THREADS = GROUPS * 128 + 128;
constexpr int FETCH_REGISTERS = K_GROUPS > 1 ? 40 : 32;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;   // of a thread, as launched: what the compiler takes
constexpr int MULTIPLY_REGISTERS = (START_REGISTERS * (GROUPS + 1) - FETCH_REGISTERS) / GROUPS / 8 * 8;
constexpr bool FRESH = TOKENS <= (TALL == 2 ? 32 : 16);   // products are added to the sums; needs registers
constexpr int GROUP_SCALE_BYTES = 16 * SLOTS * 2;     // of 16 rows
constexpr int TILES = ROWS / 16;                      // of 16 rows; a warp has one
constexpr int PLANES = TILES * SLICE_BYTES;           // bytes of one slice in the ring
constexpr int CHUNK = 16, CHUNK_BYTES = TERMS * TOKENS * 32;   // slices, and their sums of x: TERMS steps
constexpr int SCALES = CHUNK * GROUP_SCALE_BYTES;     // of a chunk and 16 rows
constexpr int KEPT_BYTES = SCALES + GROUP_SCALE_BYTES;   // what is made of them; a warp reads one slice too many
constexpr int SLICE_STAGE = X_BYTES + PLANES, CHUNK_STAGE = CHUNK_BYTES + TILES * SCALES;   // bytes that arrive
constexpr int SHARE_BYTES = X_BYTES + TILES * (SLICE_BYTES > SCALES ? SLICE_BYTES : SCALES);   // scales lie where planes do
constexpr int STAGE_BYTES = K_GROUPS * SHARE_BYTES;   // a slice or a chunk of every share of the inputs
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr int PITCH = ROWS + 4;                       // of sums in shared memory
constexpr float EACH = 65536.f * 4.f / (1 << BITS);   // products of alpha 1, in units of those with the sums of x
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

DEVICE void group_barrier() { asm volatile("bar.sync 1, %0;" :: "n"(GROUPS * 128) : "memory"); }

// What the sums of x are multiplied with: see prefill.cuh. `pairs`: alphas and offsets of rows g and g + 8 and of
// slices 4 i + lane % 4 of a chunk.
DEVICE void chunk_terms(u32 (&a)[TERMS][4], const uint2 (&pairs)[4]) {
#pragma unroll
  for (int j = 0; j < TERMS; j++) {
    if (TERMS == 4) {
      a[j][0] = __byte_perm(pairs[j].y, 0, 0x1010);
      a[j][1] = __byte_perm(pairs[j].y, 0, 0x3232);
      a[j][2] = __byte_perm(pairs[j].x, 0, 0x1010);
      a[j][3] = __byte_perm(pairs[j].x, 0, 0x3232);
    } else {
      const uint2 here = pairs[2 * j % 4], next = pairs[(2 * j + 1) % 4];
      a[j][0] = __byte_perm(here.y, here.x, 0x5410);
      a[j][1] = __byte_perm(here.y, here.x, 0x7632);
      a[j][2] = __byte_perm(next.y, next.x, 0x5410);
      a[j][3] = __byte_perm(next.y, next.x, 0x7632);
    }
  }
}

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

  DEVICE void load(u32 planes) {   // address in shared memory, of the lane
#pragma unroll
    for (int q = 0; q < BITS; q++)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low[q]), "=r"(high[q]) : "r"(planes + q * 256));
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

DEVICE float2 unit_of(u32 alpha) {   // of rows g and g + 8
  float2 u = make_float2(half_to_float((u16)alpha), half_to_float((u16)(alpha >> 16)));
  if (FRESH) return make_float2(u.x * EACH, u.y * EACH);
  u.x = fabsf(u.x) < LEAST ? LEAST : u.x;
  u.y = fabsf(u.y) < LEAST ? LEAST : u.y;
  return u;
}
DEVICE uint2 load_pair(u32 shared) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared));
  return v;
}

// The slices of a share of the inputs, in the order in which they go round. Ahead of the first of a chunk, and of
// those that the share has, come the sums of x of the chunk and its scales.
struct Walk {
  int begin, end, slice;   // slice: the next

  DEVICE bool chunk_ends() const { return (slice + 1) % CHUNK == 0 || slice + 1 == end; }
  DEVICE void next() { pass(1); }
  DEVICE int chunk_left() const { return min(CHUNK - slice % CHUNK, end - slice); }
  DEVICE void pass(int count) {   // within a chunk
    slice += count;
    if (slice == end) slice = begin;
  }
};
DEVICE int chunks_between(int begin, int end) {
  return end > begin ? (end + CHUNK - 1) / CHUNK - begin / CHUNK : 0;
}
// Share `k` of the inputs of a block.
DEVICE Walk walk_of(int slices, u32 part, u32 parts, int k, int row_block) {
  const int begin = slices * (int)part / (int)parts, count = slices * (int)(part + 1) / (int)parts - begin;
  Walk walk = {begin + count * k / K_GROUPS, begin + count * (k + 1) / K_GROUPS, 0};
  // Blocks of other rows begin elsewhere, so that they do not all ask for the same x at once.
  walk.slice = SPLIT ? walk.begin : row_block * 7 % ((slices + CHUNK - 1) / CHUNK) * CHUNK;
  return walk;
}
// The stored group that a slice reads.
DEVICE int group_of(const Arguments& p, int slice) { return GROUP == 256 ? slice / 2 / p.items_per_group : slice; }

// What comes next of every share of the inputs. Shares that end early have nothing to fetch.
struct Fetcher {
  Walk walk[K_GROUPS];
  bool chunk[K_GROUPS];   // a chunk's sums and scales come next
  int left[K_GROUPS];     // slices
  int row_block, stage_left;

  template <bool WEIGHTS, bool X>
  DEVICE void fetch(const Arguments& p, u32 stage, u32 barrier) {
    if (WEIGHTS) {
      int bytes = 0;
#pragma unroll
      for (int k = 0; k < K_GROUPS; k++) bytes += chunk[k] ? CHUNK_STAGE : left[k] ? SLICE_STAGE : 0;
      barrier_expect(barrier, bytes);
    }
#pragma unroll
    for (int k = 0; k < K_GROUPS; k++) {
      const u32 at = stage + k * SHARE_BYTES;
      Walk& here = walk[k];
      if (chunk[k]) {
        const int number = here.slice / CHUNK;
        if (X) copy_bulk(at, p.arranged + (long long)p.items * (2 * X_BYTES) + number * (long long)CHUNK_BYTES, CHUNK_BYTES, barrier);
        if (WEIGHTS)
          copy_box(at + X_BYTES, p.scales, group_of(p, number * CHUNK) * (GROUP_SCALE_BYTES / 4), row_block * TILES, barrier);
        chunk[k] = false;
      } else if (left[k]) {
        if (X) copy_bulk(at, p.arranged + (long long)here.slice * X_BYTES, X_BYTES, barrier);
        if (WEIGHTS) copy_box(at + X_BYTES, p.planes, here.slice * (SLICE_BYTES / 4), row_block * TILES, barrier);
        left[k]--;
        chunk[k] = left[k] && here.chunk_ends();
        here.next();
      }
    }
  }
  DEVICE void begin_block(const Arguments& p, int block, int slices, u32 part, u32 parts) {
    row_block = block;
    stage_left = 0;
#pragma unroll
    for (int k = 0; k < K_GROUPS; k++) {
      walk[k] = walk_of(slices, part, parts, k, blockIdx.x / parts);
      left[k] = walk[k].end - walk[k].begin;
      chunk[k] = left[k];
      stage_left = max(stage_left, left[k] + chunks_between(walk[k].begin, walk[k].end));
    }
  }
};

// Results of eight rows and tokens: a lane gives those of row g and two tokens, and gets those of token g and two rows.
DEVICE u32 transpose(u32 a) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
DEVICE u32 x_pair(float low, float high) { return X_BF16 ? (u32)float_to_bf16(low) | (u32)float_to_bf16(high) << 16 : half_pair(low, high); }

// Writes the sums of a warp's 16 rows.
DEVICE void store_results(const Arguments& p, const float (&sum)[SUMS], const float* factors, int row, int lane) {
  const int g = lane >> 2, t = lane & 3;
  float bias[2] = {0.f, 0.f};
  if (p.bias) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (row + g + 8 * h < p.rows) bias[h] = x_to_float(p.bias[row + g + 8 * h]);
  }
  const bool pairs = (((u64)p.y | (u64)p.y_stride << 1) & 3) == 0;
#pragma unroll
  for (int j = 0; j < TOKENS / 8; j++) {
    const float2 f = *(const float2*)(factors + 8 * j + 2 * t);
    u32 out[2];
#pragma unroll
    for (int h = 0; h < 2; h++)
      out[h] = transpose(x_pair(fmaf(sum[4 * j + 2 * h], f.x, bias[h]), fmaf(sum[4 * j + 2 * h + 1], f.y, bias[h])));
    const int token = 8 * j + g;
    if (token >= p.tokens) continue;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int at = row + 8 * h + 2 * t;
      u16* y = p.y + token * p.y_stride + at;
      if (pairs && at + 2 <= p.rows) {
        *(u32*)y = out[h];
      } else {
        if (at < p.rows) y[0] = (u16)out[h];
        if (at + 1 < p.rows) y[1] = (u16)(out[h] >> 16);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
code_batch(const __grid_constant__ Arguments p) {
  // The ring, later sums [K_GROUPS][TOKENS][PITCH]; behind the ring, [warps][TALL][CHUNK][8 g] units or ratios.
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  __shared__ __align__(8) float factors[TOKENS];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const u32 parts = SPLIT ? cluster_size() : 1, part = SPLIT ? cluster_rank() : 0;
  const int slices = p.items * 2, first_block = blockIdx.x / parts, block_step = gridDim.x / parts;
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 ring = shared_address(shared);
  if (threadIdx.x == 0) {
    init_ring(full, empty, STAGES, GROUPS * 4);
  }
  __syncthreads();
  let_next_kernel_start();

  if (warp >= GROUPS * 4) {
    give_registers<FETCH_REGISTERS>();
    if (warp == GROUPS * 4 && lane == 0) {   // the fetching thread
      // Weights that are ahead of the wait for the kernel before this one, then their x, then both.
      Fetcher fetcher;
      fetcher.begin_block(p, first_block, slices, part, parts);
      int early = min(STAGES, fetcher.stage_left);
      for (int n = 0; n < early; n++) fetcher.fetch<true, false>(p, ring + n * STAGE_BYTES, full + 8 * n);
      wait_for_previous_kernel();
      fetcher.begin_block(p, first_block, slices, part, parts);
      int stage = 0;
      u32 parity = 1;   // stages are free at first
      for (int block = first_block; block < p.row_blocks; block += block_step) {
        if (block != first_block) fetcher.begin_block(p, block, slices, part, parts);
        for (; fetcher.stage_left; fetcher.stage_left--) {
          const u32 at = ring + stage * STAGE_BYTES, filled = full + 8 * stage;
          if (early) {
            early--;
            fetcher.fetch<false, true>(p, at, filled);
          } else {
            barrier_wait(filled + 8 * STAGES, parity);
            fetcher.fetch<true, true>(p, at, filled);
          }
          if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
          }
        }
      }
    }
    __syncwarp();
    if (SPLIT) {
      cluster_sync();
      cluster_sync();
    }
    return;
  }
  take_registers<MULTIPLY_REGISTERS>();
  const int group = warp >> 2, k_group = group / ROW_GROUPS;
  auto tile_of = [&](int t) { return (group % ROW_GROUPS * TALL + t) * 4 + (warp & 3); };   // of the block's
  float sum[TALL][SUMS];
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
    Walk walk = walk_of(slices, part, parts, k_group, first_block), ahead = walk;   // chunks that are used, and read
    int ahead_left = ahead.chunk_left();       // slices of a chunk that are to be read
    const int count = walk.end - walk.begin;   // slices of a block of rows
    const int blocks = SPLIT ? 1 : (p.row_blocks - first_block + block_step - 1) / block_step;
    int unread = count * blocks;   // slices that are not cut
    // What a lane adds to addresses, opaque, or the compiler would work it out again for each slice.
    u32 words_at[TALL], kept = ring + STAGES * STAGE_BYTES + warp * (TALL * KEPT_BYTES) + (lane >> 2) * 8;
#pragma unroll
    for (int t = 0; t < TALL; t++) {
      words_at[t] = X_BYTES + tile_of(t) * SLICE_BYTES + lane * 8;
      asm volatile("" : "+r"(words_at[t]));
    }
    asm volatile("" : "+r"(kept));
    auto release = [&]() {
      __syncwarp();
      if (lane == 0) barrier_arrive(used.filled + 8 * STAGES);
      used.next(full);
    };
    u32 a[2][8][4];
    Words words;   // read ahead of the products that run while they are cut
    float2 unit[TALL];    // of the sums (of the last slice of the chunk), or of the products
    float2 ratio[TALL];   // of the unit of the sums to that of the next slice
    auto load = [&](int t) { words.load(read.stage + words_at[t]); };   // of tile t of the slice to be read
    auto load_next = [&]() {
      if (unread == 0) return;
      barrier_wait(read.filled, read.parity);
      load(0);
    };
    auto pass = [&]() {   // to the slice that is read next
      read.next(full);
      unread--;
      if (--ahead_left == 0) {
        read.next(full);
        ahead.pass(ahead.chunk_left());
        ahead_left = ahead.chunk_left();
      }
    };
    auto cut = [&](u32 (&to)[8][4]) { words.cut(to); };
    u32 slot = 0;   // where those of a slice are kept
    auto load_kept = [&](float2 (&to)[TALL]) {
#pragma unroll
      for (int t = 0; t < TALL; t++) {
        const uint2 v = load_pair(kept + slot + t * KEPT_BYTES);
        to[t] = make_float2(__uint_as_float(v.x), __uint_as_float(v.y));
      }
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
      if constexpr (FRESH) {
        multiply_all(by, product[t], used.stage, true);
        if (t == 0) load_kept(unit);
      } else {
        if (t == 0)   // all sums, before products with any are queued
#pragma unroll
          for (int i = 0; i < TALL; i++) rescale(sum[i], ratio[i]);
        multiply_all(by, sum[t], used.stage, false);
        if (t == TALL - 1) {
          slot += GROUP_SCALE_BYTES;   // past a chunk, nothing that is used
          load_kept(ratio);
        }
      }
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
    auto clear = [&]() {
#pragma unroll
      for (int t = 0; t < TALL; t++) {
        unit[t] = make_float2(1.f, 1.f);
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[t][i] = 0.f;
      }
    };
    auto step = [&](u32 (&now)[8][4], u32 (&other)[8][4]) {   // multiply with one, meanwhile cut the other
      start(0, now);
      if (TALL == 2) {
        cut(other);
        start(1, other);
        pass();
        load_next();
        products_wait<1>();
        finish(0);
        if (unread > 0) {
          cut(now);
          load(1);
        }
      } else if (unread > 0) {
        cut(other);
        pass();
        load_next();
      }
      products_wait<0>();
      finish(TALL - 1);
      release();
      if (FRESH) slot += GROUP_SCALE_BYTES;
    };
    auto finish_sums = [&]() {   // to the unit of the results
      if (!FRESH)
#pragma unroll
        for (int t = 0; t < TALL; t++) rescale(sum[t], make_float2(unit[t].x * EACH, unit[t].y * EACH));
    };
    // Ahead of slices `from` to `to` - 1 of a chunk: their units, and their offsets times the sums of x.
    auto begin_chunk = [&](int number, int from, int to) {
      u32 by[TALL][TERMS][4];
      finish_sums();
      barrier_wait(used.filled, used.parity);
      __syncwarp();   // what was kept has been read
#pragma unroll
      for (int t = 0; t < TALL; t++) {
        const u32 scales = used.stage + X_BYTES + tile_of(t) * SCALES + (lane >> 2) * 8;
        auto scales_of = [&](int of) {   // slice of the chunk
          return scales + (GROUP == 256 ? group_of(p, number * CHUNK + of) - group_of(p, number * CHUNK) : of) * GROUP_SCALE_BYTES;
        };
        uint2 pairs[4];
        float2 last = make_float2(0.f, 0.f);
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int of = 4 * i + (lane & 3);
          pairs[i] = load_pair(scales_of(of));
          if (of < from || of >= to) pairs[i] = make_uint2(0, 0);
          const float2 here = unit_of(pairs[i].x);
          float2 value = here;
          if (!FRESH) {
            const float2 before = of > from ? unit_of(load_word(scales_of(of - 1))) : make_float2(1.f / EACH, 1.f / EACH);
            value = make_float2(divide(before.x, here.x), divide(before.y, here.y));
            if (of == to - 1) last = here;
          }
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};"
                       :: "r"(kept + of * GROUP_SCALE_BYTES + t * KEPT_BYTES), "f"(value.x), "f"(value.y) : "memory");
        }
        chunk_terms(by[t], pairs);
        if (!FRESH) {
          const int from_lane = (lane & ~3) | ((to - 1) & 3);
          unit[t] = make_float2(__shfl_sync(~0u, last.x, from_lane), __shfl_sync(~0u, last.y, from_lane));
        }
      }
      __syncwarp();
#pragma unroll
      for (int t = 0; t < TALL; t++) multiply_all(by[t], sum[t], used.stage, false);
      slot = from * GROUP_SCALE_BYTES;
      if (!FRESH) load_kept(ratio);
      products_wait<0>();
#pragma unroll
      for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[t][i]));
      release();
    };
    clear();
    read.next(full);   // behind the first chunk's scales
    if (unread > 0) {
      load_next();
      cut(a[0]);
      if (TALL == 2) {
        load(1);
      } else {
        pass();
        load_next();
      }
    }
    wait_for_previous_kernel();
    if (threadIdx.x < TOKENS) factors[threadIdx.x] = p.factors[threadIdx.x] * 256.f;
    group_barrier();
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      int left = count;
#pragma unroll 1
      while (left > 0) {
        const int from = walk.slice % CHUNK, length = walk.chunk_left();
        left -= length;
        begin_chunk(walk.slice / CHUNK, from, from + length);
        walk.pass(length);
        if (TALL == 2) {
#pragma unroll 1
          for (int n = 0; n < length; n++) step(a[0], a[1]);
        } else {
#pragma unroll 1
          for (int n = 1; n < length; n += 2) {
            step(a[0], a[1]);
            step(a[1], a[0]);
          }
          if (length % 2) {
            step(a[0], a[1]);
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
              for (int i = 0; i < 4; i++) a[0][j][i] = a[1][j][i];
          }
        }
      }
      finish_sums();
      if (SPLIT) continue;
#pragma unroll
      for (int t = 0; t < TALL; t++)
        store_results(p, sum[t], factors, (first_block + block * block_step) * ROWS + tile_of(t) * 16, lane);
      clear();
    }
  }
  if (!SPLIT) return;
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
    const int token = o / (ROWS / 4), row = o % (ROWS / 4) * 4, y_row = first_block * ROWS + row;
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
    store_four(p.y + token * p.y_stride + y_row, out, y_row, p.rows);
  }
  cluster_sync();   // no block leaves while another reads its sums
}
