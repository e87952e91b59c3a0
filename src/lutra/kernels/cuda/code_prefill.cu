// y = x W^T for hundreds of tokens and more, on fp16 tensor cores of Hopper (wgmma, sm_90a): up to 4 bits,
// groups of 128 and more, scales in half. The arithmetic is that of `code_linear.cu`: a weight is an exact
// integer in a half times its group's step, the sums stay in the accumulators in units of the current
// group's step, and the offsets times the sums of x over each slice are a product of their own at the end.
//
// A block takes GROUPS x 64 rows and TOKENS tokens at a time and goes from tile to tile until none is left. In
// its first warpgroup, a warp fetches, two make the tables of free levels and one copies results; the others
// take 64 rows each and queue their products in turns. While the tensor core multiplies for one of them, the
// others rescale their sums, cut their next integers from the plane words, or put their results in a stage of the
// ring. Without turns they would all do that, then all multiply. The blocks of a cluster take different rows of the
// same tokens; each fetches a share of x for all of them. Tiles that are left when all clusters have had as many
// are split: each cluster takes a share of their inputs, and the one that has the first inputs of a tile adds up
// the sums of all, in order.
//
// With few tiles, SHARES clusters share the inputs of each instead, and each of them adds up and stores the results
// of as many tokens.
//
// -D: TOKENS 128|256, GROUPS 2|3, STAGES, CLUSTER 1|2, SHARES 1|2|4. Grid: as many blocks as the card has
// processors, or fewer.
// A cluster may wait for sums of those behind it, which give theirs before they wait for any themselves.

#include "prefill.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES groups
  TensorMap steps;         // free levels, see steps.cu: [tiles][groups * 8]; boxes: TILES groups
  TensorMap results;       // y: [tokens][rows]; boxes: TOKENS tokens, 64 rows; not if boxes == 0
  const char* scales_at;
  const char* arranged;    // see prefill.cuh
  const float* factors;
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;
  int tiles, items, groups, items_per_group;
  int row_blocks, token_tiles, near_tiles;   // token tiles of the same rows that run side by side
  int whole;               // tiles that one cluster takes from end to end
  int share, extra;        // units of the others for each cluster, and how many clusters have one more
  int boxes;               // whether there is a map of y
  float4* partial;         // [blocks][warps][SUMS / 4][32 lanes]
  u32* flags;              // [blocks][warps], zeros
};

constexpr int ROWS = GROUPS * 64, THREADS = GROUPS * 128 + 128;
constexpr int MULTIPLY_REGISTERS = GROUPS == 2 ? 224 : 152, FETCH_REGISTERS = 56;
constexpr int GROUP_SCALE_BYTES = 16 * SLOTS * SCALE_SIZE;   // of 16 rows
constexpr int TILES = ROWS / 16;                      // of 16 rows
constexpr int PLANES = TILES * SLICE_BYTES;           // bytes of one slice in the ring
constexpr int SCALES = TILES * GROUP_SCALE_BYTES, STEPS = UNIFORM ? 0 : TILES * 32;
// Whether warps of their own make the tables of free levels, once for the four lanes that need each; where the
// ring has room for them. A table has two rows' levels, as Levels has them, and their steps.
constexpr bool TABLES = !UNIFORM && (BITS < 4 || TOKENS == 128);
constexpr int FETCHED = X_BYTES + PLANES + SCALES + STEPS, TABLE_BYTES = 48;
constexpr int STAGE_BYTES = FETCHED + (TABLES ? ROWS / 2 * TABLE_BYTES : 0);
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr int SHARE_TOKENS = TOKENS / SHARES;         // whose results are a cluster's
constexpr int STORE_STAGES = (GROUPS + 1) / 2;        // stages of the ring that take results
static_assert(STAGE_BYTES >= TOKENS * 256 + 1023, "the results of two warpgroups");
constexpr float SUMS_UNIT = UNIFORM ? 1.f / 65536.f : 256.f;   // of the product with the sums of x

