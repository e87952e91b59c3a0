// x in the order in which `code_prefill.cu` multiplies it, 8 tokens a block: see prefill.cuh.
//
// A token is scaled by a power of two to a largest |x| in [2^14, 2^15), so that the division costs nothing
// but values below 2^-30 of the largest. Tokens past the last are zero.
//
// The blocks of a cluster split the inputs. -D: TOKENS (of a tile) 128|256. Grid: padded tokens / 8 * cluster size;
// 256 threads; dynamic shared memory: 8 rows of a block's share of slices, 16 bytes between them.

#include "prefill.cuh"

constexpr bool LEVELS = !UNIFORM;   // integers of free levels, not bits
constexpr int input_of(int b, int e) { return LEVELS ? level_input(b, e) : b + 16 * e; }

struct Arguments {
  const u16* x;            // [tokens][in_features], rows x_stride apart
  char* arranged;
  float* factors;          // [padded tokens]   2^-24 of what a token's sums are multiplied with at the end
  long long x_stride;
  int tokens, in_features, slices;
};

DEVICE u32 largest_of(u32 a, u32 b) {   // of 16-bit numbers
  u32 d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
DEVICE u32 load_word(u32 shared, u32 rank) {   // of a block of the cluster
  u32 v;
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.u32 %0, [a]; }"
               : "=r"(v) : "r"(shared), "r"(rank));
  return v;
}

// Eight inputs of a row, zeros past its end.
DEVICE uint4 read(const u16* row, int first, int in_features, bool active, bool wide) {
  if (active && wide && first + 8 <= in_features) return *(const uint4*)(row + first);
  u32 v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = first + 2 * i;
    const u32 low = active && at < in_features ? row[at] : 0, high = active && at + 1 < in_features ? row[at + 1] : 0;
    v[i] = low | high << 16;
  }
  return make_uint4(v[0], v[1], v[2], v[3]);
}

extern "C" __global__ void __launch_bounds__(256)
prefill_arrange(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(16) char rows[];
  __shared__ u32 largest[8];
  const int blocks = cluster_size(), block = cluster_rank();
  const int begin = p.slices * block / blocks, end = p.slices * (block + 1) / blocks;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int first_token = blockIdx.x / blocks * 8, pitch = (p.slices + blocks - 1) / blocks * 256 + 16;
  let_next_kernel_start();
  wait_for_previous_kernel();
  {
    const int token = first_token + warp;
    const u16* row = p.x + (long long)token * p.x_stride + begin * 128;
    const bool active = token < p.tokens, wide = ((u64)row & 15) == 0;
    const int left = p.in_features - begin * 128;
    u32 most = 0;
#pragma unroll 4
    for (int i = lane * 8; i < (end - begin) * 128; i += 256) {
      const uint4 v = read(row, i, left, active, wide);
      *(uint4*)(rows + warp * pitch + i * 2) = v;
      most = largest_of(most, largest_of(largest_of(v.x & 0x7FFF7FFFu, v.y & 0x7FFF7FFFu),
                                         largest_of(v.z & 0x7FFF7FFFu, v.w & 0x7FFF7FFFu)));
    }
    for (int s = 16; s; s >>= 1) most = largest_of(most, __shfl_xor_sync(~0u, most, s));
    if (lane == 0) largest[warp] = most;
  }
  cluster_sync();
  const int token = first_token + (lane & 7);
  u32 both = 0;
  for (int r = 0; r < blocks; r++) both = largest_of(both, load_word(shared_address(largest + (lane & 7)), r));
  const float most = x_to_float((u16)(both > both << 16 ? both >> 16 : both));
  // The exponent field of the largest; one bf16 token may be too small or too large to bring into range.
  const int exponent = min(max((int)(__float_as_uint(most) >> 23), 16), 254);
  const float up = __uint_as_float((u32)(254 + 14 - exponent) << 23 & 0x7F800000u);   // 2^(14 - e)
  if (block == 0 && threadIdx.x < 8) p.factors[token] = __uint_as_float((u32)(exponent - 14) << 23);
  const int parts = (p.slices + PART_SLICES - 1) / PART_SLICES;
  char* out = p.arranged + (long long)(token / TOKENS) * ((long long)p.slices * X_BYTES + parts * PART_BYTES);
  const int place = (token % TOKENS >> 3) * 256 + (token & 7) * 16;   // of a token in a step
  const int last = block == blocks - 1 ? parts * PART_SLICES : end;   // zeros behind the sums
  // A warp takes a slice of eight tokens; eight lanes write 128 bytes side by side.
  for (int slice = begin + warp; slice < last; slice += 8) {
    float sum = 0.f;
    if (slice < p.slices) {
      const u16* from = (const u16*)(rows + (lane & 7) * pitch) + (slice - begin) * 128;
      char* here = out + (long long)slice * X_BYTES + place;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int b = LEVELS && BITS > 2 ? i + (lane >> 3) * 4 : 4 * i + (lane >> 3);   // few conflicts of banks
        const int first = input_of(b, 0), second = input_of(b, 1);
        const float scale = LEVELS ? up : up * __uint_as_float((u32)(127 - field_position(b)) << 23);
        u32 packed[4];
#pragma unroll
        for (int t = 0; t < 4; t++) {
          const float low = x_to_float(from[32 * t + first]), high = x_to_float(from[32 * t + second]);
          packed[t] = half_pair(low * scale, high * scale);
          sum += low + high;
        }
        *(uint4*)(here + (b >> 1) * (TOKENS * 32) + (b & 1) * 128) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
      }
      sum += __shfl_xor_sync(~0u, sum, 8);
      sum += __shfl_xor_sync(~0u, sum, 16);
    }
    if (lane >= 8) continue;
    sum *= up * (1.f / 256.f);
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
  }
  cluster_sync();   // no block leaves while another reads its largest
}
