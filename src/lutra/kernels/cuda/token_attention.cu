// One new token per sequence against the cache, on tensor cores.
//
//   qkv     [batch][(heads + 2 kv_heads) * HEAD_DIM]   queries, keys, values of the new token
//   keys    [batch][kv_heads][capacity][HEAD_DIM]      and values: the cache; row `position` is written
//
// The QUERIES heads that share a key head are the columns of two products, 16 positions at a time:
// scores = K q^T and y^T = V^T weights^T (FlashAttention's running maximum and sum between them,
// https://arxiv.org/abs/2205.14135). A warp has every parts * WARPS-th tile of 16 positions, in
// registers, straight from the cache: the order of channels within a product of q and k, and that of
// positions within one of weights and v, is free, so each lane loads 16 bytes of a row. Lane = 4 g + t:
//
//   k, q   channels 32 c + 8 t .. + 7 of the rows g and g + 8, of query g     operands A and B of m16n8k16
//   v      channels 64 h + 8 g .. + 7 of the rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9; pairs of rows are A
//
// The weights of a tile become the operand B by a transposition within the warp.
//
// The blocks of a cluster have the parts of one key head. Each warp sends its sums to the shared memory
// of the blocks, of which each adds up some channels in the order of the warps, so results do not
// depend on timing. Grid: (parts, kv_heads, batch), clusters of all parts, 1, 2, 4 or 8.
// Block: WARPS * 32 threads.
//
// The older rows of the cache are read before the kernel ahead has ended: they were written before the
// last launch that waits for everything, at the latest the lookup of the embedding. Which rows a warp
// reads first does not depend on the position, so that it waits for nothing.
//
// Compile-time parameters: HEAD_DIM 64|128|256, QUERIES (heads that share a key head, at most 16, or 8
// with 256 channels), WARPS, ROTARY 0|1, HEAD_NORM 0|1.

#include "token.cuh"

struct AttentionArguments {
  const u16* qkv;
  const u16* cosine;      // [batch or 1][HEAD_DIM]
  const u16* sine;
  const u16* query_norm;  // [HEAD_DIM]
  const u16* key_norm;
  u16* keys;
  u16* values;
  const long long* position;
  const int* start;       // first position of each sequence; what is before is padding
  u16* y;                 // [batch][heads * HEAD_DIM]
  int rotary_stride;
  int kv_heads, capacity;
  float scale, epsilon;
};

constexpr int CHUNKS = HEAD_DIM / 32, HALVES = HEAD_DIM / 64, TILE = 16;
constexpr int EIGHTS = (QUERIES + 7) / 8;     // products of eight queries
constexpr int MOST_PARTS = 8;
constexpr bool AHEAD = HEAD_DIM * EIGHTS <= 128;   // registers hold values beside keys
// Blocks on a processor, at least: they bound the registers of a thread.
constexpr int BLOCKS = !AHEAD || WARPS > 6 ? 1 : WARPS > 4 ? (HEAD_NORM ? 1 : 2) : (HEAD_NORM ? 2 : 3);
constexpr float NOTHING = -1e30f;

union Four { uint4 vector; u32 words[4]; u16 values[8]; };

DEVICE float power_of_two(float f) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(f)); return y; }

// d += a b: 16 rows, 8 columns, 16 summands.
DEVICE void add_product(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if X_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// An 8 x 8 matrix, of which lane 4 g + t has columns 2 t and 2 t + 1 of row g, transposed.
DEVICE u32 transposed(u32 pair) {
  u32 out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}
DEVICE u32 pair_of(float low, float high) { return (u32)float_to_x(low) | (u32)float_to_x(high) << 16; }

// The lane's channels of a head of the new token, normed and turned as transformers does it.
DEVICE void head_values(const AttentionArguments& p, const u16* head, const u16* weight, int t,
                        int batch, Four (&own)[CHUNKS]) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) own[c].vector = *(const uint4*)(head + 32 * c + 8 * t);
  if (HEAD_NORM) {
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int j = 0; j < 8; j++) squares += x_to_float(own[c].values[j]) * x_to_float(own[c].values[j]);
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    const float scale = rsqrtf(squares / HEAD_DIM + p.epsilon);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      Four w;
      w.vector = *(const uint4*)(weight + 32 * c + 8 * t);