DEVICE void load_words(u32 shared, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(shared));
}
DEVICE void store_words(u32 shared, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(shared), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE u32 load_global(const u32* p) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
// A copy that arrives at the same place in all blocks of a cluster of two.
DEVICE void copy_to_all(u32 shared, const void* global, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1], %2, [%3], %4;"
               :: "r"(shared), "l"(global), "r"(bytes), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
// One lane of a warp.
DEVICE bool elected() {
  u32 is;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p; }" : "=r"(is));
  return is;
}
DEVICE void arrive_in_block(u32 barrier, u32 rank) {   // of the cluster, if there is one
  if (CLUSTER == 1) barrier_arrive(barrier);
  else barrier_arrive_at(barrier, rank);
}
// Four 8x8 tiles of 16-bit values, each stored transposed; lane 8 i + j gives the address of row j of tile i.
DEVICE void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d));
}
// From shared memory to a box in global memory; other threads may write there again after the wait.
DEVICE void store_box(const TensorMap& map, int column, int row, u32 shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
               "cp.async.bulk.commit_group;" :: "l"(&map), "r"(column), "r"(row), "r"(shared) : "memory");
}
DEVICE void wait_stored() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE u32 y_pair(float low, float high) {
  u32 pair;
  if (X_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

struct Tile {
  int row, token;   // blocks of rows, tiles of tokens
  DEVICE Tile(const Arguments& p, int index) {   // of a cluster
    const int rows = (p.row_blocks + CLUSTER - 1) / CLUSTER;
    const int together = p.near_tiles * rows, far = index / together, inside = index - far * together;
    const int near = min(p.near_tiles, p.token_tiles - far * p.near_tiles);
    const int rows_of = inside / near;
    row = rows_of * CLUSTER + (CLUSTER > 1 ? cluster_rank() : 0);
    token = far * p.near_tiles + inside - rows_of * near;
  }
};

// What a cluster does: whole tiles, then its share of the inputs of those that are left. Units of a tile are its
// slices and, behind them, the parts of the sums.
struct Work {
  int whole, count;   // items: tiles from end to end, all
  int lo, hi, skipped;   // units of the other tiles; tiles before them

  DEVICE Work(const Arguments& p, int units, int first, int clusters) {
    whole = first < p.whole ? (p.whole - first - 1) / clusters + 1 : 0;
    lo = p.share * first + min(p.extra, first);
    hi = lo + p.share + (first < p.extra);
    skipped = lo / units;
    count = SHARES > 1 ? 1 : whole + (hi > lo ? (hi - 1) / units - skipped + 1 : 0);
  }
};
struct Item {
  int tile, begin, end;   // units
  int share = 0;          // of the tokens whose results are this cluster's
  DEVICE bool stores() const { return SHARES > 1 || begin == 0; }
  DEVICE Item(const Work& work, const Arguments& p, int units, int first, int clusters, int number) {
    const int of = work.skipped + number - work.whole;
    const bool whole = number < work.whole;
    tile = whole ? first + number * clusters : p.whole + of;
    begin = whole ? 0 : max(work.lo - of * units, 0);
    end = whole ? units : min(work.hi - of * units, units);
    if (SHARES > 1) {
      tile = first / SHARES;
      share = first - tile * SHARES;
      begin = units * share / SHARES;
      end = units * (share + 1) / SHARES;
    }
  }
};

struct Position {   // in the ring of stages
  int stage = 0;
  u32 parity = 0;
  DEVICE void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } }
};

// What a warp reads of its 16 rows and a slice before it cuts.
constexpr float LEAST = 8.6736174e-19f;
// Free levels: whether codes are put together as soon as they are read, while products run. It helps where the
// queue of products runs dry, and costs where it does not.
#define EARLY_CODES (!UNIFORM && BITS == 3 && TOKENS == 128)
struct Words {
  u32 low[BITS], high[BITS];
#if !UNIFORM
  LevelCodes rows[2];
  Levels levels;
#endif

  DEVICE void load_planes(u32 planes, int lane) {
#pragma unroll
    for (int q = 0; q < BITS; q++)
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                   : "=r"(low[q]), "=r"(high[q]) : "r"(planes + q * 256 + lane * 8));
#if EARLY_CODES
    rows[0].make(low);
    rows[1].make(high);
#pragma unroll
    for (int i = 0; i < LevelCodes::WORDS; i++) asm volatile("" : "+r"(rows[0].w[i]), "+r"(rows[1].w[i]));
#endif
  }
  // From addresses in shared memory: scales of rows g and g + 8, and their integers of steps.cu. Returns the
  // steps of both. A step of 0 would leave no unit for the sums: it is 2^-60.
  DEVICE float2 make(u32 scales, u32 steps) {
    auto alpha_pair = [&](int q) {
      const u32 pair = load_word(scales + 4 * q);
      return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16)));
    };
    float2 unit;
