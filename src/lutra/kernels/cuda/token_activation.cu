// SILU: y = silu(gate) * up for x = [rows][gate, up]; else y = max(x, 0). `features` of y, a multiple
// of 8. Grid: (ceil(rows / ROWS), ceil(features / 8 THREADS)). Block: THREADS threads, each of which has
// 8 features of ROWS rows.
// Compile-time parameters: SILU 0|1, THREADS, ROWS.

#include "token.cuh"

struct ActivationArguments {
  const u16* x;
  u16* y;
  int rows, features;
};

extern "C" __global__ void __launch_bounds__(THREADS)
token_activation(const __grid_constant__ ActivationArguments p) {
  const int i = (blockIdx.y * THREADS + threadIdx.x) * 8, first = blockIdx.x * ROWS;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (i >= p.features) return;
  Eight gate[ROWS], up[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (first + r >= p.rows) break;
    const u16* x = p.x + (long long)(first + r) * p.features * (SILU ? 2 : 1) + i;
    gate[r].words = *(const uint4*)x;
    if (SILU) up[r].words = *(const uint4*)(x + p.features);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (first + r >= p.rows) break;
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float g = x_to_float(gate[r].values[j]);
      if (SILU) {
        const float a = rounded(g / (1.f + __expf(-g)));
        out.values[j] = float_to_x(a * x_to_float(up[r].values[j]));
      } else {
        out.values[j] = float_to_x(fmaxf(g, 0.f));
      }
    }
    *(uint4*)(p.y + (long long)(first + r) * p.features + i) = out.words;
  }
}
