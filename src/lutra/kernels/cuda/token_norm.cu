// sum = x + delta (delta may be absent, then sum is not written); y = norm(sum) * weight (+ bias).
//
// A row is long for one processor and short for all, so CLUSTER blocks may share it: each warp sends
// what it knows of its part, mean and squared deviations (Chan, Golub and LeVeque 1979) or the sum of
// squares, to the shared memory of every block, and each block puts them together in the same order.
//
// `features` is a multiple of 8, and with CLUSTER > 1 it is CLUSTER * THREADS * 8.
// Grid: rows * CLUSTER, clusters of CLUSTER. Block: THREADS threads.
// Compile-time parameters: THREADS, VECTORS (of 8 values per thread; 1 in clusters), LAYER_NORM 0|1,
// CLUSTER 1|2|4|8.

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

constexpr int WARPS = THREADS / 32;

// What a part says of its values: mean and sum of squared deviations, or 0 and sum of squares.
struct Part { float mean, squares; };

// The parts of all lanes, each of `count` values, as one.
DEVICE Part of_warp(Part own, float count) {
  for (int s = 1; s < 32; s <<= 1) {
    const float other = __shfl_xor_sync(~0u, own.squares, s);
    own.squares += other;
    if (LAYER_NORM) {
      const float mean = __shfl_xor_sync(~0u, own.mean, s), apart = mean - own.mean;
      own.squares += apart * apart * (0.5f * count);
      own.mean = 0.5f * (own.mean + mean);
      count *= 2.f;
    }
  }
  return own;
}

extern "C" __global__ void __launch_bounds__(THREADS)
token_norm(const __grid_constant__ NormArguments p) {
  __shared__ float shared[2][32];
  __shared__ __align__(8) Part parts[CLUSTER * WARPS];
  const long long row = (long long)(blockIdx.x / CLUSTER) * p.features;
  const int begin = blockIdx.x % CLUSTER * THREADS, lane = threadIdx.x & 31;
  Eight weight[VECTORS], bias[VECTORS];
  float h[VECTORS * 8];
  if (CLUSTER > 1) arrive_at_cluster();   // memory of a block may be written once it runs
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (begin + v * THREADS + threadIdx.x) * 8;
    if (i < p.features) {
      weight[v].words = *(const uint4*)(p.weight + i);
      if (LAYER_NORM && p.bias) bias[v].words = *(const uint4*)(p.bias + i);
    }
  }
  let_next_kernel_start();
  if (CLUSTER > 1) wait_for_cluster();
  wait_for_previous_kernel();
  Eight a[VECTORS], b[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (begin + v * THREADS + threadIdx.x) * 8;
    if (i < p.features) {
      a[v].words = *(const uint4*)(p.x + row + i);
      if (p.delta) b[v].words = *(const uint4*)(p.delta + row + i);
    }
  }
  float total = 0.f;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (begin + v * THREADS + threadIdx.x) * 8;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      float value = 0.f;
      if (i < p.features) {
        value = x_to_float(a[v].values[j]);
        if (p.delta) {
          value = rounded(value + x_to_float(b[v].values[j]));
          a[v].values[j] = float_to_x(value);
        }
      }
      h[v * 8 + j] = value;
      total += LAYER_NORM ? value : value * value;
    }
  }
  float mean = 0.f, squares = 0.f;
  if (CLUSTER > 1) {
    Part own = {0.f, total};
    if (LAYER_NORM) {
      own = {total / 8.f, 0.f};
#pragma unroll
      for (int j = 0; j < 8; j++) own.squares += (h[j] - own.mean) * (h[j] - own.mean);
    }
    own = of_warp(own, 8.f);
    if (lane < CLUSTER)
      send(address_in(&parts[blockIdx.x % CLUSTER * WARPS + (threadIdx.x >> 5)], lane), own.mean, own.squares);
    arrive_at_cluster();
    if (p.delta) *(uint4*)(p.sum + row + (begin + threadIdx.x) * 8) = a[0].words;
    wait_for_cluster();
    constexpr int COUNT = CLUSTER * WARPS;
    if (LAYER_NORM) {
      for (int i = lane; i < COUNT; i += 32) mean += parts[i].mean;
      for (int s = 16; s; s >>= 1) mean += __shfl_xor_sync(~0u, mean, s);
      mean /= COUNT;
    }
    for (int i = lane; i < COUNT; i += 32) {
      squares += parts[i].squares;
      if (LAYER_NORM) squares += 256.f * (parts[i].mean - mean) * (parts[i].mean - mean);
    }
    for (int s = 16; s; s >>= 1) squares += __shfl_xor_sync(~0u, squares, s);
  } else {
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      const int i = (v * THREADS + threadIdx.x) * 8;
      if (p.delta && i < p.features) *(uint4*)(p.sum + row + i) = a[v].words;
    }
    squares = block_sum(total, shared[0]);
    if (LAYER_NORM) {
      mean = squares / p.features;
      total = 0.f;
#pragma unroll
      for (int v = 0; v < VECTORS; v++)
#pragma unroll
        for (int j = 0; j < 8; j++)
          if ((v * THREADS + threadIdx.x) * 8 < p.features)
            total += (h[v * 8 + j] - mean) * (h[v * 8 + j] - mean);
      squares = block_sum(total, shared[1]);
    }
  }
  const float scale = rsqrtf(squares / p.features + p.epsilon);
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    const int i = (begin + v * THREADS + threadIdx.x) * 8;
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
