// y = x W^T for 5 to 16 tokens and uniform levels on Hopper (sm_90a), on the fp16 tensor cores that every warp has
// for itself (mma.sync): up to 4 bits, groups of 128 and more, scales in half.
//
// x is B, in shared memory; A is made of the weights: a code, an exact subnormal half (fields.cuh). The sums of a
// slice of codes are exact in fp32 until they are multiplied with the unit. What the offsets, and the codes that
// count from 0 instead of -ALL units, add is a product of its own, every four slices: of the units and offsets with
// the sums of x over the slices, each as two halves.
//
// The blocks of a cluster split the inputs. Of a block, WARPS warps multiply, each TILES x 16 rows, or k_warps warps
// the same rows and slices in turn, and each fetches its weights into a ring of its own. Four more put x in operand
// order meanwhile, each a slice at a time, into a ring of CHUNKS times four slices, so that x takes no time of its own
// but that of its first chunk. At the end the sums of the block's warps and of the cluster's blocks meet in shared
// memory and are added in order: two runs give the same bits.
//
// Each block brings a token into range by a power of two, 2^14 to 2^15 for its largest |x| so far, so that
// x may be divided by the power of two at which a field lies in its word (see fields.cuh) without a loss
// but below 2^-30 of the largest. If a later chunk has a larger one, the sums are scaled.
//
// -D: TOKENS 8|16, TILES 1 to 4, WARPS, K_WARPS (divides WARPS), STAGES, EARLY (stages fetched before x), CHUNKS.
// Grid: cluster size * clusters; dynamic shared memory: see `stream_sizes` in stream_plans.py.

#include "fields.cuh"
#include "hopper.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES groups
  const u16* x;            // [tokens][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;   // tokens <= TOKENS
  int tiles, items;
  int items_per_group;             // 1 unless GROUP == 256
  int sums_offset;                 // in bytes, of the sums in shared memory
};

constexpr int ARRANGERS = 4;                          // warps that put x in order
constexpr int THREADS = (WARPS + ARRANGERS) * 32;
constexpr bool SHARES = WARPS % 4 == 0;               // registers can go from one kind of warp to the other
constexpr int ARRANGE_REGISTERS = TOKENS == 8 ? 64 : 80;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;   // of a thread, as launched: what the compiler takes
constexpr int MULTIPLY_REGISTERS =
    (START_REGISTERS * (WARPS / 4 + 1) - ARRANGE_REGISTERS) / (SHARES ? WARPS / 4 : 1) / 8 * 8;
constexpr int ROW_WARPS = WARPS / K_WARPS, BLOCK_TILES = ROW_WARPS * TILES, BLOCK_ROWS = BLOCK_TILES * 16;
constexpr int GROUP_SCALE_BYTES = 32 * SLOTS;         // of 16 rows
constexpr int PLANES_BYTES = TILES * SLICE_BYTES;
constexpr int STAGE_FILL = PLANES_BYTES + TILES * GROUP_SCALE_BYTES;
constexpr int STAGE_BYTES = (STAGE_FILL + 127) / 128 * 128;
constexpr int PARTS = TOKENS / 8;                     // products side by side
constexpr int SUMS = TOKENS / 2;                      // of a lane and tile
constexpr int X_BYTES = TOKENS * 256;                 // of a slice
constexpr int X_STRIDE = X_BYTES + TOKENS * 8;        // with terms of the sums of x over it
constexpr int CHUNK = ARRANGERS;                      // slices
constexpr int CHUNK_BYTES = CHUNK * X_STRIDE + TOKENS * 4;   // with the tokens' exponents
constexpr int PITCH = BLOCK_ROWS + 4;                 // of sums in shared memory
constexpr int PAIR = TILES % 2 ? 1 : 2;               // tiles that are multiplied at a time
// What a product of an integer, as its operand has it, counts.
constexpr float WORTH = 4.f / (1 << BITS) * 16777216.f;
// Sums are as many times larger than that, so that the terms with the sums of x are no subnormal halves.
constexpr float LIFT = BITS <= 2 ? 256.f : 1.f;

