// sum = x + delta (delta may be absent, then sum is not written); y = norm(sum) * weight (+ bias).
// Grid: rows. Block: THREADS threads. `features` is a multiple of 8.
// Compile-time parameters: THREADS, VECTORS (of 8 values per thread), LAYER_NORM 0|1.

#include "token.cuh"

struct NormArguments {
  const u16* x;
  const u16* delta;
  const u16* weight;
  const u16* bias;
  u16* sum;
  u16* y;
  int features;
  float epsilon;
};

extern "C" __global__ void __launch_bounds__(THREADS)
token_norm(const __grid_constant__ NormArguments p) {
  __shared__ float shared[2][32];
  const long long row = (long long)blockIdx.x * p.features;
  Eight weight[VECTORS], bias[VECTORS];
  float h[VECTORS * 8];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (v * THREADS + threadIdx.x) * 8;
    if (i < p.features) {
      weight[v].words = *(const uint4*)(p.weight + i);
      if (LAYER_NORM && p.bias) bias[v].words = *(const uint4*)(p.bias + i);
    }
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  float total = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (v * THREADS + threadIdx.x) * 8;
    Eight a, b;
    if (i < p.features) {
      a.words = *(const uint4*)(p.x + row + i);
      if (p.delta) b.words = *(const uint4*)(p.delta + row + i);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float value = 0.f;
      if (i < p.features) {
        value = x_to_float(a.values[j]);
        if (p.delta) {
          value = rounded(value + x_to_float(b.values[j]));
          a.values[j] = float_to_x(value);
        }
      }
      h[v * 8 + j] = value;
      total += LAYER_NORM ? value : value * value;
    }
    if (p.delta && i < p.features) *(uint4*)(p.sum + row + i) = a.words;
  }
  total = block_sum(total, shared[0]);
  float mean = 0.f;
  if (LAYER_NORM) {
    mean = total / p.features;
    float squares = 0.f;
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        if ((v * THREADS + threadIdx.x) * 8 < p.features) {
          const float d = h[v * 8 + j] - mean;
          squares += d * d;
        }
    total = block_sum(squares, shared[1]);
  }
  const float scale = rsqrtf(total / p.features + p.epsilon);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (v * THREADS + threadIdx.x) * 8;
    if (i >= p.features) break;
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float w = x_to_float(weight[v].values[j]);
      if (LAYER_NORM) {
        const float z = p.bias ? x_to_float(bias[v].values[j]) : 0.f;
        out.values[j] = float_to_x((h[v * 8 + j] - mean) * scale * w + z);
      } else {
        out.values[j] = float_to_x(w * rounded(h[v * 8 + j] * scale));
      }
    }
    *(uint4*)(p.y + row + i) = out.words;
  }
}
