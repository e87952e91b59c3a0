// y = x W^T in fp32 for up to 16 tokens and very few rows, where nothing of x is rounded: of a handful of
// outputs all may cancel to far below their terms, and then show what rounds x.
//
// One block per row, a lane takes 32 inputs at a time. Two runs give the same bits.
//
// -D: TOKENS. Grid: rows; 128 threads.

#include "few_arguments.cuh"

DEVICE float scale_of(const char* scales, long long index) {
  return SCALE_FLOAT ? ((const float*)scales)[index] : half_to_float(((const u16*)scales)[index]);
}

extern "C" __global__ void __launch_bounds__(128) exact_linear(const __grid_constant__ Arguments p) {
  __shared__ float sums[4][TOKENS];
  const int row = blockIdx.x, tile = row / TILE_ROWS, half = row >> 3 & 1, g = row & 7;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  let_next_kernel_start();
  wait_for_previous_kernel();
  float total[TOKENS] = {};
  for (int block = threadIdx.x; block * 32 < p.in_features; block += 128) {
    const int slice = block >> 2, t = block & 3;
    const u32* words = (const u32*)p.planes + ((long long)tile * p.items * 2 + slice) * (BITS * 64) + (4 * g + t) * 2 + half;
    const int group = GROUP == 256 ? slice / 2 / p.items_per_group : block * 32 / GROUP;
    const long long scales = (((long long)tile * p.groups + group) * 8 + g) * (SLOTS * 2) + half;
    const float offset = scale_of(p.scales, scales + (SLOTS - 1) * 2), first = scale_of(p.scales, scales);
    u32 w[BITS];
    float alpha[BITS];
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      w[q] = words[q * 64];
      alpha[q] = UNIFORM ? first / (1 << q) : scale_of(p.scales, scales + q * 2);
    }
    for (int i = 0; i < 32 && block * 32 + i < p.in_features; i++) {
      float level = offset;
#pragma unroll
      for (int q = 0; q < BITS; q++) level += w[q] >> i & 1 ? alpha[q] : -alpha[q];
#pragma unroll
      for (int m = 0; m < TOKENS; m++)
        if (m < p.tokens) total[m] = fmaf(level, x_to_float(p.x[m * p.x_stride + block * 32 + i]), total[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < TOKENS; m++) {
    for (int s = 16; s; s >>= 1) total[m] += __shfl_xor_sync(~0u, total[m], s);
    if (lane == 0) sums[warp][m] = total[m];
  }
  __syncthreads();
  if (threadIdx.x < p.tokens) {
    const int m = threadIdx.x;
    const float y = sums[0][m] + sums[1][m] + sums[2][m] + sums[3][m];
    p.y[m * p.y_stride + row] = float_to_x(y + (p.bias ? x_to_float(p.bias[row]) : 0.f));
  }
}
