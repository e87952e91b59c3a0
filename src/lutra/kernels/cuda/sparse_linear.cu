// y = x W^T for up to 32 tokens by sparse products (mma.sp) in which no weight bit is unpacked: free levels of
// 2 to 4 bits, groups of 128 and more, scales in half.
//
// A sparse product of 16 rows by 32 inputs takes 16 numbers of a row, two for every four inputs, and for each
// number the place of its input among the four, as two bits of metadata. Here the numbers are the alphas of two
// planes, the four places are what two inputs a and b add up to by their signs, -a-b, a-b, -a+b and a+b, and the
// places that the numbers pick are the two bits of the planes for these inputs. So the metadata of 16 rows are
// words of the planes, interleaved by two bits, a product multiplies 16 inputs with two planes at once, and the
// sums stay in the accumulators from the first input to the last, whatever the group.
//
// In half a+b is not exact. So the four places of each pair of inputs are moved by a number c, chosen so that they
// are rounded by little (`shift_of`). c sums up over a slice, and what it adds to a row, c times the sum of the
// alphas, is taken off again by a dense product; another adds the offset of the levels times the sum of x. Both
// sums are two halves each. The error is at most 1.1 times that of rounding the result.
//
// The blocks of a cluster split the inputs. A block keeps its inputs of all tokens, as operands, in shared memory
// (or one of PANELS parts of them at a time, and the next) and walks over its rows: each warp has units of TILES x 16 rows, whose
// weights it streams through a ring of its own (cp.async), and no warp waits for another until its unit is done;
// k_warps warps may share a unit. Then the sums of the block's warps and of the cluster's blocks meet in shared
// memory and are added in order: two runs give the same bits.
//
// Each block brings a token into range by a power of two, 2^7 to 2^8 for its largest |x|.
//
// -D: TOKENS 8|16|32, TILES 1|2|4, WARPS, STAGES (slices in a warp's ring), PANELS. Grid: cluster size * clusters;
// dynamic shared memory: see `sparse_sizes` in sparse_plans.py.

#include "hopper.cuh"

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
  int k_warps;                     // warps that share a unit; divides WARPS
  int x_bytes;                     // in shared memory, of a panel
  int sums_offset;                 // in bytes, of the sums in shared memory
};

