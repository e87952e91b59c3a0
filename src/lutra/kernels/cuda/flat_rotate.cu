// Blocks of inputs turned by the Hadamard matrix over the root of its size; all other inputs as they are.
//
//   for each block, with v[i] = x[index[i]] in float:
//     for h = 1, 2, 4 ... BLOCK / 2, for each pair (i, i + h) in a run of 2 h: (v[i] + v[i + h], v[i] - v[i + h])
//     y[index[i]] = round(v[i] * factor)
//
// Sums and differences are those of lutra.formats.flat.rotate_inputs, in its order: the same bits.
//
// Rows of TOKENS tokens lie in shared memory; a warp takes a block of all of them at a time, each lane
// BLOCK / 32 values that stand together.
//
// -D: X_TYPE 0 half | 1 bf16, BLOCK (32 to 1024, a power of two), TOKENS, THREADS. Grid: tokens / TOKENS.

#include "flat.cuh"

struct Arguments {
  const u16* x;       // [tokens][inputs], rows x_stride elements apart
  u16* y;             // [tokens][inputs]
  const int* index;   // [blocks][BLOCK]
  long long x_stride;
  int tokens, inputs, blocks;
  float factor;
};

constexpr int EACH = BLOCK / 32;

extern "C" __global__ void __launch_bounds__(THREADS)
flat_rotate(const __grid_constant__ Arguments p) {
  extern __shared__ u16 rows[];   // [TOKENS][inputs]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const long long first = (long long)blockIdx.x * TOKENS;
  const int count = (int)min((long long)TOKENS, p.tokens - first);
  let_next_kernel_start();
  wait_for_previous_kernel();
  for (int t = 0; t < count; t++)
    for (int i = threadIdx.x; i < p.inputs; i += THREADS) rows[t * p.inputs + i] = p.x[(first + t) * p.x_stride + i];
  __syncthreads();
  for (int block = warp; block < p.blocks; block += THREADS / 32) {
    int at[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j++) at[j] = p.index[(long long)block * BLOCK + lane * EACH + j];
    for (int t = 0; t < count; t++) {
      u16* row = rows + t * p.inputs;
      float v[EACH];
#pragma unroll
      for (int j = 0; j < EACH; j++) v[j] = to_float<X_TYPE>(row[at[j]]);
#pragma unroll
      for (int h = 1; h < EACH; h *= 2)
#pragma unroll
        for (int j = 0; j < EACH; j++)
          if (!(j & h)) {
            const float a = v[j], b = v[j + h];
            v[j] = __fadd_rn(a, b);
            v[j + h] = __fsub_rn(a, b);
          }
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2)
#pragma unroll
        for (int j = 0; j < EACH; j++) {
          const float other = __shfl_xor_sync(0xFFFFFFFFu, v[j], lanes);
          v[j] = lane & lanes ? __fsub_rn(other, v[j]) : __fadd_rn(v[j], other);
        }
#pragma unroll
      for (int j = 0; j < EACH; j++) row[at[j]] = rounded<X_TYPE>(__fmul_rn(v[j], p.factor));
    }
  }
  __syncthreads();
  for (int t = 0; t < count; t++)
    for (int i = threadIdx.x; i < p.inputs; i += THREADS) p.y[(first + t) * p.inputs + i] = rows[t * p.inputs + i];
}
