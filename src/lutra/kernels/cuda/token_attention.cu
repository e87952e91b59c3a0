// One new token per sequence against the cache.
//
//   qkv     [batch][(heads + 2 kv_heads) * HEAD_DIM]   queries, keys, values of the new token
//   keys    [batch][kv_heads][capacity][HEAD_DIM]      and values: the cache; row `position` is written
//
// A block serves the QUERIES heads of one key head for a part of the positions start .. position. The
// blocks of a cluster have the parts of one key head. Each sends its sums to the shared memory of the
// others, of which each adds up some channels in the order of the parts, so results do not depend on
// timing. Grid: (parts, kv_heads, batch), clusters of all parts, 1, 2, 4 or 8. Block: WARPS * 32
// threads; HEAD_DIM / 8 lanes share a row.
//
// The position, the rotary tables and the older rows of the cache are read before the kernel ahead has
// ended: they were written before the last launch that waits for everything, at the latest the lookup
// of the embedding.
//
// Compile-time parameters: HEAD_DIM 64|128|256, QUERIES (heads that share a key head, at most 8),
// WARPS, ROTARY 0|1, HEAD_NORM 0|1.

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

constexpr int LANES = HEAD_DIM / 8, ROWS = 32 / LANES, UNROLL = QUERIES <= 2 ? 8 : 4;
constexpr int STEP = WARPS * ROWS * UNROLL;   // positions that a block has in flight
constexpr int PART = HEAD_DIM + 2;            // sums of values, largest score, sum of weights
constexpr float NOTHING = -1e30f;

DEVICE void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Store to the same shared variable of another block of the cluster.
DEVICE void send(float* mine, int block, float value) {
#if __CUDA_ARCH__ >= 900
  u32 address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(mine)), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" :: "r"(address), "f"(value) : "memory");
#endif
}

// The lane's 8 values of a head of the new token, normed and turned as transformers does it.
DEVICE void head_values(const AttentionArguments& p, const u16* head, const u16* weight, int lane,
                        int batch, float* out) {
  const int d = lane * 8, other = (d + HEAD_DIM / 2) % HEAD_DIM;
  Eight own, turned, w;
  own.words = *(const uint4*)(head + d);
  if (!ROTARY && !HEAD_NORM) {
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = x_to_float(own.values[j]);
    return;
  }
  turned.words = *(const uint4*)(head + other);
  if (HEAD_NORM) {
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) squares += x_to_float(own.values[j]) * x_to_float(own.values[j]);
    for (int s = LANES / 2; s; s >>= 1) squares += __shfl_xor_sync(~0u, squares, s);
    const float scale = rsqrtf(squares / HEAD_DIM + p.epsilon);
    w.words = *(const uint4*)(weight + d);
#pragma unroll
    for (int j = 0; j < 8; j++)
      own.values[j] = float_to_x(x_to_float(w.values[j]) * rounded(x_to_float(own.values[j]) * scale));
    w.words = *(const uint4*)(weight + other);
#pragma unroll
    for (int j = 0; j < 8; j++)
      turned.values[j] =
          float_to_x(x_to_float(w.values[j]) * rounded(x_to_float(turned.values[j]) * scale));
  }
  if (ROTARY) {
    Eight c, s;
    c.words = *(const uint4*)(p.cosine + (long long)batch * p.rotary_stride + d);
    s.words = *(const uint4*)(p.sine + (long long)batch * p.rotary_stride + d);
    const float sign = d < HEAD_DIM / 2 ? -1.f : 1.f;
#pragma unroll
    for (int j = 0; j < 8; j++)
      out[j] = rounded(rounded(x_to_float(own.values[j]) * x_to_float(c.values[j])) +
                       rounded(sign * x_to_float(turned.values[j]) * x_to_float(s.values[j])));
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) out[j] = x_to_float(own.values[j]);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
token_attention(const __grid_constant__ AttentionArguments p) {
  __shared__ float of_warp[WARPS][QUERIES][PART];
  __shared__ float sums_of[QUERIES * HEAD_DIM];       // this block's channels, from all parts
  __shared__ float top_of[8][QUERIES], all_of[8][QUERIES];
  __shared__ __align__(16) u16 fresh[2][HEAD_DIM];   // key and value of the new token
  const int split = blockIdx.x, parts = gridDim.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x >> 5, row = (threadIdx.x & 31) / LANES, lane = threadIdx.x % LANES;
  const long long cache = ((long long)batch * p.kv_heads + kv_head) * p.capacity * HEAD_DIM;
  u16* keys = p.keys + cache + lane * 8;
  u16* values = p.values + cache + lane * 8;
  const int heads = p.kv_heads * QUERIES;
  const u16* token = p.qkv + (long long)batch * (heads + 2 * p.kv_heads) * HEAD_DIM;
  let_next_kernel_start();
  if (parts > 1) arrive_at_cluster();   // memory of a block may be written once it runs
  const int position = (int)*p.position, first = p.start[batch], count = position + 1 - first;
  const int length = ((count + parts - 1) / parts + 7) / 8 * 8;
  const int begin = min(first + split * length, position + 1), end = min(begin + length, position + 1);

  Eight k[UNROLL], v[UNROLL];
  const auto fetch = [&](int at) {   // rows of the cache; the new token's is not there yet
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int t = at + (u * WARPS + warp) * ROWS + row;
      k[u].words = v[u].words = make_uint4(0, 0, 0, 0);
      if (t < end && t < position) {
        k[u].words = *(const uint4*)(keys + (long long)t * HEAD_DIM);
        v[u].words = *(const uint4*)(values + (long long)t * HEAD_DIM);
      }
    }
  };
  fetch(begin);
  wait_for_previous_kernel();
  float q[QUERIES][8], sum[QUERIES][8], largest[QUERIES], total[QUERIES];
