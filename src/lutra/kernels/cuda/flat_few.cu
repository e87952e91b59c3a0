// y = x W^T in integers for few tokens (1 to 128), on Hopper: what counts is to read the weights once, fast.
//
// The same sums, layouts of weights and epilogue as flat_linear.cu. A block takes WARPGROUPS x 64 features
// and TOKENS tokens; the blocks of a cluster (8 at most) split the inputs between them and add their 32-bit sums through
// distributed shared memory. Integers: the order of additions does not matter, no workspace is needed, two
// runs give the same bits. The last warp fetches, the others multiply.
//
// -D: TOKENS 8|16|32|64|128, WARPGROUPS 1|2, STAGES, BLOCKS (of a processor), WEIGHT_BITS 4|8, HORNER 0|1,
// Y_BF16 0|1. Grid: (cluster size, feature tiles, token tiles).

#include "flat.cuh"
#include "flat_wgmma.cuh"

struct Arguments {
  TensorMap w;          // int8 [features][inputs], boxes [WARPGROUPS * 64][128]; unused with 4 bits
  TensorMap x;          // int8 [tokens][inputs], boxes [TOKENS][128]
  u16* y;               // 16 bit [tokens][features], rows y_stride elements apart
  const char* packed;   // 4-bit weights
  const float* step;    // [tokens]
  const float* scale;   // [features]
  const void* bias;     // [features] or null
  long long y_stride;
  int features, tokens;
  int k_tiles, high, base;   // tiles of 128 columns; high columns in 32s
  int bias_kind;        // see flat.cuh
};

constexpr int FEATURES = WARPGROUPS * 64;
constexpr int K_TILE = 128;
constexpr int X_BYTES = TOKENS * K_TILE;
constexpr int W_GROUP_BYTES = 64 * K_TILE * WEIGHT_BITS / 8;
constexpr int W_BYTES = WARPGROUPS * W_GROUP_BYTES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int THREADS = WARPGROUPS * 128 + 32;
constexpr int PITCH = FEATURES + 4;   // of the block's sums in shared memory, which take the ring's place