#if UNIFORM
    const float2 alpha = alpha_pair(0);
    unit.x = fabsf(alpha.x) < LEAST ? LEAST : alpha.x * (4.f / (1 << BITS));
    unit.y = fabsf(alpha.y) < LEAST ? LEAST : alpha.y * (4.f / (1 << BITS));
#else
    const u32 step = load_word(steps);
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
    levels.make(integers);
#endif
    return unit;
  }
#if !UNIFORM
  // To and from a table.
  DEVICE void give(u32 table, float2 unit) const {
    store_words(table, levels.low[0][0], levels.low[0][1], levels.low[1][0], levels.low[1][1]);
    if (BITS > 2) store_words(table + 16, levels.high[0][0], levels.high[0][1], levels.high[1][0], levels.high[1][1]);
    store_words(table + 32, __float_as_uint(unit.x), __float_as_uint(unit.y), 0, 0);
  }
  DEVICE float2 take(u32 table) {
    load_words(table, levels.low[0][0], levels.low[0][1], levels.low[1][0], levels.low[1][1]);
    if (BITS > 2) load_words(table + 16, levels.high[0][0], levels.high[0][1], levels.high[1][0], levels.high[1][1]);
    float2 unit;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(unit.x), "=f"(unit.y) : "r"(table + 32));
    return unit;
  }
#endif

  DEVICE void cut(u32 (&a)[8][4]) {
#if UNIFORM
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
#else
    u32 pair[16];
#if !EARLY_CODES
    rows[0].make(low);
    rows[1].make(high);
#endif
    levels.pairs(0, rows[0], pair);
#pragma unroll
    for (int b = 0; b < 16; b++) a[b >> 1][(b & 1) * 2] = pair[b];
    levels.pairs(1, rows[1], pair);
#pragma unroll
    for (int b = 0; b < 16; b++) a[b >> 1][(b & 1) * 2 + 1] = pair[b];
#endif
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

DEVICE void pass_turn(u32 turns, int group) {   // to the next warpgroup
  if ((threadIdx.x & 31) == 0) barrier_arrive(turns + 8 * ((group + 1) % GROUPS));
}

DEVICE bool barrier_passed(u32 barrier, u32 parity) {   // after some time, in any case
  u32 is;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(is) : "r"(barrier), "r"(parity) : "memory");
  return is;
}
DEVICE void change(u32& v, u32 bits) { asm volatile("xor.b32 %0, %0, %1;" : "+r"(v) : "r"(bits)); }

// Products of a warpgroup, in turn: it waits until the one before it has queued its own. `never` is 0, which the
// compiler does not know: operands and sums may change ahead of the wait, so that it does not make them behind it.
template <int N> DEVICE void multiply(float (&sum)[SUMS], u32 (&a)[N][4], u32 stage, u32 turns, int group, u32& turn,
                                      u32 never) {
#pragma unroll
  for (int j = 0; j < N; j++)
    asm volatile("" : "+r"(a[j][0]), "+r"(a[j][1]), "+r"(a[j][2]), "+r"(a[j][3]));
#pragma unroll
  for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[i]));
  const u32 x = x_descriptor(stage);
  const bool passed = barrier_passed(turns + 8 * group, turn);
  if (never) {
#pragma unroll
    for (int j = 0; j < N * 4; j++) change(a[j >> 2][j & 3], never);
#pragma unroll
    for (int i = 0; i < SUMS; i++) change((u32&)sum[i], never);
  }
  if (!passed) barrier_wait(turns + 8 * group, turn);
  turn ^= 1;
  products_begin();
#pragma unroll
  for (int j = 0; j < N; j++) {
    multiply_add<TOKENS>(sum, a[j], x + j * (TOKENS * 2));
    if (j == min(N - 1, 4)) pass_turn(turns, group);   // so that the queue does not run dry
  }
  products_commit();
}

// What the sums of x are multiplied with: see prefill.cuh. Of rows g and g + 8 and of the slices that a lane has in a
// part of the sums.
struct Terms {
  static constexpr int SLICES = 16 / TERMS;
  u32 offset[SLICES], alpha[UNIFORM ? SLICES : 1];