DEVICE float2 halves(u32 pair) { return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16))); }
DEVICE u32 half_pair(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 multiply_halves(u32 a, u32 b) { u32 d; asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
// Of threads that have written nothing that another block reads: results on their way are not waited for.
DEVICE void cluster_arrive_without() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void some_threads_barrier(int name, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(name), "r"(threads) : "memory");
}
DEVICE bool one_lane() {   // true in one lane of the warp, as the compiler knows
  u32 chosen;
  asm volatile("{ .reg .pred p;\nelect.sync _|p, 0xFFFFFFFF;\nselp.u32 %0, 1, 0, p; }" : "=r"(chosen));
  return chosen;
}
// COUNT pairs of words, STRIDE bytes apart in shared memory.
template <int COUNT, int STRIDE> DEVICE void load_if(bool wanted, uint2* to, u32 from) {
  if constexpr (COUNT > 1) load_if<COUNT - 1, STRIDE>(wanted, to, from);
  asm volatile("{ .reg .pred p;\nsetp.ne.u32 p, %3, 0;\n@p ld.shared.v2.u32 {%0, %1}, [%2 + %4]; }"
               : "+r"(to[COUNT - 1].x), "+r"(to[COUNT - 1].y)
               : "r"(from), "r"((u32)wanted), "n"((COUNT - 1) * STRIDE) : "memory");
}
DEVICE u32 larger_pair(u32 a, u32 b) { u32 d; asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE void multiply_add(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void multiply_add_narrow(float* d, u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
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

// Codes of rows g and g + 8 of one slice.
struct Codes {
  Fields fields[2];

  DEVICE void read(const char* planes, int lane) {
    u32 low[BITS], high[BITS];
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      const uint2 words = *(const uint2*)(planes + q * 256 + lane * 8);
      low[q] = words.x;
      high[q] = words.y;
    }
    fields[0].interleave(low);
    fields[1].interleave(high);
  }
};

// A warp that puts slice `warp` of every chunk of x in order. Of 8 tokens, lane 4 g + t takes 32 inputs of token g.
struct Arranger {
  const Arguments& p;
  u32 (*largest_of)[TOKENS];
  int warp, g, t, begin, count;   // the block's slices
  bool wide;
  u32 raw[PARTS][16];
  u32 largest[PARTS];             // so far

  DEVICE void load(int i, int chunk) {
    const int slice = chunk * CHUNK + warp, token = i * 8 + g, k = (begin + slice) * 128 + 32 * t;
    const u16* from = p.x + (long long)token * p.x_stride + k;
    u32 (&w)[16] = raw[i];
    const bool any = token < p.tokens && slice < count;
    if (any && wide && k + 32 <= p.in_features) {
#pragma unroll
      for (int n = 0; n < 4; n++) {
        const uint4 v = ((const uint4*)from)[n];
        w[4 * n] = v.x; w[4 * n + 1] = v.y; w[4 * n + 2] = v.z; w[4 * n + 3] = v.w;
      }
    } else {
#pragma unroll
      for (int n = 0; n < 16; n++) {
        const u32 low = any && k + 2 * n < p.in_features ? from[2 * n] : 0;
        const u32 high = any && k + 2 * n + 1 < p.in_features ? from[2 * n + 1] : 0;
        w[n] = low | high << 16;
      }
    }
  }
  DEVICE void find_largest(int i, int n) {   // of the n-th chunk that is put in order
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < 16; k++) most = larger_pair(most, raw[i][k] & 0x7FFF7FFFu);
    most = max(most & 0xFFFFu, most >> 16);
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    if (t == 0) atomicMax(largest_of[n & 1] + i * 8 + g, most);
  }
  DEVICE void store(int i, int n, char* chunk) {
    largest[i] = max(largest[i], largest_of[n & 1][i * 8 + g]);
    // Very small or large ones cannot be brought into range.
    const int exponent = min(max((int)(__float_as_uint(x_to_float((u16)largest[i])) >> 23), X_BF16 ? 16 : 111), 254);
    if (warp == 0 && t == 0) *(int*)(chunk + CHUNK * X_STRIDE + (i * 8 + g) * 4) = exponent;
    const float up = __uint_as_float((u32)(254 + 14 - exponent) << 23 & 0x7F800000u);
    char* to = chunk + warp * X_STRIDE;
    // Half: in two steps, as the power of two, at most 2^30, may be larger than a half can be.
    const float up_first = fminf(up, 32768.f), up_then = fmaxf(up * (1.f / 32768.f), 1.f);
    const u32 first_factor = half_pair(up_first, up_first), then_factor = half_pair(up_then, up_then);
    auto value = [&](int b) { return x_to_float((u16)(raw[i][b >> 1] >> 16 * (b & 1))); };
    float sum[4] = {0.f, 0.f, 0.f, 0.f};   // of tokens 2 t and 2 t + 1, twice
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 pair[4];
#pragma unroll
      for (int h = 0; h < 4; h++) {
        const int b = 4 * j + h;
        if (X_BF16) {
          const float scale = up * (1.f / (1 << field_position(b)));
          pair[h] = half_pair(value(b) * scale, value(b + 16) * scale);
        } else {
          pair[h] = __byte_perm(raw[i][b >> 1], raw[i][(b >> 1) + 8], b & 1 ? 0x7632 : 0x5410);
          const u32 factor = then_factor - field_position(b) * 0x04000400u;
          pair[h] = multiply_halves(multiply_halves(pair[h], first_factor), factor);
        }
      }
      *(uint4*)(to + (j * PARTS + i) * 512 + (4 * g + t) * 16) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
#pragma unroll
      for (int h = 0; h < 4; h += 2) {   // a product with what the fields count: the sums of x
        const u32 first = (15 + field_position(4 * j + h)) * 0x04000400u;
        const u32 second = (15 + field_position(4 * j + h + 1)) * 0x04000400u;
        multiply_add(sum, first, first, second, second, pair[h], pair[h + 1]);
      }
    }
    u32 terms[4];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float offset = sum[k] * (LIFT / WORTH), unit = offset * -ALL;
      terms[2 * k] = half_pair(unit, offset);
      const float2 rounded = halves(terms[2 * k]);
      terms[2 * k + 1] = half_pair(unit - rounded.x, offset - rounded.y);
    }
    if (g == 0)
      *(uint4*)(to + X_BYTES + (i * 8 + 2 * t) * 8) = make_uint4(terms[0], terms[1], terms[2], terms[3]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
stream_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // weights, x, sums
  __shared__ __align__(8) u64 barriers[2 * CHUNKS + WARPS * STAGES];
  __shared__ u32 largest_of[2][TOKENS];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const int g = lane >> 2, t = lane & 3;
  const int parts = cluster_size(), part = cluster_rank();
  const int clusters = gridDim.x / parts, cluster = blockIdx.x / parts;
  const int slices = p.items * 2;
  const int begin = slices * part / parts, count = slices * (part + 1) / parts - begin;
  const int chunks = (count + CHUNK - 1) / CHUNK;
  const int passes = (p.tiles + clusters * BLOCK_TILES - 1) / (clusters * BLOCK_TILES);
  const bool resident = chunks <= CHUNKS;   // x is arranged once
  // Barriers: chunks of x that are there, that have been read; slices of the warp's weights.
  const u32 full = __shfl_sync(~0u, shared_address(barriers), 0), empty = full + 8 * CHUNKS;   // kept, not found anew
  const u32 filled = empty + 8 * (CHUNKS + warp * STAGES);
  char* x_at = shared + WARPS * STAGES * STAGE_BYTES;
  if (threadIdx.x < 2 * TOKENS) largest_of[0][threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    for (int c = 0; c < CHUNKS; c++) {
      barrier_init(full + 8 * c, ARRANGERS);
      barrier_init(empty + 8 * c, WARPS);
    }
    for (int s = 0; s < WARPS * STAGES; s++) barrier_init(filled + 8 * s, 1);   // this is warp 0
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  let_next_kernel_start();
  auto join = [&](int pass) {   // what the other warps do at the end of a pass
    if (pass) cluster_wait();
    cluster_arrive_without();
    cluster_wait();
    cluster_arrive_without();
  };

  if (warp >= WARPS) {
    if constexpr (SHARES) give_registers<ARRANGE_REGISTERS>();
    int joined = 0;   // passes
    wait_for_previous_kernel();
    Arranger arranger = {p, largest_of, warp - WARPS, g, t, begin, count};
    arranger.wide = (((u64)p.x | (u64)p.x_stride * 2) & 15) == 0;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      arranger.largest[i] = 0;
      arranger.load(i, 0);
    }
    char* to = x_at;
    int buffer = 0, parity = 1, chunk = 0;
    const int all = resident ? chunks : chunks * passes;
#pragma unroll 1
    for (int n = 0; n < all; n++) {
      // Chunks of the next pass are put in order while the sums of this one meet, as many as there is room for.
      if (n >= (joined + 1) * chunks + min(CHUNKS, chunks)) join(joined++);
#pragma unroll
      for (int i = 0; i < PARTS; i++) arranger.find_largest(i, n);
      some_threads_barrier(1, ARRANGERS * 32);
      barrier_wait(empty + 8 * buffer, parity);
      if (++chunk == chunks) chunk = 0;
#pragma unroll
      for (int i = 0; i < PARTS; i++) {
        arranger.store(i, n, to);
        if (n + 1 < all) arranger.load(i, chunk);
      }
      __syncwarp();
      if (one_lane()) barrier_arrive(full + 8 * buffer);
      to += CHUNK_BYTES;
      if (++buffer == CHUNKS) {
        buffer = 0;
        parity ^= 1;
        to = x_at;
      }
    }
    while (joined < passes) join(joined++);
    cluster_wait();
    return;
  }

  if constexpr (SHARES) take_registers<MULTIPLY_REGISTERS>();
  const int row_warp = warp / K_WARPS, k_warp = warp % K_WARPS;
  float* sums = (float*)(shared + p.sums_offset);
  int fetch_slice = k_warp, fetch_tile = (cluster * ROW_WARPS + row_warp) * TILES;
  auto fetch = [&](u32 to, u32 barrier) {
    if (fetch_tile >= p.tiles) return;
    if (one_lane()) {
      const int slice = begin + fetch_slice, group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
      barrier_expect(barrier, STAGE_FILL);
      copy_box(to, p.planes, slice * (SLICE_BYTES / 4), fetch_tile, barrier);
      copy_box(to + PLANES_BYTES, p.scales, group * (GROUP_SCALE_BYTES / 4), fetch_tile, barrier);
    }
    fetch_slice += K_WARPS;
    if (fetch_slice >= count) {
      fetch_slice = k_warp;
      fetch_tile += clusters * BLOCK_TILES;
    }
  };
  if (k_warp >= count) fetch_tile = p.tiles;
  const u32 ring = __shfl_sync(~0u, shared_address(shared), 0) + warp * (STAGES * STAGE_BYTES);
#pragma unroll 1
  for (int s = 0; s < EARLY; s++) fetch(ring + s * STAGE_BYTES, filled + 8 * s);
  wait_for_previous_kernel();
  if (EARLY < STAGES) {   // x does not come behind the weights of a whole ring
    barrier_wait(full, 0);
#pragma unroll 1
    for (int s = EARLY; s < STAGES; s++) fetch(ring + s * STAGE_BYTES, filled + 8 * s);
  }
  // Addresses that go along are cheaper than a stage's number: of the next slice's stage, and of its barrier.
  u32 stage = ring, stage_filled = filled, stage_parity = 0;
  u32 buffer = 0, parity = 0;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    float sum[TILES][SUMS];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < SUMS; j++) sum[i][j] = 0.f;
    int2 exponents[PARTS];
    int chunk_end = 0;   // slices of the chunks so far
    if (resident) buffer = parity = 0;
    const char* x = x_at;
    // Of every four slices lane 4 g + t keeps what the sums of x over slice t are multiplied with, in rows g and
    // g + 8, and these sums of tokens g and g + 8.
    uint2 pairs[TILES], terms[PARTS];
#pragma unroll
    for (int i = 0; i < TILES; i++) pairs[i] = make_uint2(0, 0);
#pragma unroll
    for (int c = 0; c < PARTS; c++) terms[c] = make_uint2(0, 0);
    auto add_terms = [&]() {
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const u32 upper = __byte_perm(pairs[i].x, pairs[i].y, 0x5410);
        const u32 lower = __byte_perm(pairs[i].x, pairs[i].y, 0x7632);
#pragma unroll
        for (int c = 0; c < PARTS; c++) {
          multiply_add_narrow(sum[i] + 4 * c, upper, lower, terms[c].x);
          multiply_add_narrow(sum[i] + 4 * c, upper, lower, terms[c].y);
        }
      }
#pragma unroll
      for (int c = 0; c < PARTS; c++) terms[c] = make_uint2(0, 0);
    };
    auto release = [&]() {
      __syncwarp();
      if (!resident && one_lane()) barrier_arrive(empty + 8 * buffer);
      if (++buffer == CHUNKS) {
        buffer = 0;
        parity ^= 1;
      }
    };
    auto next_chunk = [&](int slice) {
      if (chunk_end > 0) release();
      barrier_wait(full + 8 * buffer, parity);
      const char* chunk_at = x_at + buffer * CHUNK_BYTES;
      // The range of a token may have become larger.
      int2 now[PARTS];
      bool same = true;
#pragma unroll
      for (int c = 0; c < PARTS; c++) {
        now[c] = *(const int2*)(chunk_at + CHUNK * X_STRIDE + (8 * c + 2 * t) * 4);
        if (chunk_end == 0) exponents[c] = now[c];
        same = same && now[c].x == exponents[c].x && now[c].y == exponents[c].y;
      }
      if (!__all_sync(~0u, same)) {
        add_terms();
#pragma unroll
        for (int c = 0; c < PARTS; c++) {
          const float first = __uint_as_float((u32)max(127 + exponents[c].x - now[c].x, 0) << 23);
          const float second = __uint_as_float((u32)max(127 + exponents[c].y - now[c].y, 0) << 23);
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            sum[i][4 * c] *= first;
            sum[i][4 * c + 1] *= second;
            sum[i][4 * c + 2] *= first;
            sum[i][4 * c + 3] *= second;
          }
          exponents[c] = now[c];
        }
      }
      x = chunk_at + (slice - chunk_end) * X_STRIDE + lane * 16;
      chunk_end += CHUNK;
    };
    int turn = 0;   // of four
    const int end = (pass * clusters + cluster) * BLOCK_TILES + row_warp * TILES < p.tiles ? count : 0;
