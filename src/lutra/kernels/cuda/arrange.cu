// x in the order in which `field_linear.cu` multiplies it, one block per token.
//
//   arranged  [token tiles][slices] of  { half [8 steps][TOKENS / 8][2][8 tokens][8 inputs];
//                                         float sum[TOKENS] }
//             input 2 t + e of half h of step j is input 32 t + (2 j + h) + 16 e of the slice,
//             divided by 2^field_position(2 j + h)
//   factors   [padded tokens]   2^-24 of what a token's sums are multiplied with at the end
//
// A token is scaled by a power of two to a largest |x| in [2^14, 2^15), so that the division costs
// nothing but values below 2^-30 of the largest; `sum` is in the units of the products (2^-24 of that).
// Tokens past the last are zero. Grid: padded tokens; 1024 threads; dynamic shared memory: one row of x.

#include "fields.cuh"

struct Arguments {
  const u16* x;            // [tokens][in_features], rows x_stride apart
  char* arranged;
  float* factors;
  long long x_stride;
  int tokens, in_features, slices;
};

extern "C" __global__ void __launch_bounds__(1024) arrange(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) u16 row[];   // slices * 128
  __shared__ float largest_of[32];
  const int token = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u16* source = p.x + (long long)token * p.x_stride;
  float largest = 0.f;
  const bool active = token < p.tokens, wide = ((u64)source & 15) == 0;
  for (int i = threadIdx.x * 8; i < p.slices * 128; i += 8192) {
    if (active && wide && i + 8 <= p.in_features) {
      *(uint4*)(row + i) = *(const uint4*)(source + i);
    } else {
      for (int j = 0; j < 8; j++) row[i + j] = active && i + j < p.in_features ? source[i + j] : 0;
    }
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(x_to_float(row[i + j])));
  }
  for (int s = 16; s; s >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  if (lane == 0) largest_of[warp] = largest;
  __syncthreads();
  for (int w = 0; w < 32; w++) largest = fmaxf(largest, largest_of[w]);
  // The exponent field of the largest; one bf16 token may be too small or too large to bring into range.
  const int exponent = min(max((int)(__float_as_uint(largest) >> 23), 16), 254);
  const float up = __uint_as_float((u32)(254 + 14 - exponent) << 23 & 0x7F800000u);   // 2^(14 - e)
  if (threadIdx.x == 0) p.factors[token] = __uint_as_float((u32)(exponent - 14) << 23);
  const int tile = token / TOKENS, column = token % TOKENS;
  char* out = p.arranged + (long long)tile * p.slices * (TOKENS * 260);
  for (int i = threadIdx.x; i < p.slices * 16; i += 1024) {
    const int slice = i >> 4, b = i & 15;
    const float scale = up * __uint_as_float((u32)(127 - field_position(b)) << 23);
    u32 packed[4];
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const float lo = x_to_float(row[slice * 128 + 32 * t + b]);
      const float hi = x_to_float(row[slice * 128 + 32 * t + b + 16]);
      packed[t] = (u32)float_to_half(lo * scale) | (u32)float_to_half(hi * scale) << 16;
      sum += lo + hi;
    }
    char* here = out + (long long)slice * (TOKENS * 260);
    *(uint4*)(here + (b >> 1) * (TOKENS * 32) + (column >> 3) * 256 + (b & 1) * 128 + (column & 7) * 16) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
    for (int s = 8; s; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);   // 16 threads are a slice
    if (b == 0) ((float*)(here + TOKENS * 256))[column] = sum * up * (1.f / 16777216.f);
  }
}