  DEVICE void load(const Arguments& p, const char* scales, int first) {   // of a tile and row; of a part
#pragma unroll
    for (int i = 0; i < SLICES; i++) {
      const int slice = first + 4 * i, group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
      const u32* from = (const u32*)(scales + group * GROUP_SCALE_BYTES);
      const bool inside = slice < p.items * 2;
      offset[i] = inside ? load_global(from + SLOTS - 1) : 0;
      if (UNIFORM) alpha[i] = inside ? load_global(from) : 0;
    }
  }
  DEVICE void order(u32 (&a)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (TERMS == 4) {
        a[j][0] = __byte_perm(offset[j], 0, 0x1010);
        a[j][1] = __byte_perm(offset[j], 0, 0x3232);
        a[j][2] = __byte_perm(alpha[UNIFORM ? j : 0], 0, 0x1010);
        a[j][3] = __byte_perm(alpha[UNIFORM ? j : 0], 0, 0x3232);
      } else {
        constexpr int LAST = SLICES - 1;   // there are eight: this is only for the compiler
        const u32 here = offset[min(2 * j, LAST)], next = offset[min(2 * j + 1, LAST)];
        const u32 second = UNIFORM ? alpha[min(2 * j, LAST)] : here;
        const u32 next_second = UNIFORM ? alpha[min(2 * j + 1, LAST)] : next;
        a[j][0] = __byte_perm(here, second, 0x5410);
        a[j][1] = __byte_perm(here, second, 0x7632);
        a[j][2] = __byte_perm(next, next_second, 0x5410);
        a[j][3] = __byte_perm(next, next_second, 0x7632);
      }
    }
  }
};