// Adds a tile of 128 columns; SPLIT: the sums are multiplied by the base before product `high` of it.
template <bool SPLIT> DEVICE void multiply_tile(int (&sum)[SUMS], u32 w, u64 x, int high, int base) {
  Operand operand;
  operand.load(w);
  products_begin();
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (SPLIT && j == high) {
#pragma unroll
      for (int i = 0; i < SUMS; i++) sum[i] *= base;
    }
    if (SPLIT) products_begin();
    operand.multiply(sum, j, x, 1);
    if (SPLIT || j == 3) {
      products_commit();
      products_wait<0>();
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
flat_few(const __grid_constant__ Arguments p) {
  extern __shared__ char dynamic[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 base = shared_address(dynamic), stages = (base + 1023) & ~1023u;
  int* sums = (int*)(dynamic + (stages - base));
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const u32 parts = cluster_size(), part = cluster_rank();
  const int begin = (int)((long long)p.k_tiles * part / parts);
  const int end = (int)((long long)p.k_tiles * (part + 1) / parts);
  const int feature = blockIdx.y * FEATURES, token = blockIdx.z * TOKENS;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPGROUPS * 4);
    }
    barrier_init_done();
  }
  __syncthreads();
  let_next_kernel_start();   // it waits for this one's end, but what it fetches first it may fetch now
  if (warp == WARPGROUPS * 4) {
    if (lane == 0) {
      const auto load_weights = [&](int k) {
        const u32 stage = stages + (k - begin) % STAGES * STAGE_BYTES, barrier = full + 8 * ((k - begin) % STAGES);
        barrier_expect(barrier, STAGE_BYTES);
#if WEIGHT_BITS == 8
        copy_box(stage + X_BYTES, p.w, k * K_TILE, feature, barrier);
#else
        for (int g = 0; g < WARPGROUPS; g++)
          copy_bulk(stage + X_BYTES + g * W_GROUP_BYTES,
                     p.packed + ((long long)(feature / 64 + g) * p.k_tiles + k) * W_GROUP_BYTES, W_GROUP_BYTES,
                     barrier);
#endif
      };
      const auto load_x = [&](int k) {
        const int s = (k - begin) % STAGES;
        copy_box(stages + s * STAGE_BYTES, p.x, k * K_TILE, token, full + 8 * s);
      };
      const int ahead = min(end, begin + STAGES);   // weights do not wait for the kernel before this one
      for (int k = begin; k < ahead; k++) load_weights(k);
      wait_for_previous_kernel();
      for (int k = begin; k < ahead; k++) load_x(k);
      for (int k = ahead; k < end; k++) {
        const int i = k - begin;
        barrier_wait(empty + 8 * (i % STAGES), (i / STAGES + 1) & 1);
        load_weights(k);
        load_x(k);
      }
    }
    __syncwarp();
  } else {
    const int group = warp >> 2;
    int sum[SUMS];
#pragma unroll
    for (int i = 0; i < SUMS; i++) sum[i] = 0;
    for (int k = begin; k < end; k++) {
      const int s = (k - begin) % STAGES;
      barrier_wait(full + 8 * s, (k - begin) / STAGES & 1);
      const u32 stage = stages + s * STAGE_BYTES, mine = stage + X_BYTES + group * W_GROUP_BYTES;
      if (HORNER && 4 * k <= p.high) multiply_tile<true>(sum, mine, descriptor(stage), p.high - 4 * k, p.base);
      else multiply_tile<false>(sum, mine, descriptor(stage), 0, 0);
      __syncwarp();   // one lane speaks for all, which may have read 4-bit weights from it
      if (lane == 0) barrier_arrive(empty + 8 * s);
    }
    if (HORNER && 4 * end <= p.high) {   // all of this block's columns are high
#pragma unroll
      for (int i = 0; i < SUMS; i++) sum[i] *= p.base;
    }
    group_barrier(1, WARPGROUPS * 128);   // all tiles are used up: the sums may take their place
    const int at = group * 64 + (warp & 3) * 16 + (lane >> 2);
#pragma unroll
    for (int j = 0; j < SUMS; j += 4) {
      int* column = sums + (2 * j + 2 * (lane & 3)) * PITCH + at;
      column[0] = sum[j];
      column[PITCH] = sum[j + 1];
      column[8] = sum[j + 2];
      column[PITCH + 8] = sum[j + 3];
    }
  }
  wait_for_previous_kernel();   // it may have written the steps and may still read y
  __syncthreads();   // which the cluster's barrier implies; tools that look for races only know this one
  cluster_sync();
  const int count = TOKENS * FEATURES / 4;
  for (int i = part * THREADS + threadIdx.x; i < count; i += parts * THREADS) {
    const int m = i / (FEATURES / 4), n = i % (FEATURES / 4) * 4;
    if (token + m >= p.tokens || feature + n >= p.features) continue;
    const u32 address = shared_address(sums + m * PITCH + n);
    float4 each[8];   // bits of integers; all loads under way before the first is needed
#pragma unroll
    for (u32 r = 0; r < 8; r++) each[r] = r < parts ? load_cluster(address, r) : make_float4(0.f, 0.f, 0.f, 0.f);
    int total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 8; r++) {
      total[0] += __float_as_int(each[r].x); total[1] += __float_as_int(each[r].y);
      total[2] += __float_as_int(each[r].z); total[3] += __float_as_int(each[r].w);
    }
    const float step = p.step[token + m];
    u16* y = p.y + (token + m) * p.y_stride + feature + n;
    u16 out[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (feature + n + j >= p.features) { out[j] = 0; continue; }
      const int at = feature + n + j;
      out[j] = rounded<Y_BF16>(
        dequantized<WEIGHT_BITS>(total[j], step, p.scale[at], bias_of(p.bias, p.bias_kind, at)));
    }
    store_four(y, out, feature + n, p.features);
  }
  cluster_sync();   // no block leaves while another reads its sums
}
