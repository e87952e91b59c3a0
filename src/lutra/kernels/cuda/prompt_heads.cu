// Queries, keys and values of a prompt on their way to attention: norms of heads, rotary embedding,
// and the write to the key-value cache.
//
//   qkv     [rows][(heads + 2 kv_heads) * HEAD_DIM]    row = sequence * length + position; queries are
//                                                      turned where they are
//   keys    [batch][kv_heads][capacity][HEAD_DIM]      and values: rows 0 .. length - 1 are written
//
// HEAD_DIM / 16 lanes share a head, each with 8 channels of either half. Where queries stay what they
// are, only keys and values have lanes: `first` is the first head that has. Grid: (rows, ceil((heads +
// 2 kv_heads - first) * HEAD_DIM / 16 / 128)). Block: 128 threads.
// Compile-time parameters: HEAD_DIM 64|128|256, ROTARY 0|1, HEAD_NORM 0|1.

#include "token.cuh"

struct HeadsArguments {
  u16* qkv;
  const u16* cosine;      // [rows][HEAD_DIM]
  const u16* sine;
  const u16* query_norm;  // [HEAD_DIM]
  const u16* key_norm;
  u16* keys;
  u16* values;
  int heads, kv_heads, first, length, capacity;
  float epsilon;
};

constexpr int LANES = HEAD_DIM / 16, HALF = HEAD_DIM / 2;

extern "C" __global__ void __launch_bounds__(128)
prompt_heads(const __grid_constant__ HeadsArguments p) {
  const int lane = threadIdx.x % LANES;
  const int head = p.first + (blockIdx.y * 128 + threadIdx.x) / LANES;
  const int row = blockIdx.x, all = p.heads + 2 * p.kv_heads;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const bool inside = head < all;
  u16* own = p.qkv + ((long long)row * all + min(head, all - 1)) * HEAD_DIM + lane * 8;
  Eight half[2];
  half[0].words = *(const uint4*)own;
  half[1].words = *(const uint4*)(own + HALF);
  const bool is_value = head >= p.heads + p.kv_heads;
  if (HEAD_NORM) {
    float squares = 0.f;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        squares += x_to_float(half[h].values[j]) * x_to_float(half[h].values[j]);
    for (int s = LANES / 2; s; s >>= 1) squares += __shfl_xor_sync(~0u, squares, s);
    const float scale = rsqrtf(squares / HEAD_DIM + p.epsilon);
    if (!is_value) {
      const u16* weight = (head < p.heads ? p.query_norm : p.key_norm) + lane * 8;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Eight w;
        w.words = *(const uint4*)(weight + h * HALF);
#pragma unroll
        for (int j = 0; j < 8; j++)
          half[h].values[j] =
              float_to_x(x_to_float(w.values[j]) * rounded(x_to_float(half[h].values[j]) * scale));
      }
    }
  }
  if (!inside) return;
  if (ROTARY && !is_value) {
    Eight cosine[2], sine[2];
    const long long table = (long long)row * HEAD_DIM + lane * 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      cosine[h].words = *(const uint4*)(p.cosine + table + h * HALF);
      sine[h].words = *(const uint4*)(p.sine + table + h * HALF);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float a = x_to_float(half[0].values[j]), b = x_to_float(half[1].values[j]);
      half[0].values[j] = float_to_x(rounded(a * x_to_float(cosine[0].values[j])) +
                                     rounded(-b * x_to_float(sine[0].values[j])));
      half[1].values[j] = float_to_x(rounded(b * x_to_float(cosine[1].values[j])) +
                                     rounded(a * x_to_float(sine[1].values[j])));
    }
  }
  u16* out = own;
  if (head >= p.heads) {
    const int kv_head = head - p.heads - (is_value ? p.kv_heads : 0);
    out = (is_value ? p.values : p.keys) + lane * 8 +
          (((long long)(row / p.length) * p.kv_heads + kv_head) * p.capacity + row % p.length) * HEAD_DIM;
  }
  *(uint4*)out = half[0].words;
  *(uint4*)(out + HALF) = half[1].words;
}