// Results of 64 rows in a tile [TOKENS][64 rows] in shared memory, as copies of boxes have it: lines of 128 bytes,
// the eight pieces of a line in an order that depends on the line.
DEVICE void stage_results(const Arguments& p, const float (&sum)[SUMS], int row, int token, int share, u32 staged) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3;
  const int of = row + warp * 16 + (lane >> 2);
  float bias[2] = {0.f, 0.f};
  if (p.bias) {
    if (of < p.rows) bias[0] = x_to_float(p.bias[of]);
    if (of + 8 < p.rows) bias[1] = x_to_float(p.bias[of + 8]);
  }
  const float* factors = p.factors + token + 2 * (lane & 3);
  // Tile i of a store: rows 8 (i & 1), tokens 8 (i >> 1).
  const u32 line = staged + ((lane & 7) + (lane >> 4) * 8) * 128;
  const u32 at = line + (((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
#pragma unroll
  for (int column = 0; column < TOKENS; column += 16) {
    if (SHARES > 1 && column / SHARE_TOKENS != share) continue;
    u32 pair[4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int d = column / 2 + 4 * j;
      float2 f = *(const float2*)(factors + column + 8 * j);
      f.x *= 256.f;
      f.y *= 256.f;
      pair[2 * j] = y_pair(fmaf(sum[d], f.x, bias[0]), fmaf(sum[d + 1], f.y, bias[0]));
      pair[2 * j + 1] = y_pair(fmaf(sum[d + 2], f.x, bias[1]), fmaf(sum[d + 3], f.y, bias[1]));
    }
    store_transposed(at + column * 128, pair[0], pair[1], pair[2], pair[3]);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE u32 results_at(u32 ring, int stage, int group) {
  return (ring + stage * STAGE_BYTES + 1023) / 1024 * 1024 + group % 2 * (TOKENS * 128);
}
DEVICE int stage_after(int stage, int more) {   // more: -1 to STAGES
  stage += more;
  return stage < 0 ? stage + STAGES : stage < STAGES ? stage : stage - STAGES;
}

// From there to y, where it has no map: by one warp.
DEVICE void copy_results(const Arguments& p, int row, int token, u32 staged) {
  const int lane = threadIdx.x & 31, chunk = lane & 7, y_row = row + chunk * 8;
#pragma unroll 1
  for (int here = lane >> 3; here < min(SHARE_TOKENS, p.tokens - token); here += 4) {
    u32 words[4];
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(staged + here * 128 + ((chunk ^ (here & 7)) << 4)));
    u16* y = p.y + (token + here) * p.y_stride + y_row;
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (y_row + k < p.rows) y[k] = (u16)(words[k >> 1] >> (k & 1) * 16);
  }
}

// A warp fetches weights and x into the ring. All of its lanes know what is fetched, and one of them does it: so the
// compiler keeps addresses in registers that all lanes share, which copies want.
DEVICE void fetch(const Arguments& p, const Work& work, int units, u32 ring, u32 full, u32 empty) {
  const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER, slices = p.items * 2, parts = units - slices;
  const int rank = CLUSTER > 1 ? cluster_rank() : 0;
  auto fetch_x = [&](const char* x, int bytes, int stage) {
    const u32 to = ring + stage * STAGE_BYTES, barrier = full + 8 * stage, share = rank * (bytes / CLUSTER);
    if (CLUSTER > 1) copy_to_all(to + share, x + share, bytes / CLUSTER, barrier);
    else copy_bulk(to, x, bytes, barrier);
  };
  wait_for_previous_kernel();
  Position at;
  at.parity = 1;   // the stages are free at first
#pragma unroll 1
  for (int number = 0; number < work.count; number++) {
    const Item item(work, p, units, first, step, number);
    const Tile tile(p, item.tile);
    const char* x = p.arranged + (long long)tile.token * (slices * (long long)X_BYTES + parts * PART_BYTES);
    // Blocks begin at different slices, so that they do not all ask for the same at once.
    int slice = (tile.row / CLUSTER * 7 + tile.token * 3 + item.begin) % slices;
#pragma unroll 1
    for (int n = item.begin; n < min(item.end, slices); n++, at.next()) {
      const u32 planes = ring + at.stage * STAGE_BYTES + X_BYTES, scales = planes + PLANES;
      const u32 barrier = full + 8 * at.stage;
      const int group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
      barrier_wait(empty + 8 * at.stage, at.parity);
      if (elected()) {
        barrier_expect(barrier, FETCHED);
        copy_box(planes, p.planes, slice * (SLICE_BYTES / 4), tile.row * TILES, barrier);
        copy_box(scales, p.scales, group * (GROUP_SCALE_BYTES / 4), tile.row * TILES, barrier);
        if (!UNIFORM) copy_box(scales + SCALES, p.steps, group * 8, tile.row * TILES, barrier);
        fetch_x(x + slice * (long long)X_BYTES, X_BYTES, at.stage);
      }
      if (++slice == slices) slice = 0;
    }
    x += slices * (long long)X_BYTES;
#pragma unroll 1
    for (int n = max(item.begin - slices, 0); n < item.end - slices; n++, at.next()) {
      barrier_wait(empty + 8 * at.stage, at.parity);
      if (elected()) {
        barrier_expect(full + 8 * at.stage, PART_BYTES);
        fetch_x(x + n * PART_BYTES, PART_BYTES, at.stage);
      }
    }
    if (item.stores())   // stages for the results
#pragma unroll 1
      for (int s = 0; s < STORE_STAGES; s++, at.next()) {
        barrier_wait(empty + 8 * at.stage, at.parity);
        if (elected()) barrier_arrive(full + 8 * at.stage);
      }
  }
}

// Two warps make the tables of every slice ahead of the warps that multiply, and pass on every other stage.
DEVICE void make_tables(const Arguments& p, const Work& work, int units, u32 ring, u32 full, u32 tabled) {
#if !UNIFORM
  const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
  Position at;
  for (int number = 0; number < work.count; number++) {
    const Item item(work, p, units, first, step, number);
    const int stages = item.end - item.begin + (item.stores() ? STORE_STAGES : 0);
    for (int n = 0; n < stages; n++, at.next()) {
      barrier_wait(full + 8 * at.stage, at.parity);
      if (item.begin + n < p.items * 2) {
        const u32 stage = ring + at.stage * STAGE_BYTES, scales = stage + X_BYTES + PLANES, steps = scales + SCALES;
        constexpr int EACH = (ROWS / 2 + 63) / 64;
        Words words[EACH];
        float2 unit[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) {   // side by side
          const int pair = min((threadIdx.x & 63) + 64 * i, ROWS / 2 - 1);   // of rows
          unit[i] = words[i].make(scales + pair * (4 * SLOTS), steps + pair * 4);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const int pair = (threadIdx.x & 63) + 64 * i;
          if (pair < ROWS / 2) words[i].give(stage + FETCHED + pair * TABLE_BYTES, unit[i]);
        }
      }
      __syncwarp();
      if ((threadIdx.x & 31) == 0) barrier_arrive(tabled + 8 * at.stage);
    }
  }
#endif
}

// A warp copies results while the others go on to the next tile, and then frees their stages.
DEVICE void store_results(const Arguments& p, const Work& work, int units, u32 ring, u32 empty, u32 results) {
  const int lane = threadIdx.x & 31, first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
  int stage = 0;
  u32 parities = 0;   // of the barriers of the stages
  wait_for_previous_kernel();
  for (int number = 0; number < work.count; number++) {
    const Item item(work, p, units, first, step, number);
    const Tile tile(p, item.tile);
    stage = (stage + item.end - item.begin) % STAGES;
    if (!item.stores()) continue;
    for (int s = 0; s < STORE_STAGES; s++) {
      const int now = stage_after(stage, s);
      barrier_wait(results + 8 * now, parities >> now & 1);
      parities ^= 1u << now;
    }
    for (int g = 0; g < GROUPS; g++) {
      const int of = item.share * SHARE_TOKENS;   // of the tile
      const u32 staged = results_at(ring, stage_after(stage, g / 2), g) + of * 128;
      const int row = tile.row * ROWS + g * 64, token = tile.token * TOKENS + of;
      if (!p.boxes) copy_results(p, row, token, staged);
      else if (lane == 0 && row < p.rows && token < p.tokens) store_box(p.results, row, token, staged);
    }
    wait_stored();
    __syncwarp();
    for (int s = 0; s < STORE_STAGES; s++) {
      if (lane >= GROUPS * 4) continue;
      for (int rank = 0; rank < CLUSTER; rank++) arrive_in_block(empty + 8 * stage_after(stage, s), rank);
    }
    stage = stage_after(stage, STORE_STAGES);
  }
}

// Sums of a warp for the block that has the first inputs of its tile, and from one that has others.
DEVICE void give_sums(const Arguments& p, const float (&sum)[SUMS], int warp, int own) {
  const int lane = threadIdx.x & 31;
  float4* to = p.partial + (long long)warp * (SUMS / 4 * 32) + lane;
#pragma unroll
  for (int i = 0; i < SUMS; i += 4)
    if (SHARES == 1 || i * 2 / SHARE_TOKENS != own) to[i * 8] = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
  __syncwarp();
  if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(p.flags + warp) : "memory");
}
DEVICE void take_sums(const Arguments& p, float (&sum)[SUMS], int warp, int own) {
  const int lane = threadIdx.x & 31;
  const float4* from = p.partial + (long long)warp * (SUMS / 4 * 32) + lane;
  u32 given;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(p.flags + warp) : "memory");
  while (!__shfl_sync(~0u, given, 0));
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    if (SHARES > 1 && i * 2 / SHARE_TOKENS != own) continue;
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from + i * 8) : "memory");
    sum[i] += v.x;
    sum[i + 1] += v.y;
    sum[i + 2] += v.z;
    sum[i + 3] += v.w;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
