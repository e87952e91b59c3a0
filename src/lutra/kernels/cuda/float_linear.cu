// y = x W^T in fp32 for fp32 activations: nothing is rounded but sums.
//
// A block takes 16 rows and up to TOKENS tokens, each of its warps every eighth slice of 128 inputs. A lane
// makes the levels of two rows of 32 inputs from their signs, one input at a time, and multiplies them with
// all tokens; the warp has brought the slice of x to shared memory. Two runs give the same bits.
//
// -D: TOKENS 1|4|8. Grid: tiles of 16 rows, tiles of TOKENS tokens; 256 threads.

#include "slice_levels.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const float* x;          // [tokens][in_features], rows x_stride apart
  const float* bias;       // [rows] or null
  float* y;                // [tokens][rows], rows y_stride apart
  long long x_stride, y_stride;
  int rows, in_features, tokens;
  int items, groups, items_per_group;
};

constexpr int WARPS = 8;
constexpr int PART = 33;  // of 32 inputs: the four parts of a slice start in different banks

extern "C" __global__ void __launch_bounds__(WARPS * 32) float_linear(const __grid_constant__ Arguments p) {
  __shared__ float inputs[WARPS][TOKENS][4 * PART];
  __shared__ float sums[WARPS][TOKENS][TILE_ROWS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, g = lane >> 2;
  const int tile = blockIdx.x, first = blockIdx.y * TOKENS, count = min(TOKENS, p.tokens - first);
  let_next_kernel_start();
  wait_for_previous_kernel();
  float2 total[TOKENS];
#pragma unroll
  for (int m = 0; m < TOKENS; m++) total[m] = make_float2(0.f, 0.f);
  for (int slice = warp; slice * 128 < p.in_features; slice += WARPS) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < TOKENS; m++)
#pragma unroll
      for (int j = lane; j < 128; j += 32) {
        const int input = slice * 128 + j;
        const bool inside = m < count && input < p.in_features;
        inputs[warp][m][(j >> 5) * PART + (j & 31)] = inside ? p.x[(first + m) * p.x_stride + input] : 0.f;
      }
    __syncwarp();
    const int input = slice * 128 + t * 32;
    if (input >= p.in_features) continue;
    const SliceLevels levels(p.planes, p.scales, tile, slice, p.items * 2, p.groups, p.items_per_group, input);
#pragma unroll 4
    for (int b = 0; b < 32; b++) {
      const float2 level = levels.pair(b);
#pragma unroll
      for (int m = 0; m < TOKENS; m++) {
        const float v = inputs[warp][m][t * PART + b];
        total[m].x = fmaf(level.x, v, total[m].x);
        total[m].y = fmaf(level.y, v, total[m].y);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < TOKENS; m++) {
    for (int s = 2; s; s >>= 1) {
      total[m].x += __shfl_xor_sync(~0u, total[m].x, s);
      total[m].y += __shfl_xor_sync(~0u, total[m].y, s);
    }
    if (t == 0) { sums[warp][m][g] = total[m].x; sums[warp][m][g + 8] = total[m].y; }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * TILE_ROWS; i += WARPS * 32) {
    const int m = i / TILE_ROWS, row = tile * TILE_ROWS + i % TILE_ROWS;
    if (row >= p.rows) continue;
    float y = 0.f;
#pragma unroll
    for (int k = 0; k < WARPS; k++) y += sums[k][m][i % TILE_ROWS];
    p.y[(first + m) * p.y_stride + row] = y + (p.bias ? p.bias[row] : 0.f);
  }
}
