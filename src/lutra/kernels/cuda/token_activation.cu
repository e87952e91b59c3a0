// SILU: y = silu(gate) * up for x = [rows][gate, up]; else y = max(x, 0). `features` of y, a multiple
// of 8. Grid: (rows, ceil(features / 512)). Block: 64 threads.
// Compile-time parameter: SILU 0|1.

#include "token.cuh"

struct ActivationArguments {
  const u16* x;
  u16* y;
  int features;
};

extern "C" __global__ void __launch_bounds__(64)
token_activation(const __grid_constant__ ActivationArguments p) {
  const int i = (blockIdx.y * 64 + threadIdx.x) * 8;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (i >= p.features) return;
  const u16* x = p.x + (long long)blockIdx.x * p.features * (SILU ? 2 : 1) + i;
  Eight gate, up, out;
  gate.words = *(const uint4*)x;
  if (SILU) up.words = *(const uint4*)(x + p.features);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float g = x_to_float(gate.values[j]);
    if (SILU) {
      const float a = rounded(g / (1.f + __expf(-g)));
      out.values[j] = float_to_x(a * x_to_float(up.values[j]));
    } else {
      out.values[j] = float_to_x(fmaxf(g, 0.f));
    }
  }
  *(uint4*)(p.y + (long long)blockIdx.x * p.features + i) = out.words;
}
