// x in the order in which `place_batch.cu` multiplies it, four tokens a cluster.
//
//   arranged  [slices] of { [8 products][TOKENS / 8][4][8 tokens][8 halves]; [TOKENS / 8][2][8 tokens][8 halves] }
//             A product (f, h, m) has 16 inputs of a slice: 64 f + 16 h + 2 m and the next, and 4, 8, 12, 32, 36,
//             40 and 44 more. Each two of them, a and b, are four places: c - a - b, c + a - b, c - a + b, c + a + b.
//             The 16 halves behind the products are the sum of x over the slice and, four times, what is to be added
//             to take off the sum of c; each as two halves, the second what the rounding of the first left.
//
// A token is scaled by a power of two to a largest |x| in [2^7, 2^8): twice that, and the sum of 128, is a half.
// c is chosen so that the places are rounded by little (`shift_of`).
//
// A warp takes a slice of four tokens, eight lanes each: a lane reads two pieces of eight inputs, keeps them in
// registers until the largest of the token is known, and writes the two products of each. The blocks of a cluster
// split the slices and tell each other their largest. -D: TOKENS 16|32|64, HELD: slices of a warp. Grid: TOKENS / 4 *
// cluster size; threads: a warp for each HELD slices of a block.

#include "hopper.cuh"
#include "places.cuh"
#include "arranging.cuh"

constexpr int MOST_WARPS = 32, MOST_BLOCKS = 8, TOGETHER = 4;   // tokens of a cluster
constexpr int PRODUCT_BYTES = TOKENS * 64, X_SUMS = 8 * PRODUCT_BYTES, X_BYTES = X_SUMS + TOKENS * 32;

struct Arguments {
  const u16* x;            // [tokens][in_features], rows x_stride apart
  char* arranged;
  float* factors;          // [TOKENS]   what a token's sums are multiplied with at the end
  long long x_stride;
  int tokens, in_features, slices;
  int flags;               // of `place_batch.cu`, which follow the factors: set to 0
};

DEVICE u32 two_halves(float v) {   // a number as a half and what that leaves
  const float high = half_to_float(float_to_half(v));
  return half_pair(high, v - high);
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32)
place_arrange(const __grid_constant__ Arguments p) {
  __shared__ u32 largest[MOST_BLOCKS][MOST_WARPS][TOGETHER];   // of every block and warp
  const int blocks = cluster_size(), block = cluster_rank(), warps = blockDim.x >> 5;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int column = lane & 3, side = lane >> 2 & 1, part = lane >> 3;   // pieces begin at 32 part + 8 side
  const int token = blockIdx.x / blocks * TOGETHER + column;
  const int first = (block * warps + warp) * HELD;   // slice
  let_next_kernel_start();
  if (blocks > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  wait_for_previous_kernel();
  uint4 held[HELD][2];   // piece i: 8 inputs from 32 part + 16 i + 8 side of the slice on
  u32 most = 0;
  {
    const u16* row = p.x + (long long)token * p.x_stride;
    const bool active = token < p.tokens, wide = ((u64)row & 15) == 0;
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        held[h][i] = read(row, (first + h) * 128 + 32 * part + 16 * i + 8 * side, active ? p.in_features : 0, wide);
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
      for (int i = 0; i < 8; i++) most = largest_of(most, word_of(held[h][i >> 2], i & 3) & 0x7FFF7FFFu);
  }
#pragma unroll
  for (int by = 4; by < 32; by *= 2) most = largest_of(most, __shfl_xor_sync(~0u, most, by));
  const int to = lane >> 2;   // eight lanes tell eight blocks
  if (blocks > 1) {
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");   // all blocks have begun
    if (to < blocks) store_word(shared_address(&largest[block][warp][column]), to, most);
    cluster_sync();
  } else {
    if (to == 0) largest[0][warp][column] = most;
    __syncthreads();
  }
  u32 both = 0;
  for (int i = lane >> 2; i < blocks * warps; i += 8) both = largest_of(both, largest[i / warps][i % warps][column]);
#pragma unroll
  for (int by = 4; by < 32; by *= 2) both = largest_of(both, __shfl_xor_sync(~0u, both, by));
  const float value = x_to_float((u16)(both > both << 16 ? both >> 16 : both));
  // The exponent field of the largest; one bf16 token may be too small or too large to bring into range.
  const int exponent = min(max((int)(__float_as_uint(value) >> 23), 16), 254);
  const float up = __uint_as_float((u32)(254 + 7 - exponent) << 23 & 0x7F800000u);   // 2^(7 - e)
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.flags; i += blockDim.x) p.factors[TOKENS + i] = 0.f;
  if (block == 0 && threadIdx.x < TOGETHER) p.factors[token] = __uint_as_float((u32)(exponent - 7) << 23);
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int slice = first + h;
    if (slice >= p.slices) break;
    char* const here = p.arranged + (long long)slice * X_BYTES;
    const int place = (token & 7) * 16;
    char* const products = here + ((part >> 1) * 4) * PRODUCT_BYTES + (token >> 3) * 512 + (part & 1) * 256 + side * 128 + place;
    float whole = 0.f, sum_of_c = 0.f;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int m = 0; m < 2; m++) {
        u32 packed[4];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const u32 pair = word_of(held[h][i], m + 2 * k);
          const float a = x_to_float((u16)pair) * up, b = x_to_float((u16)(pair >> 16)) * up;
          const float sum = a + b, difference = a - b;
          whole += sum;
          const float c = X_BF16 ? 0.f : shift_of(sum, difference);
          sum_of_c += c;
          packed[2 * k] = half_pair(c - sum, c + difference);
          packed[2 * k + 1] = half_pair(c - difference, c + sum);
        }
        *(uint4*)(products + (i * 2 + m) * PRODUCT_BYTES) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
#pragma unroll
    for (int by = 4; by < 32; by *= 2) {
      whole += __shfl_xor_sync(~0u, whole, by);
      sum_of_c += __shfl_xor_sync(~0u, sum_of_c, by);
    }
    if (lane < 8) {
      const u32 c = two_halves(-sum_of_c);
      char* const sums = here + X_SUMS + (token >> 3) * 256 + side * 128 + place;
      *(uint4*)sums = side ? make_uint4(c, 0, 0, 0) : make_uint4(two_halves(whole), c, c, c);
    }
  }
}