constexpr int THREADS = WARPS * 32;
constexpr int UNIT_ROWS = TILES * 16;
constexpr int GROUP_SCALE_BYTES = 32 * SLOTS;         // of 16 rows
constexpr int TILE_BYTES = SLICE_BYTES + GROUP_SCALE_BYTES;
constexpr int STAGE_BYTES = TILES * TILE_BYTES;
constexpr int PARTS = TOKENS / 8;                     // products side by side
constexpr int PART_BYTES = 8 * 512 + 64;              // of x: operands of 8 tokens and a slice, and of its sums
constexpr int X_BYTES = PARTS * PART_BYTES;
constexpr int COUPLES = (BITS + 1) / 2;               // of planes
constexpr int SUMS = TOKENS / 2;                      // of a lane and tile
constexpr int SUM_TOKENS = TOKENS < 16 ? TOKENS : 16;   // whose sums meet at a time
constexpr int KEPT = PANELS == 1 ? 2 : 1;             // pieces of x that stay in registers
constexpr int GROUP_TILES = PARTS > 1 || TILES == 1 ? TILES : 2;   // whose words are in registers at a time

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void copy16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}
DEVICE u32 larger_pair(u32 a, u32 b) { u32 d; asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 half_pair(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// What is added to the four sums of two inputs, a + b, a - b and their negatives, so that all are nearly halves.
// The smaller of the two, rounded: then one of the four is 0, two are as exact as their distance to it, a or b
// twice, and what is rounded is shared by the other two. Where the smaller one is rounded by much and the larger
// one is of the same magnitude, half a unit of both: what remains is at most as much as was missing to half a unit.
DEVICE float shift_of(float sum, float difference) {
  const float small = fabsf(sum) < fabsf(difference) ? sum : difference;
  const float rounded = half_to_float(float_to_half(small));
  const float unit = __uint_as_float(__float_as_uint(sum) & 0x7F800000u) * (1.f / 2048.f);   // half of the last place
  const bool alike = ((__float_as_uint(sum) ^ __float_as_uint(difference)) & 0x7F800000u) == 0;
  return alike && fabsf(rounded - small) > 0.6f * unit ? unit : rounded;
}

// 16 rows by 16 numbers of each, whose places are in the words of lanes 0 and 1 of every four (PLACES_OF 0), or of
// 2 and 3. The numbers of a row are the same two in turn: a[0] and a[2] of rows g, a[1] and a[3] of rows g + 8.
template <int PLACES_OF> DEVICE void multiply_add_sparse(float* d, const u32 (&a)[4], const uint4& x, u32 places) {
  asm volatile("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(places), "n"(PLACES_OF));
}
DEVICE float2 halves(u32 pair) { return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16))); }
DEVICE u32 choose_bits(u32 mask, u32 a, u32 b) {   // a where the mask is 1, b elsewhere
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

DEVICE u32 bytes_of(u32 a, u32 b, const u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // rings, x, sums
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
  char* x_at = shared + WARPS * (STAGES * STAGE_BYTES);
  float* sums = (float*)(shared + p.sums_offset);
  if (threadIdx.x < TOKENS) largest_of[threadIdx.x] = 0;
  let_next_kernel_start();

  // Half a warp copies a tile's slice: its planes, and its scales with one more instruction.
  constexpr int COPIERS = TILES == 1 ? 1 : TILES / 2, LANES = TILES == 1 ? 32 : 16;
  const int copier = lane & (LANES - 1);
  const bool copies_scales = copier < SLOTS * 2;
  const char* planes_from[COPIERS];
  const char* scales_from[COPIERS];
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
          scales_from[i] = p.scales + group * GROUP_SCALE_BYTES + copier * 16;
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
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i] + group * GROUP_SCALE_BYTES);
        } else {
          if (copies_scales) copy16(to + SLICE_BYTES, scales_from[i]);
          scales_from[i] += GROUP_SCALE_BYTES;
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
  // A product (f, h, m) has inputs 64 f + 16 h + 2 m and the next, and 4, 8, 12, 32, 36, 40 and 44 more: eight
  // pairs, of which lanes 2 u and 2 u + 1 of a token have those at 4 u, 8 + 4 u, 32 + 4 u and 40 + 4 u, the first
  // lane the places of -b. Chunks of 16 bytes are so permuted that writing meets no bank twice.
  const int mix = g >> 1;
  auto store_piece = [&](char* panel, int piece, const u32 (&w)[16]) {   // a piece of a panel
    const int slice = piece / PARTS, column = piece % PARTS;
    const float up = __uint_as_float((u32)(254 + 7 - exponent_of(column * 8 + g)) << 23);
    char* const x = panel + slice * X_BYTES + column * PART_BYTES;
    char* const to = x + (t >> 1) * 2048 + g * 64 + (t & 1) * 8;
    float whole = 0.f, sum_of_c = 0.f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      if (i & 4) continue;
      const int h = i >> 3, u = i >> 1 & 1, m = i & 1;
      u32 first[2], second[2];   // places of -b and of b
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const u32 pair = w[i + 4 * k];
        const float a = x_to_float((u16)pair), b = x_to_float((u16)(pair >> 16)) * up;
        const float sum = fmaf(a, up, b), difference = fmaf(a, up, -b);
        whole += sum;
        const float c = X_BF16 ? 0.f : shift_of(sum, difference);
        sum_of_c += c;
        first[k] = half_pair(c - sum, c + difference);
        second[k] = half_pair(c - difference, c + sum);
      }
      char* const here = to + (h * 2 + m) * 512;
      *(uint2*)(here + ((2 * u) ^ mix) * 16) = make_uint2(first[0], first[1]);
      *(uint2*)(here + ((2 * u + 1) ^ mix) * 16) = make_uint2(second[0], second[1]);
    }
    whole += __shfl_xor_sync(~0u, whole, 1);
    sum_of_c += __shfl_xor_sync(~0u, sum_of_c, 1);
    whole += __shfl_xor_sync(~0u, whole, 2);
    sum_of_c += __shfl_xor_sync(~0u, sum_of_c, 2);
    // Of tokens 2 t and 2 t + 1 side by side: sums of c, sums of x.
    float* const sums_of = (float*)(x + 4096) + (g >> 1) * 4 + (g & 1);
    if (t == 0) {
      sums_of[0] = -sum_of_c;
      sums_of[2] = whole;
    }
  };
  {   // the range of every token, and the first panel
    const int pieces = block_slices * PARTS, here = block_slices / PANELS * PARTS;
    u32 kept[KEPT][16], w[16];
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) load_piece(block_begin, warp + i * WARPS, kept[i]);
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) find_largest(warp + i * WARPS, kept[i]);
#pragma unroll 1
    for (int piece = warp + KEPT * WARPS; piece < pieces; piece += WARPS) {
      load_piece(block_begin, piece, w);
      find_largest(piece, w);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < here) store_piece(x_at, warp + i * WARPS, kept[i]);