code_prefill(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // the ring, which takes results, too
  __shared__ __align__(8) u64 barriers[4 * STAGES + GROUPS];
  const u32 ring = shared_address(shared), full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 results = empty + 8 * STAGES, turns = results + 8 * STAGES;
  const u32 tabled = turns + 8 * GROUPS, ready = TABLES ? tabled : full;
  const int slices = p.items * 2, parts = (slices + PART_SLICES - 1) / PART_SLICES;
  const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
  const int units = slices + parts;
  const Work work(p, units, first, step);
  const int warpgroup = __shfl_sync(~0u, threadIdx.x >> 7, 0);   // uniform
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS * 4 * CLUSTER);
      barrier_init(results + 8 * s, GROUPS * 4);
      barrier_init(tabled + 8 * s, 2);   // warps
    }
    for (int g = 0; g < GROUPS; g++) barrier_init(turns + 8 * g, 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CLUSTER > 1) cluster_sync(); else __syncthreads();
  let_next_kernel_start();

  if (warpgroup == 0) {
    give_registers<FETCH_REGISTERS>();
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
    if (warp == 0) fetch(p, work, units, ring, full, empty);
    if (TABLES && warp >= 2) make_tables(p, work, units, ring, full, tabled);
    if (warp == 1) store_results(p, work, units, ring, empty, results);
    __syncwarp();
  } else {
    take_registers<MULTIPLY_REGISTERS>();
    const int group = warpgroup - 1, lane = threadIdx.x & 31;
    const int of = group * 4 + (threadIdx.x >> 5 & 3);   // tile of 16 rows
    u32 turn = 0;   // parity
    const u32 never = (u32)p.tiles >> 31;
    Position at;   // of what is read next
    float sum[SUMS];
    u32 a[8][4];
    auto load = [&](Words& words) {
      barrier_wait(ready + 8 * at.stage, at.parity);
      const u32 stage = ring + at.stage * STAGE_BYTES, scales = stage + X_BYTES + PLANES;
      words.load_planes(stage + X_BYTES + of * SLICE_BYTES, lane);
#if !UNIFORM
      if (TABLES) return words.take(stage + FETCHED + (of * 8 + (lane >> 2)) * TABLE_BYTES);
#endif
      return words.make(scales + of * GROUP_SCALE_BYTES + (lane >> 2) * (4 * SLOTS),
                        scales + SCALES + of * 32 + (lane >> 2) * 4);
    };
    auto release = [&](int stage) {
      if (lane < CLUSTER) arrive_in_block(empty + 8 * stage, lane);
    };
    if (group == GROUPS - 1) pass_turn(turns, group);
    wait_for_previous_kernel();
    for (int number = 0; number < work.count; number++) {
      const Item item(work, p, units, first, step, number);
      const Tile tile(p, item.tile);
      if ((threadIdx.x & 127) < TOKENS / 8) touch(p.factors + tile.token * TOKENS + (threadIdx.x & 127) * 8);
      float2 unit = make_float2(1.f, 1.f);
#pragma unroll
      for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
      const int rows_of = min(tile.row * TILES + of, p.tiles - 1);
      const char* scales = p.scales_at + ((long long)rows_of * p.groups * 8 + (lane >> 2)) * (2 * SLOTS * SCALE_SIZE);
      Words words;
      float2 next = unit;
      if (item.begin < slices) next = load(words);
      const int last = min(item.end, slices);
#pragma unroll 1
      for (int n = item.begin; n < last; n++) {
        rescale(sum, make_float2(divide(unit.x, next.x), divide(unit.y, next.y)));
        unit = next;
        words.cut(a);
        const int stage = at.stage;
        multiply(sum, a, ring + stage * STAGE_BYTES, turns, group, turn, never);
        at.next();
        if (n + 1 < last) next = load(words);   // while the products run
        products_wait<0>();
        release(stage);
      }
      rescale(sum, make_float2(unit.x * (1.f / SUMS_UNIT), unit.y * (1.f / SUMS_UNIT)));
      const int parts_begin = max(item.begin - slices, 0), parts_end = item.end - slices;
      Terms terms;
      if (parts_begin < parts_end) terms.load(p, scales, parts_begin * PART_SLICES + (lane & 3));
#pragma unroll 1
      for (int n = parts_begin; n < parts_end; n++) {
        u32 by[4][4];
        terms.order(by);
        barrier_wait(ready + 8 * at.stage, at.parity);
        multiply(sum, by, ring + at.stage * STAGE_BYTES, turns, group, turn, never);
        if (n + 1 < parts_end) terms.load(p, scales, (n + 1) * PART_SLICES + (lane & 3));   // while the products run
        products_wait<0>();
        release(at.stage);
        at.next();
      }
      if (SHARES > 1 || item.begin > 0) {
        give_sums(p, sum, blockIdx.x * (GROUPS * 4) + of, item.share);
        if (SHARES == 1) continue;
      }
      auto take = [&](int cluster) {
        take_sums(p, sum, (cluster * CLUSTER + blockIdx.x % CLUSTER) * (GROUPS * 4) + of, item.share);
      };
      if (SHARES > 1) {
#pragma unroll 1
        for (int c = 0; c < SHARES; c++)
          if (c != item.share) take(item.tile * SHARES + c);
      } else {   // the clusters behind this one have what follows, one after the other
        for (int have = item.end, c = first + 1; have < units; c++) {
          take(c);
          have += p.share + (c < p.extra);
        }
      }
#pragma unroll
      for (int s = 0; s < STORE_STAGES; s++, at.next()) {
        if (s != group / 2) continue;   // for other warpgroups
        barrier_wait(ready + 8 * at.stage, at.parity);
        stage_results(p, sum, tile.row * ROWS + group * 64, tile.token * TOKENS, item.share,
                      results_at(ring, at.stage, group));
        __syncwarp();
        if (lane < STORE_STAGES) barrier_arrive(results + 8 * stage_after(at.stage, lane - s));
      }
    }
    __syncwarp();
  }
  if (CLUSTER > 1) cluster_sync();   // no block leaves while another still writes to it
}