#pragma unroll 1
    for (int slice = k_warp; slice < end; slice += K_WARPS) {
      while (slice >= chunk_end) next_chunk(slice);
      barrier_wait(stage_filled, stage_parity);
      const char* at = shared + (stage - shared_address(shared)) + lane * 8;
      const int scales_at = PLANES_BYTES + g * 8 - lane * 8;
      load_if<TILES, GROUP_SCALE_BYTES>(t == turn, pairs, shared_address(at) + scales_at);
      load_if<PARTS, 64>(t == turn, terms, shared_address(x) + X_BYTES + 8 * g - lane * 16);
#pragma unroll
      for (int first = 0; first < TILES; first += PAIR) {
        float product[PAIR][SUMS];
        Codes codes[PAIR];
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
#pragma unroll
          for (int s = 0; s < SUMS; s++) product[i][s] = 0.f;
          codes[i].read(at + (first + i) * SLICE_BYTES, 0);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint4 operand[PARTS];
#pragma unroll
          for (int c = 0; c < PARTS; c++) operand[c] = *(const uint4*)(x + (j * PARTS + c) * 512);
#pragma unroll
          for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < PAIR; i++) {
              u32 a[4];
#pragma unroll
              for (int k = 0; k < 4; k++) a[k] = codes[i].fields[k & 1].pair(4 * j + 2 * h + (k >> 1));
#pragma unroll
              for (int c = 0; c < PARTS; c++)
                multiply_add(product[i] + 4 * c, a[0], a[1], a[2], a[3], h ? operand[c].z : operand[c].x,
                             h ? operand[c].w : operand[c].y);
            }
        }