#pragma unroll
      for (int j = 0; j < 8; j++)
        own[c].values[j] =
            float_to_x(x_to_float(w.values[j]) * rounded(x_to_float(own[c].values[j]) * scale));
    }
  }
  if (ROTARY) {
    const long long row = (long long)batch * p.rotary_stride + 8 * t;
#pragma unroll
    for (int c = 0; c < CHUNKS / 2; c++) {
      constexpr int OTHER = CHUNKS / 2;
      Four cosine[2], sine[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        cosine[h].vector = *(const uint4*)(p.cosine + row + 32 * (c + h * OTHER));
        sine[h].vector = *(const uint4*)(p.sine + row + 32 * (c + h * OTHER));
      }
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float a = x_to_float(own[c].values[j]), b = x_to_float(own[c + OTHER].values[j]);
        own[c].values[j] = float_to_x(rounded(a * x_to_float(cosine[0].values[j])) +
                                      rounded(-b * x_to_float(sine[0].values[j])));
        own[c + OTHER].values[j] = float_to_x(rounded(b * x_to_float(cosine[1].values[j])) +
                                              rounded(a * x_to_float(sine[1].values[j])));
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
token_attention(const __grid_constant__ AttentionArguments p) {
  __shared__ __align__(16) float received[WARPS * QUERIES * HEAD_DIM];   // [warp of the cluster][channel]
  __shared__ __align__(16) float marks[MOST_PARTS * WARPS][EIGHTS * 8][2];   // maximum, sum of weights
  __shared__ __align__(16) u16 fresh[HEAD_DIM];   // key of the new token, for the warp that needs it
  const int split = blockIdx.x, parts = gridDim.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int source = split * WARPS + (threadIdx.x >> 5), sources = parts * WARPS;
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const long long cache = ((long long)batch * p.kv_heads + kv_head) * p.capacity * HEAD_DIM;
  u16* keys = p.keys + cache;
  u16* values = p.values + cache;
  const int heads = p.kv_heads * QUERIES;
  const u16* token = p.qkv + (long long)batch * (heads + 2 * p.kv_heads) * HEAD_DIM;
  let_next_kernel_start();
  if (parts > 1) arrive_at_cluster();   // memory of a block may be written once it runs

  Four k[2][CHUNKS], v[4][HALVES];
  const auto v_row = [&](int r) { return 2 * t + (r & 1) + 8 * (r >> 1); };
  const auto fetch_keys = [&](int tile) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = min(tile * TILE + g + 8 * r, p.capacity - 1);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
        k[r][c].vector = *(const uint4*)(keys + (long long)row * HEAD_DIM + 32 * c + 8 * t);
    }
  };
  const auto fetch_values = [&](int tile) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const int row = min(tile * TILE + v_row(r), p.capacity - 1);
#pragma unroll
      for (int h = 0; h < HALVES; h++)
        v[r][h].vector = *(const uint4*)(values + (long long)row * HEAD_DIM + 64 * h + 8 * g);
    }
  };
  fetch_keys(source);
  if (AHEAD) fetch_values(source);
  const int position = (int)*p.position, first = p.start[batch], newest = position / TILE;
  wait_for_previous_kernel();

  Four q[EIGHTS][CHUNKS];
#pragma unroll
  for (int e = 0; e < EIGHTS; e++) {
    const int query = 8 * e + g;
    head_values(p, token + (kv_head * QUERIES + min(query, QUERIES - 1)) * HEAD_DIM, p.query_norm, t,
                batch, q[e]);
    if (query >= QUERIES)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) q[e][c].vector = make_uint4(0, 0, 0, 0);
  }
  float sums[EIGHTS][HALVES * 4][4], largest[EIGHTS][2], total[EIGHTS][2];
