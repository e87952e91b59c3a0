// x in the order in which `field_linear.cu` and `code_linear.cu` multiply it, one block per token.
//
//   arranged  [token tiles][slices] of  { half [8 steps][TOKENS / 8][2][8 tokens][8 inputs];
//                                         float sum[TOKENS] (not if SUM_OPERANDS) }
//             input 2 t + e of half h of step j is input 32 t + (2 j + h) + 16 e of the slice,
//             divided by 2^field_position(2 j + h); for free levels in `code_linear.cu` it is input
//             32 t + level_input(2 j + h, e)
//   If SUM_OPERANDS, [ceil(slices / 32)] more per token tile, in the same order, of the sums s of x over
//   slices: number 2 t + e of half 0 of step j is s of slice 4 j + t of the 32, in units of 2^8, rounded
//   (e = 0) and what the rounding left (e = 1); half 1 is the same of -ALL s, where ALL alpha is what
//   a code counts less than its weight.
//   factors   [padded tokens]   2^-24 of what a token's sums are multiplied with at the end
//
// A token is scaled by a power of two to a largest |x| in [2^14, 2^15), so that the division costs
// nothing but values below 2^-30 of the largest; `sum` is in the units of the products (2^-24 of that).
// Tokens past the last are zero. Grid: padded tokens * cluster size, so that few tokens are many blocks;
// dynamic shared memory: a block's share of a row of x.

#include "fields.cuh"
#include "hopper.cuh"
#include "levels.cuh"

constexpr int SLICE_X_BYTES = TOKENS * (SUM_OPERANDS ? 256 : 260);
constexpr bool LEVELS = SUM_OPERANDS && !UNIFORM;   // integers of free levels, not bits
__host__ __device__ constexpr int input_of(int b, int e) { return LEVELS ? level_input(b, e) : b + 16 * e; }

struct Arguments {
  const u16* x;            // [tokens][in_features], rows x_stride apart
  char* arranged;
  float* factors;
  long long x_stride;
  int tokens, in_features, slices;
};

DEVICE void write_sum(char* out, int slices, int slice, int half, int place, float sum) {
  const u16 high = float_to_half(sum), low = float_to_half(sum - half_to_float(high));
  char* here = out + (long long)(slices + (slice >> 5)) * SLICE_X_BYTES + (slice >> 2 & 7) * (TOKENS * 32);
  *(u32*)(here + half * 128 + place + (slice & 3) * 4) = (u32)high | (u32)low << 16;
}

extern "C" __global__ void __launch_bounds__(1024) arrange(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) u16 row[];   // inputs first to last
  __shared__ __align__(16) float4 largest_of[32];
  const int parts = cluster_size(), part = cluster_rank(), token = blockIdx.x / parts;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int begin = p.slices / 2 * part / parts * 2, end = p.slices / 2 * (part + 1) / parts * 2;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u16* source = p.x + (long long)token * p.x_stride + begin * 128;
  const int in_features = p.in_features - begin * 128;   // that are left
  float largest = 0.f;
  const bool active = token < p.tokens, wide = ((u64)source & 15) == 0;
  for (int i = threadIdx.x * 8; i < (end - begin) * 128; i += blockDim.x * 8) {
    if (active && wide && i + 8 <= in_features) {
      *(uint4*)(row + i) = *(const uint4*)(source + i);
    } else {
      for (int j = 0; j < 8; j++) row[i + j] = active && i + j < in_features ? source[i + j] : 0;
    }
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(x_to_float(row[i + j])));
  }
  for (int s = 16; s; s >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  if (lane == 0) largest_of[warp].x = largest;
  cluster_sync();
  for (int w = lane; w < parts * warps; w += 32)
    largest = fmaxf(largest, load_cluster(shared_address(largest_of + w % warps), w / warps).x);
  for (int s = 16; s; s >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
  // The exponent field of the largest; one bf16 token may be too small or too large to bring into range.
  const int exponent = min(max((int)(__float_as_uint(largest) >> 23), 16), 254);
  const float up = __uint_as_float((u32)(254 + 14 - exponent) << 23 & 0x7F800000u);   // 2^(14 - e)
  if (part == 0 && threadIdx.x == 0) p.factors[token] = __uint_as_float((u32)(exponent - 14) << 23);
  const int tile = token / TOKENS, column = token % TOKENS;
  const int sum_slices = SUM_OPERANDS ? (p.slices + 31) >> 5 : 0;
  char* out = p.arranged + (long long)tile * (p.slices + sum_slices) * SLICE_X_BYTES;
  const int place = (column >> 3) * 256 + (column & 7) * 16;   // of a token in a step
  for (int i = threadIdx.x; i < (end - begin) * 16; i += blockDim.x) {
    const int here_slice = i >> 4, slice = begin + here_slice, b = i & 15;
    const int first = input_of(b, 0), second = input_of(b, 1);
    const float scale = LEVELS ? up : up * __uint_as_float((u32)(127 - field_position(b)) << 23);
    u32 packed[4];
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < 4; t++) {
      const float lo = x_to_float(row[here_slice * 128 + 32 * t + first]);
      const float hi = x_to_float(row[here_slice * 128 + 32 * t + second]);
      packed[t] = (u32)float_to_half(lo * scale) | (u32)float_to_half(hi * scale) << 16;
      sum += lo + hi;
    }
    char* here = out + (long long)slice * SLICE_X_BYTES;
    *(uint4*)(here + (b >> 1) * (TOKENS * 32) + (b & 1) * 128 + place) =
        make_uint4(packed[0], packed[1], packed[2], packed[3]);
    for (int s = 8; s; s >>= 1) sum += __shfl_xor_sync(~0u, sum, s);   // 16 threads are a slice
    if (SUM_OPERANDS) {
      if (b < 2) write_sum(out, p.slices, slice, b, place, sum * up * (b ? -ALL / 256.f : 1.f / 256.f));
    } else if (b == 0) {
      ((float*)(here + TOKENS * 256))[column] = sum * up * (1.f / 16777216.f);
    }
  }
  if (SUM_OPERANDS && part == 0)
    for (int i = p.slices * 2 + threadIdx.x; i < sum_slices * 64; i += blockDim.x)
      write_sum(out, p.slices, i >> 1, i & 1, place, 0.f);
  cluster_sync();   // no block leaves while another reads its largest
}
