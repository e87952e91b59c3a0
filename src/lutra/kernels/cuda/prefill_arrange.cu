// x in the order in which `code_prefill.cu` multiplies it, 8 tokens a cluster: see prefill.cuh.
//
// A token is scaled by a power of two to a largest |x| in [2^14, 2^15), so that the division costs nothing
// but values below 2^-30 of the largest. Tokens past the last are zero.
//
// Two lanes share a slice of a token: each reads eight pieces of eight inputs, keeps them in registers until
// the largest of the token is known, and writes eight places of eight. The blocks of a cluster split the inputs
// and tell each other their largest. -D: TOKENS (of a tile), HELD: slices of a token that two lanes take, so
// that a warp has 2 HELD. Grid: padded tokens / 8 * cluster size; up to 256 threads.

#include "prefill.cuh"
#include "arranging.cuh"

constexpr bool LEVELS = !UNIFORM;                      // integers of free levels, not bits
constexpr bool QUARTERS = LEVELS && BITS > 2;          // of both inputs of a pair in one piece
constexpr int MOST_WARPS = 8, MOST_BLOCKS = 8;

struct Arguments {
  const u16* x;            // [tokens][in_features], rows x_stride apart
  char* arranged;
  float* factors;          // [padded tokens]   2^-24 of what a token's sums are multiplied with at the end
  long long x_stride;
  int tokens, in_features, slices;
  int flags;               // of `code_prefill.cu`, which follow the factors: set to 0
};

// Of 8 inputs each: piece (t, i) of lane `side` of a slice begins with this one.
DEVICE int piece_input(int t, int i, int side) {
  return 32 * t + (QUARTERS ? 16 * side + 8 * i : LEVELS ? 16 * side + 8 * i : 16 * i + 8 * side);
}
// A lane's place c (0 to 7) is this pair of the 16 of a word.
__host__ __device__ constexpr int place_pair(int c, int side) {
  return QUARTERS ? 4 * (c & 3) + 2 * side + (c >> 2) : LEVELS ? 2 * c + side : 8 * side + c;
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32)
prefill_arrange(const __grid_constant__ Arguments p) {
  __shared__ u32 largest[MOST_BLOCKS][MOST_WARPS][8];   // of every block and warp: 8 tokens
  const int blocks = cluster_size(), block = cluster_rank();
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31, side = lane >> 3 & 1;
  const int token = blockIdx.x / blocks * 8 + (lane & 7);
  const int first = block * (HELD * 2 * warps) + warp * 2 + (lane >> 4);   // slice
  let_next_kernel_start();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  wait_for_previous_kernel();
  uint4 held[HELD][4][2];
  u32 most = 0;
  {
    const u16* row = p.x + (long long)token * p.x_stride;
    const bool active = token < p.tokens, wide = ((u64)row & 15) == 0;
#pragma unroll
    for (int h = 0; h < HELD; h++) {
      const int at = (first + h * 2 * warps) * 128;
      const bool inside = active && wide && at + 128 <= p.in_features;
#pragma unroll
      for (int t = 0; t < 4; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (inside) held[h][t][i] = *(const uint4*)(row + at + piece_input(t, i, side));
          else held[h][t][i] = read(row, at + piece_input(t, i, side), active ? p.in_features : 0, wide);
    }
#pragma unroll
    for (int h = 0; h < HELD; h++)
#pragma unroll
      for (int t = 0; t < 8; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) most = largest_of(most, word_of(held[h][t >> 1][t & 1], i) & 0x7FFF7FFFu);
  }
  most = largest_of(most, __shfl_xor_sync(~0u, most, 8));
  most = largest_of(most, __shfl_xor_sync(~0u, most, 16));
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");   // all blocks have begun
  for (int r = lane >> 3; r < blocks; r += 4)
    store_word(shared_address(&largest[block][warp][lane & 7]), r, most);
  cluster_sync();
  u32 both = 0;
  for (int r = 0; r < blocks; r++)
#pragma unroll
    for (int w = 0; w < warps; w++) both = largest_of(both, largest[r][w][lane & 7]);
  const float value = x_to_float((u16)(both > both << 16 ? both >> 16 : both));
  // The exponent field of the largest; one bf16 token may be too small or too large to bring into range.
  const int exponent = min(max((int)(__float_as_uint(value) >> 23), 16), 254);
  const float up = __uint_as_float((u32)(254 + 14 - exponent) << 23 & 0x7F800000u);   // 2^(14 - e)
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < p.flags; i += blockDim.x) p.factors[gridDim.x / blocks * 8 + i] = 0.f;
  if (block == 0 && threadIdx.x < 8) p.factors[token] = __uint_as_float((u32)(exponent - 14) << 23);
  const int parts = (p.slices + PART_SLICES - 1) / PART_SLICES;
  char* out = p.arranged + (long long)(token / TOKENS) * ((long long)p.slices * X_BYTES + parts * PART_BYTES);
  const int place = (token % TOKENS >> 3) * 256 + (token & 7) * 16;   // of a token in a step

  auto write_sum = [&](int slice, float sum) {
    char* part = out + (long long)p.slices * X_BYTES + (slice / PART_SLICES) * PART_BYTES + place + (slice & 3) * 4;
    const auto rounded = [](float s) { return half_to_float(float_to_half(s)); };
    if (TERMS == 4) {
      char* at = part + (slice % PART_SLICES >> 2) * (TOKENS * 32);
      *(u32*)at = half_pair(sum, sum - rounded(sum));
      *(u32*)(at + 128) = half_pair(sum * -ALL, sum * -ALL - rounded(sum * -ALL));
    } else {
      char* at = part + (slice % PART_SLICES >> 3) * (TOKENS * 32) + (slice >> 2 & 1) * 128;
      *(u32*)at = UNIFORM ? half_pair(sum, sum * -ALL) : half_pair(sum, sum - rounded(sum));
    }
  };
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const int slice = first + h * 2 * warps;
    float sum = 0.f;
    char* here = out + (long long)slice * X_BYTES + place;
#pragma unroll
    for (int c = 0; c < 8; c++) {   // eight lanes write 128 bytes side by side
      const int pair = place_pair(c, side);
      const float field = side ? 1.f / (1 << field_position(place_pair(c, 1))) : 1.f / (1 << field_position(place_pair(c, 0)));
      const float scale = LEVELS ? up : up * field;
      u32 packed[4];
#pragma unroll
      for (int t = 0; t < 4; t++) {
        const int k = QUARTERS ? c & 3 : c;
        const u32 a = word_of(held[h][t][QUARTERS ? c >> 2 : 0], k >> 1);
        const u32 b = QUARTERS ? word_of(held[h][t][c >> 2], 2 + (k >> 1)) : word_of(held[h][t][1], k >> 1);
        const float low = x_to_float((u16)(k & 1 ? a >> 16 : a)), high = x_to_float((u16)(k & 1 ? b >> 16 : b));
        packed[t] = half_pair(low * scale, high * scale);
        sum += low + high;
      }
      if (slice < p.slices)
        *(uint4*)(here + (pair >> 1) * (TOKENS * 32) + (pair & 1) * 128) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
    sum += __shfl_xor_sync(~0u, sum, 8);
    if (side == 0 && slice < p.slices) write_sum(slice, sum * (up * (1.f / 256.f)));
  }
  if (block == blocks - 1 && side == 0)   // zeros behind the sums
    for (int slice = p.slices + warp * 2 + (lane >> 4); slice < parts * PART_SLICES; slice += 2 * warps)
      write_sum(slice, 0.f);
}