#pragma unroll 1
    for (int piece = warp + KEPT * WARPS; piece < here; piece += WARPS) {
      load_piece(block_begin, piece, w);
      store_piece(x_at, piece, w);
    }
    __syncthreads();
  }

  const int pitch = row_warps * UNIT_ROWS + 4;
  const u32 zero = p.tokens >> 30;   // which the compiler does not know
  u32 last = ring_begin + (STAGES - 1) * STAGE_BYTES;   // the stage that has been used
  const char* at = ring;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    float sum[COUPLES][TILES][SUMS];
#pragma unroll
    for (int h = 0; h < COUPLES; h++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < SUMS; j++) sum[h][i][j] = 0.f;
#pragma unroll 1
    for (int panel = 0; panel < PANELS; panel++) {
      const int buffer = PANELS > 1 ? pass * PANELS + panel & 1 : 0;
      int begin, count;
      slices_of(panel, begin, count);
      begin -= block_slices * panel / PANELS;   // of the panel
      const char* x = x_at + buffer * p.x_bytes + begin * X_BYTES;
      if (pass >= own_passes) count = 0;
      // While this panel is multiplied, each warp in its turn prepares a share of the next.
      bool due = PANELS > 1 && (panel + 1 < PANELS || pass + 1 < passes);
      auto prepare_next = [&] {
        const int next = panel + 1 < PANELS ? panel + 1 : 0, first = block_slices * next / PANELS;
        const int pieces = (block_slices * (next + 1) / PANELS - first) * PARTS;
        u32 w[16];
#pragma unroll 1
        for (int piece = warp; piece < pieces; piece += WARPS) {
          load_piece(block_begin + first, piece, w);
          store_piece(x_at + (buffer ^ 1) * p.x_bytes, piece, w);
        }
        due = false;
      };
      const int turn = count * (warp >> 2) / ((WARPS + 3) >> 2);
#pragma unroll 1
      for (int n = 0; n < count; n++) {
        if (PANELS > 1 && due && n >= turn) prepare_next();
        wait_copies<STAGES - 2>();
        __syncwarp();
        fetch(last);
        // Operands of a slice stay in registers if one part of the tokens is all.
        const char* const operands = x + ((lane ^ (lane >> 3)) << 4);
        uint4 held[8];
        if (PARTS == 1)
#pragma unroll
          for (int k = 0; k < 8; k++) held[k] = *(const uint4*)(operands + k * 512);
#pragma unroll
        for (int first = 0; first < TILES; first += GROUP_TILES) {
          // Words of planes 2 q and 2 q + 1 by turns of two bits: of inputs 0, 1, 4, 5, ..., and of the others.
          u32 words[COUPLES][GROUP_TILES][2][2], alphas[COUPLES][GROUP_TILES][4];
          float2 offset[GROUP_TILES], all[GROUP_TILES];   // of the levels; sum of the alphas
#pragma unroll
          for (int i = 0; i < GROUP_TILES; i++) {
            const char* tile = at + (first + i) * TILE_BYTES;
            const u32* pairs = (const u32*)(tile + SLICE_BYTES) + g * SLOTS;
            offset[i] = halves(pairs[BITS]);
            all[i] = make_float2(0.f, 0.f);
#pragma unroll
            for (int q = 0; q < COUPLES; q++) {
              const uint2 a = *(const uint2*)(tile + q * 512 + lane * 8);
              uint2 b = make_uint2(0, 0);
              const u32 alpha = pairs[2 * q];
              u32 other = zero;
              const float2 one = halves(alpha);
              all[i].x += one.x;
              all[i].y += one.y;
              if (2 * q + 1 < BITS) {
                b = *(const uint2*)(tile + q * 512 + 256 + lane * 8);
                other = pairs[2 * q + 1];
                const float2 two = halves(other);
                all[i].x += two.x;
                all[i].y += two.y;
              }
              const u32 even0 = choose_bits(0x33333333u, a.x, b.x << 2), even1 = choose_bits(0x33333333u, a.y, b.y << 2);
              const u32 odd0 = choose_bits(0x33333333u, a.x >> 2, b.x), odd1 = choose_bits(0x33333333u, a.y >> 2, b.y);
              words[q][i][0][0] = __byte_perm(even0, even1, 0x5410);   // inputs 0 to 15 of both rows
              words[q][i][0][1] = __byte_perm(odd0, odd1, 0x5410);
              words[q][i][1][0] = __byte_perm(even0, even1, 0x7632);
              words[q][i][1][1] = __byte_perm(odd0, odd1, 0x7632);
              // The product reads four registers side by side. Made in two ways they are four for the compiler,
              // too, which else copies two of them for every product.
              alphas[q][i][0] = bytes_of(alpha, other, 0x5410);
              alphas[q][i][1] = bytes_of(alpha, other, 0x7632);
              alphas[q][i][2] = bytes_of(other, alpha, 0x1054);
              alphas[q][i][3] = bytes_of(other, alpha, 0x3276);
            }
          }
#pragma unroll
          for (int k = 0; k < 4; k++)   // 2 h + m
#pragma unroll
            for (int c = 0; c < PARTS; c++) {
              const char* const from = operands + c * PART_BYTES + k * 512;
              const uint4 low = PARTS == 1 ? held[k] : *(const uint4*)from;
              const uint4 high = PARTS == 1 ? held[k + 4] : *(const uint4*)(from + 2048);
#pragma unroll
              for (int q = 0; q < COUPLES; q++)
#pragma unroll
                for (int i = 0; i < GROUP_TILES; i++)
                  multiply_add_sparse<0>(sum[q][first + i] + 4 * c, alphas[q][i], low, words[q][i][k >> 1][k & 1]);
#pragma unroll
              for (int q = 0; q < COUPLES; q++)
#pragma unroll
                for (int i = 0; i < GROUP_TILES; i++)
                  multiply_add_sparse<1>(sum[q][first + i] + 4 * c, alphas[q][i], high, words[q][i][k >> 1][k & 1]);
            }
#pragma unroll
          for (int c = 0; c < PARTS; c++) {
            const float4 of = *(const float4*)(x + c * PART_BYTES + 4096 + t * 16);   // sums of c, and of x
#pragma unroll
            for (int i = 0; i < GROUP_TILES; i++) {
              float* const to = sum[0][first + i] + 4 * c;
              to[0] = fmaf(of.x, all[i].x, fmaf(of.z, offset[i].x, to[0]));
              to[1] = fmaf(of.y, all[i].x, fmaf(of.w, offset[i].x, to[1]));
              to[2] = fmaf(of.x, all[i].y, fmaf(of.z, offset[i].y, to[2]));
              to[3] = fmaf(of.y, all[i].y, fmaf(of.w, offset[i].y, to[3]));
            }
          }
        }
        x += X_BYTES;
        last = shared_address(at);
        at += STAGE_BYTES;
        if (at == ring + STAGES * STAGE_BYTES) at = ring;
      }
      if (PANELS > 1) {
        if (due) prepare_next();
        __syncthreads();
      }
    }

#pragma unroll
    for (int h = 1; h < COUPLES; h++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < SUMS; j++) sum[0][i][j] += sum[h][i][j];
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
        const float down = __uint_as_float((u32)(exponent_of(token) - 7) << 23);
        const float down_next = __uint_as_float((u32)(exponent_of(token + 1) - 7) << 23);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          float* at = sums + (k_warp * SUM_TOKENS + column) * pitch + row_warp * UNIT_ROWS + i * 16 + g;
          const float* from = sum[0][i] + first / 2 + 4 * c;
          at[0] = from[0] * down;
          at[pitch] = from[1] * down_next;
          at[8] = from[2] * down;
          at[pitch + 8] = from[3] * down_next;
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
