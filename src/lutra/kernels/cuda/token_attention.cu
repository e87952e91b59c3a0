// One new token per sequence against the cache.
//
//   qkv     [batch][(heads + 2 kv_heads) * HEAD_DIM]   queries, keys, values of the new token
//   keys    [batch][kv_heads][capacity][HEAD_DIM]      and values: the cache; row `position` is written
//   partial [batch][heads][splits][HEAD_DIM + 2] float, counters [batch][kv_heads] zeros, left zero
//
// A block serves the QUERIES heads of one key head for a part of the positions start .. position; how
// many parts there are depends on how many positions there are. The last block to finish adds the
// parts up, in their order, so results do not depend on timing. Grid: (splits, kv_heads, batch).
// Block: 128 threads; HEAD_DIM / 8 lanes share a row.
// Compile-time parameters: HEAD_DIM 64|128|256, QUERIES (heads that share a key head, at most 8),
// ROTARY 0|1, HEAD_NORM 0|1.

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
  float* partial;
  u32* counters;
  u16* y;                 // [batch][heads * HEAD_DIM]
  int rotary_stride;
  int kv_heads, capacity;
  float scale, epsilon;
};

constexpr int LANES = HEAD_DIM / 8, ROWS = 32 / LANES, WARPS = 4, UNROLL = 4;
constexpr int STEP = WARPS * ROWS * UNROLL;   // positions that a block has in flight
constexpr int PART = HEAD_DIM + 2;

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

extern "C" __global__ void __launch_bounds__(128)
token_attention(const __grid_constant__ AttentionArguments p) {
  __shared__ float part[WARPS][QUERIES][PART];
  __shared__ bool is_last;
  const int split = blockIdx.x, kv_head = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x >> 5, row = (threadIdx.x & 31) / LANES, lane = threadIdx.x % LANES;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int position = (int)*p.position, first = p.start[batch], count = position + 1 - first;
  const int parts = min((int)gridDim.x, (count + 31) / 32);
  if (split >= parts) return;
  const int length = ((count + parts - 1) / parts + 7) / 8 * 8;
  const int begin = first + split * length, end = min(begin + length, position + 1);
  const int heads = p.kv_heads * QUERIES;
  const u16* token = p.qkv + (long long)batch * (heads + 2 * p.kv_heads) * HEAD_DIM;
  const long long cache = ((long long)batch * p.kv_heads + kv_head) * p.capacity * HEAD_DIM;
  u16* keys = p.keys + cache;
  u16* values = p.values + cache;

  if (begin <= position && position < end) {   // this block's part has the new token
    if (warp == 0) {
      float k[8];
      head_values(p, token + (heads + kv_head) * HEAD_DIM, p.key_norm, lane, batch, k);
      if (row == 0) {
        Eight out;
#pragma unroll
        for (int j = 0; j < 8; j++) out.values[j] = float_to_x(k[j]);
        *(uint4*)(keys + (long long)position * HEAD_DIM + lane * 8) = out.words;
      }
    } else if (warp == 1 && row == 0) {
      *(uint4*)(values + (long long)position * HEAD_DIM + lane * 8) =
          *(const uint4*)(token + (heads + p.kv_heads + kv_head) * HEAD_DIM + lane * 8);
    }
  }
  float q[QUERIES][8], sum[QUERIES][8], largest[QUERIES], total[QUERIES];
#pragma unroll
  for (int g = 0; g < QUERIES; g++) {
    head_values(p, token + (kv_head * QUERIES + g) * HEAD_DIM, p.query_norm, lane, batch, q[g]);
    largest[g] = -1e30f;
    total[g] = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[g][j] = 0.f, q[g][j] *= p.scale;
  }
  __syncthreads();
  for (int at = begin; at < end; at += STEP) {
    Eight k[UNROLL], v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int t = min(at + (u * WARPS + warp) * ROWS + row, end - 1);
      k[u].words = *(const uint4*)(keys + (long long)t * HEAD_DIM + lane * 8);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int t = min(at + (u * WARPS + warp) * ROWS + row, end - 1);
      v[u].words = *(const uint4*)(values + (long long)t * HEAD_DIM + lane * 8);
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
        const bool inside = at + (u * WARPS + warp) * ROWS + row < end;
        score[u] = inside ? dot : -1e30f;
        top = fmaxf(top, score[u]);
      }
      const float keep = __expf(largest[g] - top);
      largest[g] = top;
      total[g] *= keep;
#pragma unroll
      for (int j = 0; j < 8; j++) sum[g][j] *= keep;
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const float weight = score[u] > -1e29f ? __expf(score[u] - top) : 0.f;
        total[g] += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) sum[g][j] += weight * x_to_float(v[u].values[j]);
      }
    }
  }
  // The rows of a warp, then the warps of the block.
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
      for (int j = 0; j < 8; j++) part[warp][g][lane * 8 + j] = sum[g][j];
      if (lane == 0) part[warp][g][HEAD_DIM] = largest[g], part[warp][g][HEAD_DIM + 1] = total[g];
    }
  }
  __syncthreads();
  const int pair = batch * p.kv_heads + kv_head;
  const long long head = (long long)pair * QUERIES;
  for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += 128) {
    const int g = i / HEAD_DIM, d = i % HEAD_DIM;
    float top = -1e30f, all = 0.f, value = 0.f;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, part[w][g][HEAD_DIM]);
    for (int w = 0; w < WARPS; w++) {
      const float keep = __expf(part[w][g][HEAD_DIM] - top);
      all += keep * part[w][g][HEAD_DIM + 1];
      value += keep * part[w][g][d];
    }
    if (parts == 1) {
      p.y[head * HEAD_DIM + i] = float_to_x(value / all);
    } else {
      float* mine = p.partial + ((head + g) * gridDim.x + split) * PART;
      mine[d] = value;
      if (d == 0) mine[HEAD_DIM] = top, mine[HEAD_DIM + 1] = all;
    }
  }
  if (parts == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(p.counters + pair, 1u) == (u32)parts - 1;
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) p.counters[pair] = 0;
  __threadfence();
  for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += 128) {
    const int g = i / HEAD_DIM, d = i % HEAD_DIM;
    const volatile float* theirs = p.partial + (head + g) * gridDim.x * PART;
    float top = -1e30f, all = 0.f, value = 0.f;
#pragma unroll 4
    for (int s = 0; s < parts; s++) top = fmaxf(top, theirs[s * PART + HEAD_DIM]);
#pragma unroll 4
    for (int s = 0; s < parts; s++) {
      const float keep = __expf(theirs[s * PART + HEAD_DIM] - top);
      all += keep * theirs[s * PART + HEAD_DIM + 1];
      value += keep * theirs[s * PART + d];
    }
    p.y[head * HEAD_DIM + i] = float_to_x(value / all);
  }
}