#pragma unroll
        for (int i = 0; i < PAIR; i++) {
          float2 unit = halves(*(const u32*)(at + scales_at + (first + i) * GROUP_SCALE_BYTES));
          unit.x *= LIFT;
          unit.y *= LIFT;
          add(sum[first + i], product[i], unit);
        }
      }
      if (turn == 3) add_terms();
      turn = (turn + 1) & 3;
      __syncwarp();
      fetch(stage, stage_filled);
      x += K_WARPS * X_STRIDE;
      stage += STAGE_BYTES;
      stage_filled += 8;
      if (stage_filled == filled + 8 * STAGES) {
        stage = ring;
        stage_filled = filled;
        stage_parity ^= 1;
      }
    }
    add_terms();
    while (chunk_end < count) next_chunk(0);
    release();

    constexpr int QUADS = BLOCK_ROWS / 4;
    const int first_row = (pass * clusters + cluster) * BLOCK_ROWS;
    if (pass) cluster_wait();                        // the sums before have been read
    else some_threads_barrier(2, WARPS * 32);        // the sums may lie where x was
#pragma unroll
    for (int c = 0; c < PARTS; c++) {
      const int token = 8 * c + 2 * t;
      const float down = __uint_as_float((u32)(exponents[c].x - 14) << 23);
      const float down_next = __uint_as_float((u32)(exponents[c].y - 14) << 23);
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        float* to = sums + (k_warp * TOKENS + token) * PITCH + (row_warp * TILES + i) * 16 + g;
        const float* from = sum[i] + 4 * c;
        to[0] = from[0] * (WORTH / LIFT) * down;
        to[PITCH] = from[1] * (WORTH / LIFT) * down_next;
        to[8] = from[2] * (WORTH / LIFT) * down;
        to[PITCH + 8] = from[3] * (WORTH / LIFT) * down_next;
      }
    }
    cluster_arrive();
    cluster_wait();
    // Each block of the cluster finishes a share of the sums.
    for (int o = part * (WARPS * 32) + threadIdx.x; o < p.tokens * QUADS; o += parts * (WARPS * 32)) {
      const int token = o / QUADS, row = o % QUADS * 4, y_row = first_row + row;
      const u32 from = shared_address(sums + token * PITCH + row);
      float4 whole = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int r = 0; r < parts; r++)
#pragma unroll
        for (int k = 0; k < K_WARPS; k++) {
          const float4 v = load_cluster(from + k * (TOKENS * 4) * PITCH, r);
          whole.x += v.x; whole.y += v.y; whole.z += v.z; whole.w += v.w;
        }
      const float values[4] = {whole.x, whole.y, whole.z, whole.w};
      u16 out[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float bias = p.bias && y_row + i < p.rows ? x_to_float(p.bias[y_row + i]) : 0.f;
        out[i] = float_to_x(values[i] + bias);
      }
      store_four(p.y + token * p.y_stride + y_row, out, y_row, p.rows);
    }
    cluster_arrive_without();   // the sums have been read, as results were made of them
  }
  cluster_wait();   // no block leaves while another reads its sums
}