#pragma unroll
  for (int e = 0; e < EIGHTS; e++) {
    largest[e][0] = largest[e][1] = NOTHING;
    total[e][0] = total[e][1] = 0.f;
#pragma unroll
    for (int m = 0; m < HALVES * 4; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[e][m][i] = 0.f;
  }
  if (newest % sources == source) {   // this warp's tile has the new token
    Four turned[CHUNKS];
    head_values(p, token + (heads + kv_head) * HEAD_DIM, p.key_norm, t, batch, turned);
    if (g == 0)
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        *(uint4*)(fresh + 32 * c + 8 * t) = turned[c].vector;
        *(uint4*)(keys + (long long)position * HEAD_DIM + 32 * c + 8 * t) = turned[c].vector;
      }
    __syncwarp();
  }
  const float scale = p.scale * 1.44269504f;   // weights are powers of two

  for (int tile = source; tile <= newest; tile += sources) {
    const int at = tile * TILE;
    if (tile == newest)   // has the new token, and rows behind it
#pragma unroll
      for (int r = 0; r < 2; r++)
        if (at + g + 8 * r == position)
#pragma unroll
          for (int c = 0; c < CHUNKS; c++) k[r][c].vector = *(const uint4*)(fresh + 32 * c + 8 * t);

    u32 weights[EIGHTS][2];
    const bool counts[2] = {at + g >= first && at + g <= position,
                            at + g + 8 >= first && at + g + 8 <= position};
#pragma unroll
    for (int e = 0; e < EIGHTS; e++) {
      float even[4] = {0.f, 0.f, 0.f, 0.f}, odd[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        add_product(even, k[0][c].words[0], k[1][c].words[0], k[0][c].words[1], k[1][c].words[1],
                    q[e][c].words[0], q[e][c].words[1]);
        add_product(odd, k[0][c].words[2], k[1][c].words[2], k[0][c].words[3], k[1][c].words[3],
                    q[e][c].words[2], q[e][c].words[3]);
      }
      float weight[4];
#pragma unroll
      for (int i = 0; i < 2; i++) {   // queries 2 t and 2 t + 1
        const float low = counts[0] ? (even[i] + odd[i]) * scale : NOTHING;
        const float high = counts[1] ? (even[i + 2] + odd[i + 2]) * scale : NOTHING;
        float top = fmaxf(low, high);
        for (int s = 4; s < 32; s <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
        top = fmaxf(top, largest[e][i]);
        const float keep = power_of_two(largest[e][i] - top);
        largest[e][i] = top;
        weight[i] = counts[0] ? power_of_two(low - top) : 0.f;
        weight[i + 2] = counts[1] ? power_of_two(high - top) : 0.f;
        total[e][i] = total[e][i] * keep + weight[i] + weight[i + 2];
#pragma unroll
        for (int m = 0; m < HALVES * 4; m++) sums[e][m][i] *= keep, sums[e][m][i + 2] *= keep;
      }
      weights[e][0] = transposed(pair_of(weight[0], weight[1]));
      weights[e][1] = transposed(pair_of(weight[2], weight[3]));
    }
    const bool more = tile + sources <= newest;
    if (more) fetch_keys(tile + sources);
    if (!AHEAD) fetch_values(tile);
    if (tile == newest || at < first)   // what is in rows that do not count may be no number
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = at + v_row(r);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          if (row > position || row < first) v[r][h].vector = make_uint4(0, 0, 0, 0);
          if (row == position) {
            v[r][h].vector =
                *(const uint4*)(token + (heads + p.kv_heads + kv_head) * HEAD_DIM + 64 * h + 8 * g);
            *(uint4*)(values + (long long)position * HEAD_DIM + 64 * h + 8 * g) = v[r][h].vector;
          }
        }
      }
#pragma unroll
    for (int h = 0; h < HALVES; h++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const u32 a = v[0][h].words[i], b = v[1][h].words[i], c = v[2][h].words[i], d = v[3][h].words[i];
        const u32 low[2] = {__byte_perm(a, b, 0x5410), __byte_perm(c, d, 0x5410)};
        const u32 high[2] = {__byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x7632)};
#pragma unroll
        for (int e = 0; e < EIGHTS; e++)
          add_product(sums[e][4 * h + i], low[0], high[0], low[1], high[1], weights[e][0], weights[e][1]);
      }
    if (AHEAD && more) fetch_values(tile + sources);
  }

  // All warps of the cluster: a block adds up `slice` of the channels of all queries.
  const int slice = QUERIES * HEAD_DIM / parts;
  if (parts > 1) wait_for_cluster();
#pragma unroll
  for (int e = 0; e < EIGHTS; e++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int query = 8 * e + 2 * t + i;
      for (int s = 4; s < 32; s <<= 1) total[e][i] += __shfl_xor_sync(~0u, total[e][i], s);
      if (query >= QUERIES) continue;
      for (int block = g; block < parts; block += 8)
        send(address_in(marks[source][query], block), largest[e][i], total[e][i]);
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int channel = query * HEAD_DIM + 64 * h + 8 * g, block = channel / slice;
        const u32 there = address_in(received + source * slice + channel % slice, block);
        const auto& m = sums[e];
        send(there, m[4 * h][i], m[4 * h][i + 2], m[4 * h + 1][i], m[4 * h + 1][i + 2]);
        send(there + 16, m[4 * h + 2][i], m[4 * h + 2][i + 2], m[4 * h + 3][i], m[4 * h + 3][i + 2]);
      }
    }
  __syncwarp();
  if (parts > 1) {
    arrive_at_cluster();
    wait_for_cluster();
  } else {
    __syncthreads();
  }
  u16* y = p.y + ((long long)batch * p.kv_heads + kv_head) * QUERIES * HEAD_DIM + split * slice;
  for (int i = threadIdx.x; i < slice; i += WARPS * 32) {
    const int query = (split * slice + i) / HEAD_DIM;
    float top = NOTHING, all = 0.f, value = 0.f;
    for (int s = 0; s < sources; s++) top = fmaxf(top, marks[s][query][0]);
    for (int s = 0; s < sources; s++) {
      const float keep = power_of_two(marks[s][query][0] - top);
      all += keep * marks[s][query][1];
      value += keep * received[s * slice + i];
    }
    y[i] = float_to_x(value / all);
  }
}
