// y = x W^T for up to 8 tokens by sparse products (mma.sp) in which no weight bit is unpacked: free levels of
// 2 to 4 bits, groups of 128 and more, scales in half.
//
// A sparse product of 16 rows by 32 inputs takes 16 numbers of a row, two for every four inputs, and for each
// number the place of its input among the four, as two bits of metadata. Here the numbers are the alphas of two
// planes, the four places are what two inputs a and b add up to by their signs, -a-b, a-b, -a+b and a+b, and the
// places that the numbers pick are the two bits of the planes for these inputs. So the metadata of 16 rows are
// words of the planes, interleaved by two bits, a product multiplies 16 inputs with two planes at once, and the
// sums stay in the accumulators from the first input to the last, whatever the group.
//
// In half a+b is not exact. So the four places of each pair of inputs are moved by a number, chosen so that they are
// rounded by little (`shift_of`). What that adds, c, the mean of the four, is summed up over a slice; dense products
// of four slices at a time take off that sum times the alphas and add the offsets of the levels times the sums of
// x. Both sums are two halves each. The error is that of the places: on random inputs 1.1 times that of rounding
// the result, 1.5 times at most, where a single input outweighs all others.
//
// The blocks of a cluster split the inputs. A block keeps its inputs of all tokens, as operands, in shared memory,
// or one of PANELS parts of them and the next, and walks over its rows: each warp has units of TILES x 16 rows,
// whose planes it streams through a ring of its own (cp.async), and no warp waits for another until its panel is
// done; k_warps warps may share a unit. One lane in four puts the scales of a slice in order, for four slices at a
// time. At the end the sums of the block's warps and of the cluster's blocks meet in shared memory and are added in
// order: two runs give the same bits.
//
// Each block brings a token into range by a power of two, 2^7 to 2^8 for its largest |x|.
//
// -D: TILES 1|2|4, WARPS, STAGES (slices in a warp's ring), PANELS. Grid: cluster size * clusters;
// dynamic shared memory: see `sparse_sizes` in sparse_plans.py.

#include "hopper.cuh"
#include "places.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const u16* x;            // [tokens][in_features], rows x_stride apart
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;   // tokens <= 8
  int tiles, items, groups;        // groups stored per row
  int items_per_group;             // 1 unless GROUP == 256
  int k_warps;                     // warps that share a unit; divides WARPS
  int x_bytes;                     // in shared memory, of a panel
  int sums_offset;                 // in bytes, of the sums in shared memory
};

constexpr int THREADS = WARPS * 32;
constexpr int UNIT_ROWS = TILES * 16;
constexpr int STAGE_BYTES = TILES * SLICE_BYTES;
constexpr int COUPLES = (BITS + 1) / 2;               // of planes
constexpr int X_BYTES = 8 * 512 + 8 * 16 + 32;        // of a slice: operands, sums, a shift of banks
constexpr int ALPHA_BYTES = 4 * 8 * 16;               // of a tile's couple of planes: four slices
constexpr int GROUP_TILES = COUPLES * TILES > 4 ? 4 / COUPLES : TILES;   // whose words are in registers at a time
constexpr int FOLDS = COUPLES * GROUP_TILES < 4 ? 2 : 1;   // of a sum, as a product waits for the one before it
// Pieces of x that a warp reads at once.
constexpr int KEPT = WARPS > 12 || (BITS == 4 && TILES == 4 && PANELS == 1) ? 2 : 4;

DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void copy16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}
DEVICE u32 larger_pair(u32 a, u32 b) { u32 d; asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }

DEVICE u32 add_halves(u32 a, u32 b) { u32 d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }

// 16 rows by 16 numbers of each, whose places are in the words of lanes 0 and 1 of every four (PLACES_OF 0), or of
// 2 and 3. The numbers of a row are the same two in turn: a[0] and a[2] of rows g, a[1] and a[3] of rows g + 8.
template <int PLACES_OF> DEVICE void multiply_add_sparse(float* d, const u32 (&a)[4], const uint4& x, u32 places) {
  asm volatile("mma.sp.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(places), "n"(PLACES_OF));
}
DEVICE void multiply_add(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_add(float* d, u32 a0, u32 a1, u32 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
}
DEVICE u32 choose_bits(u32 mask, u32 a, u32 b) {   // a where the mask is 1, b elsewhere
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// Slots of the scales of rows g and g + 8, fetched ahead.
struct Scales {
  u32 pairs[SLOTS];

  DEVICE void fetch(const char* scales, long long at) {   // (tile * groups + group) * 8 + g
    const u32* const from = (const u32*)scales + at * SLOTS;
    if (SLOTS == 4) {
      const uint4 v = __ldg((const uint4*)from);
      pairs[0] = v.x; pairs[1] = v.y; pairs[2] = v.z; pairs[SLOTS - 1] = v.w;
    } else {
#pragma unroll
      for (int q = 0; q < SLOTS; q++) pairs[q] = __ldg(from + q);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sparse_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // rings, x, sums
  __shared__ u32 largest_of[8];
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
  char* const alphas = shared + WARPS * STAGES * STAGE_BYTES + warp * (TILES * COUPLES * ALPHA_BYTES);
  char* const x_at = shared + WARPS * (STAGES * STAGE_BYTES + TILES * COUPLES * ALPHA_BYTES);
  float* sums = (float*)(shared + p.sums_offset);
  if (threadIdx.x < 8) largest_of[threadIdx.x] = 0;
  let_next_kernel_start();

  // Half a warp copies the planes of a tile's slice.
  constexpr int COPIERS = TILES == 1 ? 1 : TILES / 2, LANES = TILES == 1 ? 32 : 16;
  const int copier = lane & (LANES - 1);
  const char* planes_from[COPIERS];
  int fetch_left = 0, fetch_panel = 0, fetch_unit = first_unit, panel_left = 0;
  for (int panel = 0, begin, count; panel < PANELS; panel++) {
    slices_of(panel, begin, count);
    fetch_left += own_passes * count;
  }
  const u32 lane_offset = (TILES == 1 ? 0 : lane >> 4) * SLICE_BYTES + copier * 16;
  auto fetch = [&](u32 stage) {
    if (fetch_left > 0) {
      while (panel_left == 0) {
        int begin;
        slices_of(fetch_panel, begin, panel_left);
#pragma unroll
        for (int i = 0; i < COPIERS; i++) {
          const int tile = min(fetch_unit * TILES + i * 2 + (TILES == 1 ? 0 : lane >> 4), p.tiles - 1);
          planes_from[i] = p.planes + ((long long)tile * slices + block_begin + begin) * SLICE_BYTES + copier * 16;
        }
        if (++fetch_panel == PANELS) { fetch_panel = 0; fetch_unit += pass_units; }
      }
      const u32 lane_at = stage + lane_offset;
#pragma unroll
      for (int i = 0; i < COPIERS; i++) {
        const u32 to = lane_at + i * 2 * SLICE_BYTES;
#pragma unroll
        for (int c = 0; c < BITS * 16 / LANES; c++) copy16(to + c * LANES * 16, planes_from[i] + c * LANES * 16);
        if (BITS * 16 % LANES && copier < BITS * 16 % LANES)
          copy16(to + BITS * 16 / LANES * LANES * 16, planes_from[i] + BITS * 16 / LANES * LANES * 16);
        planes_from[i] += SLICE_BYTES;
      }
      fetch_left--;
      panel_left--;
    }
    commit_copies();
  };
  const u32 ring_begin = shared_address(ring);
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) fetch(ring_begin + s * STAGE_BYTES);

  // Scales of the next four slices: lane 4 g + t has those of slice t.
  Scales source[TILES];
  int fetched = -1;   // the first of them, and the pass
  auto fetch_scales = [&](int pass, int begin, int count) {   // slices, from the block's first
    const int slice = block_begin + begin + min(t, count - 1);
    const int group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const int tile = min((first_unit + pass * pass_units) * TILES + i, p.tiles - 1);
      source[i].fetch(p.scales, ((long long)tile * p.groups + group) * 8 + g);
    }
    fetched = pass * slices + begin;
  };

  if (own_passes > 0) {
    int begin, count;
    slices_of(0, begin, count);
    if (count > 0) fetch_scales(0, begin, count);
  }

  // x: a piece is 8 tokens of a slice; lane 4 g + t takes 32 inputs of token g.
  __syncthreads();
  wait_for_previous_kernel();
  const bool wide = (((u64)p.x | (u64)p.x_stride * 2) & 15) == 0;
  auto load_piece = [&](int first_slice, int piece, u32 (&w)[16]) {
    const int token = g, k = (first_slice + piece) * 128 + 32 * t;
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
  auto find_largest = [&](const u32 (&w)[16]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 16; i++) most = larger_pair(most, w[i] & 0x7FFF7FFFu);
    most = max(most & 0xFFFFu, most >> 16);
    most = max(most, __shfl_xor_sync(~0u, most, 1));
    most = max(most, __shfl_xor_sync(~0u, most, 2));
    if (t == 0) atomicMax(largest_of + g, most);
  };
  auto exponent_of = [&](int token) {   // of the largest; very small or large ones cannot be brought into range
    return min(max((int)(__float_as_uint(x_to_float((u16)largest_of[token])) >> 23), 16), 254);
  };
  // A product (f, h, m) has inputs 64 f + 16 h + 2 m and the next, and 4, 8, 12, 32, 36, 40 and 44 more: eight
  // pairs, of which lanes 2 u and 2 u + 1 of a token have those at 4 u, 8 + 4 u, 32 + 4 u and 40 + 4 u, the first
  // lane the places of -b. Chunks of 16 bytes are so permuted that writing meets no bank twice.
  const int mix = g >> 1;
  auto store_piece = [&](char* panel, int piece, const u32 (&w)[16]) {   // a piece of a panel
    const float up = __uint_as_float((u32)(254 + 7 - exponent_of(g)) << 23);
    char* const x = panel + piece * X_BYTES;
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
        first[k] = half_pair(c - sum, c + difference);
        second[k] = half_pair(c - difference, c + sum);
        if (!X_BF16) {   // four times the mean of the places; the sums are halves
          const u32 both = add_halves(first[k], __byte_perm(second[k], 0, 0x1032));
          sum_of_c += half_to_float((u16)both) + half_to_float((u16)(both >> 16));
        }
      }
      char* const here = to + (h * 2 + m) * 512;
      *(uint2*)(here + ((2 * u) ^ mix) * 16) = make_uint2(first[0], first[1]);
      *(uint2*)(here + ((2 * u + 1) ^ mix) * 16) = make_uint2(second[0], second[1]);
    }
    whole += __shfl_xor_sync(~0u, whole, 1);
    sum_of_c += __shfl_xor_sync(~0u, sum_of_c, 1);
    whole += __shfl_xor_sync(~0u, whole, 2);
    sum_of_c += __shfl_xor_sync(~0u, sum_of_c, 2);
    sum_of_c *= 0.25f;
    // -c twice, its rest twice, and beside the third plane or for itself x: its sum, and the rest of that.
    if (t == 0) {
      const u32 c = half_pair(-sum_of_c, -sum_of_c), x_sum = half_pair(whole, whole);
      const float c_rest = -sum_of_c - half_to_float((u16)c), x_rest = whole - half_to_float((u16)x_sum);
      const u32 rest = half_pair(c_rest, c_rest);
      *(uint4*)(x + 4096 + g * 16) = BITS == 3
          ? make_uint4(c, rest, half_pair(-sum_of_c, whole), half_pair(c_rest, x_rest))
          : make_uint4(c, rest, half_pair(half_to_float((u16)x_sum), x_rest), 0);
    }
  };
  {   // the range of every token, and the first panel
    const int pieces = block_slices, here = block_slices / PANELS;
    u32 kept[KEPT][16], w[16];
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) load_piece(block_begin, warp + i * WARPS, kept[i]);
#pragma unroll
    for (int i = 0; i < KEPT; i++)
      if (warp + i * WARPS < pieces) find_largest(kept[i]);
#pragma unroll 1
    for (int piece = warp + KEPT * WARPS; piece < pieces; piece += WARPS) {
      load_piece(block_begin, piece, w);
      find_largest(w);
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
  u32 last = ring_begin + (STAGES - 1) * STAGE_BYTES;   // the stage that has been used
  const char* at = ring;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
    float sum[FOLDS][COUPLES][TILES][4];
#pragma unroll
    for (int f = 0; f < FOLDS; f++)
#pragma unroll
      for (int q = 0; q < COUPLES; q++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) sum[f][q][i][j] = 0.f;
#pragma unroll 1
    for (int panel = 0; panel < PANELS; panel++) {
      const int buffer = PANELS > 1 ? pass * PANELS + panel & 1 : 0;
      int begin, count;
      slices_of(panel, begin, count);
      const char* x = x_at + buffer * p.x_bytes + (begin - block_slices * panel / PANELS) * X_BYTES;
      if (pass >= own_passes) count = 0;
      if (count > 0 && fetched != pass * slices + begin) fetch_scales(pass, begin, count);
      // While this panel is multiplied, each warp in its turn prepares a share of the next.
      bool due = PANELS > 1 && (panel + 1 < PANELS || pass + 1 < passes);
      auto prepare_next = [&] {
        const int next = panel + 1 < PANELS ? panel + 1 : 0, first = block_slices * next / PANELS;
        const int pieces = block_slices * (next + 1) / PANELS - first;
        u32 w[16];
#pragma unroll 1
        for (int piece = warp; piece < pieces; piece += WARPS) {
          load_piece(block_begin + first, piece, w);
          store_piece(x_at + (buffer ^ 1) * p.x_bytes, piece, w);
        }
        due = false;
      };
      int follow = -1, follow_count = 0, follow_pass = pass;   // slices after this panel's
      if (panel + 1 < PANELS) slices_of(panel + 1, follow, follow_count);
      else if (pass + 1 < own_passes) { slices_of(0, follow, follow_count); follow_pass++; }
      if (follow_count == 0) follow = -1;
      const int turn = count * (warp >> 2) / ((WARPS + 3) >> 2);
#pragma unroll 1
      for (int n = 0; n < count; n++) {
        if (PANELS > 1 && due && n >= turn) prepare_next();
        wait_copies<STAGES - 2>();
        __syncwarp();
        fetch(last);
        if ((n & 3) == 0) {
          uint4 of = make_uint4(0, 0, 0, 0);   // token g, slice t: sums
          if (n + t < count) of = *(const uint4*)(x + t * X_BYTES + 4096 + g * 16);
          char* const to = alphas + t * 128 + (g ^ 2 * t) * 16;
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            const u32 (&s)[SLOTS] = source[i].pairs;
            // The alphas of two planes side by side, of rows g and g + 8; of planes 1 and 2, and of 3 and 4.
            u32 a[4] = {__byte_perm(s[0], s[1], 0x5410), __byte_perm(s[0], s[1], 0x7632), 0, 0};
            *(uint4*)(to + i * COUPLES * ALPHA_BYTES) = make_uint4(a[0], a[1], a[0], a[1]);
            const u32 low = __byte_perm(s[BITS], 0, 0x1010), high = __byte_perm(s[BITS], 0, 0x3232);   // offsets
            if (BITS == 2) {
              a[2] = low;
              a[3] = high;
            } else if (BITS == 3) {
              const u32 third = s[2] & 0xFFFFu, lower = s[2] >> 16;
              *(uint4*)(to + i * COUPLES * ALPHA_BYTES + ALPHA_BYTES) = make_uint4(third, lower, third, lower);
              a[2] = __byte_perm(s[2], s[3], 0x5410);
              a[3] = __byte_perm(s[2], s[3], 0x7632);
            } else {
              a[2] = __byte_perm(s[2], s[BITS - 1], 0x5410);
              a[3] = __byte_perm(s[2], s[BITS - 1], 0x7632);
              *(uint4*)(to + i * COUPLES * ALPHA_BYTES + ALPHA_BYTES) = make_uint4(a[2], a[3], a[2], a[3]);
            }
            if (BITS == 4) {
              multiply_add(sum[0][0][i], a, of.x, of.x);
              multiply_add(sum[FOLDS - 1][COUPLES - 1][i], a, of.y, of.y);
              multiply_add(sum[0][0][i], low, high, of.z);
            } else {
              multiply_add(sum[0][0][i], a, of.x, of.z);
              multiply_add(sum[FOLDS - 1][COUPLES - 1][i], a, of.y, of.w);
            }
          }
          __syncwarp();
          if (n + 4 < count) fetch_scales(pass, begin + n + 4, count - n - 4);
          else if (follow >= 0) fetch_scales(follow_pass, follow, follow_count);
        }
        const char* const operands = x + ((lane ^ (lane >> 3)) << 4);
        const char* const alphas_at = alphas + (n & 3) * 128 + (g ^ 2 * (n & 3)) * 16;
        uint4 held[8];
#pragma unroll
        for (int k = 0; k < 8; k++) held[k] = *(const uint4*)(operands + k * 512);
#pragma unroll
        for (int first = 0; first < TILES; first += GROUP_TILES) {
          // Words of planes 2 q and 2 q + 1 by turns of two bits: of inputs 0, 1, 4, 5, ..., and of the others.
          u32 words[COUPLES][GROUP_TILES][4], numbers[COUPLES][GROUP_TILES][4];
#pragma unroll
          for (int i = 0; i < GROUP_TILES; i++)
#pragma unroll
            for (int q = 0; q < COUPLES; q++) {
              const char* const plane = at + (first + i) * SLICE_BYTES + q * 512 + lane * 8;
              const uint2 a = *(const uint2*)plane;
              const u32 a0 = __byte_perm(a.x, a.y, 0x5410), a1 = __byte_perm(a.x, a.y, 0x7632);   // of both rows
              if (2 * q + 1 < BITS) {
                const uint2 b = *(const uint2*)(plane + 256);
                const u32 b0 = __byte_perm(b.x, b.y, 0x5410), b1 = __byte_perm(b.x, b.y, 0x7632);
                words[q][i][0] = choose_bits(0x33333333u, a0, b0 << 2);
                words[q][i][1] = choose_bits(0x33333333u, a0 >> 2, b0);
                words[q][i][2] = choose_bits(0x33333333u, a1, b1 << 2);
                words[q][i][3] = choose_bits(0x33333333u, a1 >> 2, b1);
              } else {   // the second number is 0, wherever its place
                words[q][i][0] = a0;
                words[q][i][1] = a0 >> 2;
                words[q][i][2] = a1;
                words[q][i][3] = a1 >> 2;
              }
              const uint4 v = *(const uint4*)(alphas_at + ((first + i) * COUPLES + q) * ALPHA_BYTES);
              numbers[q][i][0] = v.x; numbers[q][i][1] = v.y; numbers[q][i][2] = v.z; numbers[q][i][3] = v.w;
            }
#pragma unroll
          for (int k = 0; k < 4; k++) {   // 2 h + m
#pragma unroll
            for (int q = 0; q < COUPLES; q++)
#pragma unroll
              for (int i = 0; i < GROUP_TILES; i++)
                multiply_add_sparse<0>(sum[0][q][first + i], numbers[q][i], held[k], words[q][i][k]);
#pragma unroll
            for (int q = 0; q < COUPLES; q++)
#pragma unroll
              for (int i = 0; i < GROUP_TILES; i++)
                multiply_add_sparse<1>(sum[FOLDS - 1][q][first + i], numbers[q][i], held[k + 4], words[q][i][k]);
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
    for (int k = 1; k < FOLDS * COUPLES; k++)
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[0][0][i][j] += sum[k / COUPLES][k % COUPLES][i][j];
    const int quads = row_warps * (UNIT_ROWS / 4);
    const int first_row = (pass * clusters + cluster) * row_warps * UNIT_ROWS;
    if (pass) cluster_wait();   // the sums before have been read
    else __syncthreads();       // the sums may lie where x was
    {
      const float down = __uint_as_float((u32)(exponent_of(2 * t) - 7) << 23);
      const float down_next = __uint_as_float((u32)(exponent_of(2 * t + 1) - 7) << 23);
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        float* const to = sums + (k_warp * 8 + 2 * t) * pitch + row_warp * UNIT_ROWS + i * 16 + g;
        const float (&from)[4] = sum[0][0][i];
        to[0] = from[0] * down;
        to[pitch] = from[1] * down_next;
        to[8] = from[2] * down;
        to[pitch + 8] = from[3] * down_next;
      }
    }
    cluster_arrive();
    cluster_wait();
    // Each block of the cluster finishes a share of the sums.
    for (int o = part * THREADS + threadIdx.x; o < p.tokens * quads; o += parts * THREADS) {
      const int token = o / quads, row = o % quads * 4, y_row = first_row + row;
      const u32 at = shared_address(sums + token * pitch + row);
      float4 whole = make_float4(0.f, 0.f, 0.f, 0.f);
      for (int r = 0; r < parts; r++)
        for (int k = 0; k < p.k_warps; k++) {
          const float4 v = load_cluster(at + k * (8 * 4) * pitch, r);
          whole.x += v.x; whole.y += v.y; whole.z += v.z; whole.w += v.w;
        }
      const float values[4] = {whole.x, whole.y, whole.z, whole.w};
      u16 out[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float bias = p.bias && y_row + i < p.rows ? x_to_float(p.bias[y_row + i]) : 0.f;
        out[i] = float_to_x(values[i] + bias);
      }
      u16* y = p.y + token * p.y_stride + y_row;
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
  cluster_wait();   // no block leaves while another reads its sums
}