#pragma unroll
  for (int g = 0; g < QUERIES; g++) {
    head_values(p, token + (kv_head * QUERIES + g) * HEAD_DIM, p.query_norm, lane, batch, q[g]);
    largest[g] = NOTHING;
    total[g] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[g][j] = 0.f, q[g][j] *= p.scale;
  }
  if (begin <= position && position < end) {   // this part has the new token
    if (warp == 0) {
      float turned[8];
      head_values(p, token + (heads + kv_head) * HEAD_DIM, p.key_norm, lane, batch, turned);
      Eight out;
#pragma unroll
      for (int j = 0; j < 8; j++) out.values[j] = float_to_x(turned[j]);
      if (row == 0) {
        *(uint4*)(fresh[0] + lane * 8) = out.words;
        *(uint4*)(keys + (long long)position * HEAD_DIM) = out.words;
      }
    } else if (warp == 1 && row == 0) {
      const uint4 out = *(const uint4*)(token + (heads + p.kv_heads + kv_head) * HEAD_DIM + lane * 8);
      *(uint4*)(fresh[1] + lane * 8) = out;
      *(uint4*)(values + (long long)position * HEAD_DIM) = out;
    }
    __syncthreads();
  }
  for (int at = begin; at < end; at += STEP) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
      if (at + (u * WARPS + warp) * ROWS + row == position && position < end) {
        k[u].words = *(const uint4*)(fresh[0] + lane * 8);
        v[u].words = *(const uint4*)(fresh[1] + lane * 8);
      }
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
      float score[UNROLL], top = largest[g];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        float dot = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) dot += q[g][j] * x_to_float(k[u].values[j]);
        for (int s = LANES / 2; s; s >>= 1) dot += __shfl_xor_sync(~0u, dot, s);
        score[u] = at + (u * WARPS + warp) * ROWS + row < end ? dot : NOTHING;
        top = fmaxf(top, score[u]);
      }
      const float keep = __expf(largest[g] - top);
      largest[g] = top;
      total[g] *= keep;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] *= keep;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const float weight = score[u] > NOTHING ? __expf(score[u] - top) : 0.f;
        total[g] += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[g][j] += weight * x_to_float(v[u].values[j]);
      }
    }
    if (at + STEP < end) fetch(at + STEP);
  }
  // The rows of a warp, the warps of a block, the blocks of a cluster.
#pragma unroll
  for (int g = 0; g < QUERIES; g++) {
    for (int s = LANES; s < 32; s <<= 1) {
      const float top = fmaxf(largest[g], __shfl_xor_sync(~0u, largest[g], s));
      const float keep = __expf(largest[g] - top);
      largest[g] = top;
      total[g] *= keep;
      total[g] += __shfl_xor_sync(~0u, total[g], s);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        sum[g][j] *= keep;
        sum[g][j] += __shfl_xor_sync(~0u, sum[g][j], s);
      }
    }
    if (row == 0) {
#pragma unroll
      for (int j = 0; j < 8; j++) of_warp[warp][g][lane * 8 + j] = sum[g][j];
      if (lane == 0) of_warp[warp][g][HEAD_DIM] = largest[g], of_warp[warp][g][HEAD_DIM + 1] = total[g];
    }
  }
  __syncthreads();
  if (parts > 1) wait_for_cluster();
  u16* y = p.y + ((long long)batch * p.kv_heads + kv_head) * QUERIES * HEAD_DIM;
  for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += WARPS * 32) {
    const int g = i / HEAD_DIM, d = i % HEAD_DIM;
    float top = NOTHING, all = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, of_warp[w][g][HEAD_DIM]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float keep = __expf(of_warp[w][g][HEAD_DIM] - top);
      all += keep * of_warp[w][g][HEAD_DIM + 1];
      value += keep * of_warp[w][g][d];
    }
    if (parts == 1) {
      y[i] = float_to_x(value / all);
      continue;
    }
    const int slice = QUERIES * HEAD_DIM / parts;
    send(sums_of + split * slice + i % slice, i / slice, value);
    if (d < parts) {
      send(&top_of[split][g], d, top);
      send(&all_of[split][g], d, all);
    }
  }
  if (parts == 1) return;
  arrive_at_cluster();
  wait_for_cluster();
  const int slice = QUERIES * HEAD_DIM / parts;
  for (int i = threadIdx.x; i < slice; i += WARPS * 32) {
    const int channel = split * slice + i, g = channel / HEAD_DIM;
    float top = NOTHING, all = 0.f, value = 0.f;
    for (int s = 0; s < parts; s++) top = fmaxf(top, top_of[s][g]);
    for (int s = 0; s < parts; s++) {
      const float keep = __expf(top_of[s][g] - top);
      all += keep * all_of[s][g];
      value += keep * sums_of[s * slice + i];
    }
    y[channel] = float_to_x(value / all);
  }
}
