// y = x W^T in integers for many tokens, on Hopper (wgmma and the bulk copy engine, sm_90a).
//
//   acc[n][m] = base * (sum over the first 32 high columns) + (sum over the other columns)      int32
//   y[m][n]   = float(acc) * (step[m] * scale[n]) + bias[n]                                     16 bit
//
// The weight is the A operand (64 output features a warpgroup), the activations are B (TOKENS tokens), so
// that 4-bit weights can go through registers. A block takes WARPGROUPS x 64 features by TOKENS tokens and
// goes from tile to tile until none is left; its first warpgroup fetches, the others multiply. Blocks stand
// alone: clusters that fetch activations for each other were 30 % slower (H200, 12288x12288, 4096 tokens).
//
// Weights, WEIGHT_BITS = 8: int8 [features][inputs], through the tensor map `w` (boxes of 128 inputs).
// WEIGHT_BITS = 4: nibbles in the order of the operand's registers, see `flat_layout.py`:
// [features / 64][k-tiles][2][128 threads][4 words]; byte b of the low nibbles is one input, that of the
// high nibbles another. A nibble is moved to the upper half of a byte, which is 16 times its value;
// sums are divided by 16, exactly, at the end.
//
// -D: TOKENS 64|128|192|256, WARPGROUPS 1..3, STAGES, WEIGHT_BITS 4|8, HORNER 0|1, Y_BF16 0|1.

#include "flat.cuh"
#include "flat_wgmma.cuh"

struct Arguments {
  TensorMap w;          // int8 [features][inputs], boxes [WARPGROUPS * 64][128]; unused with 4 bits
  TensorMap x;          // int8 [tokens][inputs], boxes [TOKENS][128]
  TensorMap y;          // 16 bit [tokens][features], boxes [ROUND][64]
  const char* packed;   // 4-bit weights
  const float* step;    // [tokens], readable up to a multiple of TOKENS
  const float* scale;   // [features], readable up to a multiple of FEATURES
  const void* bias;     // [features] or null
  int features, tokens;
  int k_tiles, high, base;          // tiles of 128 columns; high columns in 32s
  int feature_tiles, token_tiles;
  int group;            // tiles of tokens that go together through all features, so that L2 serves them
  int bias_kind;        // see flat.cuh
};

constexpr int FEATURES = WARPGROUPS * 64;
constexpr int K_TILE = 128;
constexpr int X_BYTES = TOKENS * K_TILE;
constexpr int W_GROUP_BYTES = 64 * K_TILE * WEIGHT_BITS / 8;   // of one warpgroup
constexpr int W_BYTES = WARPGROUPS * W_GROUP_BYTES;
constexpr int STAGE_BYTES = X_BYTES + W_BYTES;
constexpr int ROUND = TOKENS % 128 ? 64 : 128;                 // tokens stored at a time
constexpr int Y_BYTES = ROUND * 128;                           // of one warpgroup
constexpr int THREADS = (WARPGROUPS + 1) * 128;
constexpr int FETCH_REGISTERS = WARPGROUPS == 3 ? 32 : 40;
constexpr int MULTIPLY_REGISTERS = WARPGROUPS == 3 ? 160 : WARPGROUPS == 2 ? 232 : 240;

struct Tile {
  int feature, token;   // first ones
  DEVICE Tile(const Arguments& p, int index) {
    const int whole = p.group * p.feature_tiles;
    const int group = index / whole, rest = index - group * whole;
    const int width = min(p.group, p.token_tiles - group * p.group);
    const int row = rest / width;
    token = (group * p.group + rest - row * width) * TOKENS;
    feature = row * FEATURES;
  }
};

struct Position {   // in the ring of stages
  int stage = 0;
  u32 parity = 0;
  DEVICE void next() { if (++stage == STAGES) { stage = 0; parity ^= 1; } }
};

DEVICE void touch(const float* p) {
  asm volatile("{ .reg .f32 v; ld.global.f32 v, [%0]; }" :: "l"(p));
}
DEVICE u32 y_pair(float low, float high) {
  u32 pair;
  if (Y_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE float dequantized(int sum, float factor, float bias) {
  if (WEIGHT_BITS == 4) sum >>= 4;
  return __fadd_rn(__fmul_rn((float)sum, factor), bias);
}

// The operand of 64 rows and 128 inputs, in four products.
struct Operand {
#if WEIGHT_BITS == 8
  u64 a;
  DEVICE void load(u32 tile) { a = descriptor(tile); }
  DEVICE void multiply(int (&sum)[SUMS], int j, u64 x, int add) const { product(sum, a + 2 * j, x + 2 * j, add); }
#else
  u32 a[4][4];
  DEVICE void load(u32 tile) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4 v = load_shared(tile + half * 2048 + (threadIdx.x & 127) * 16);
      const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[2 * half + i / 2][2 * (i % 2)] = word[i] << 4 & 0xF0F0F0F0;
        a[2 * half + i / 2][2 * (i % 2) + 1] = word[i] & 0xF0F0F0F0;
      }
    }
  }
  DEVICE void multiply(int (&sum)[SUMS], int j, u64 x, int add) const { product(sum, a[j], x + 2 * j, add); }
#endif
};

struct Ring {
  u32 stages, full, empty;
  u32 mine;   // bytes from a stage to the weights of this warpgroup
  Position at;

  DEVICE u32 wait() const {
    barrier_wait(full + 8 * at.stage, at.parity);
    return stages + at.stage * STAGE_BYTES;
  }
  DEVICE void release(int stage) const { if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * stage); }
};

// The tiles with high columns, which are few: product by product. Returns their number.
DEVICE int multiply_high(int (&sum)[SUMS], const Arguments& p, Ring& ring) {
  const int tiles = p.high / 4 + 1;
  for (int k = 0; k < tiles; k++) {
    const u32 stage = ring.wait();
    Operand w;
    w.load(stage + ring.mine);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (4 * k + j == p.high) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] *= p.base;
      }
      products_begin();
      w.multiply(sum, j, descriptor(stage), k + j);
      products_commit();
      products_wait<0>();
    }
    ring.release(ring.at.stage);
    ring.at.next();
  }
  return tiles;
}

// Adds tiles to the sums; on return they are complete and all stages are released.
DEVICE void multiply(int (&sum)[SUMS], int tiles, int add, Ring& ring) {
  int previous = -1;
  const auto step = [&](Operand& w) {
    const u32 stage = ring.wait();
    w.load(stage + ring.mine);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) w.multiply(sum, j, descriptor(stage), j ? 1 : add);
    products_commit();
    products_wait<1>();
    if (previous >= 0) ring.release(previous);
    previous = ring.at.stage;
    ring.at.next();
    add = 1;
  };
  Operand even, odd;   // while the tensor cores read the registers of one, the other is loaded
  int k = 0;
  for (; k + 1 < tiles; k += 2) { step(even); step(odd); }
  if (k < tiles) step(even);
  products_wait<0>();
  if (previous >= 0) ring.release(previous);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
flat_linear(const __grid_constant__ Arguments p) {
  extern __shared__ char dynamic[];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const u32 stages = (shared_address(dynamic) + 1023) & ~1023u;   // then the tiles of y
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  const int warpgroup = threadIdx.x >> 7;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPGROUPS * 4);
    }
    barrier_init_done();
    prefetch_map(p.x);
    prefetch_map(p.y);
    if (WEIGHT_BITS == 8) prefetch_map(p.w);
  }
  __syncthreads();
  let_next_kernel_start();   // it waits for this one's end, but what it fetches first it may fetch now
  const int tiles = p.feature_tiles * p.token_tiles;
  if (warpgroup == 0) {
    give_registers<FETCH_REGISTERS>();
    if (threadIdx.x == 0) {
      const auto fetch_weights = [&](int at, int k, int feature) {
        const u32 stage = stages + at * STAGE_BYTES, barrier = full + 8 * at;
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
      // Weights of the first stages do not wait for the kernel before this one.
      const int first = min(STAGES, p.k_tiles), feature = Tile(p, blockIdx.x).feature;
      for (int k = 0; k < first; k++) fetch_weights(k, k, feature);
      wait_for_previous_kernel();
      Position at;
      at.parity = 1;   // the stages are free at first
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(p, index);
        for (int k = 0; k < p.k_tiles; k++) {
          if (index != blockIdx.x || k >= first) {
            barrier_wait(empty + 8 * at.stage, at.parity);
            fetch_weights(at.stage, k, tile.feature);
          }
          copy_box(stages + at.stage * STAGE_BYTES, p.x, k * K_TILE, tile.token, full + 8 * at.stage);
          at.next();
        }
      }
    }
  } else {
    take_registers<MULTIPLY_REGISTERS>();
    const int group = warpgroup - 1, thread = threadIdx.x & 127, lane = threadIdx.x & 31, warp = thread >> 5;
    const u32 staged = stages + STAGES * STAGE_BYTES + group * Y_BYTES;
    wait_for_previous_kernel();
    Ring ring = {stages, full, empty, (u32)(X_BYTES + group * W_GROUP_BYTES), {}};
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile(p, index);
      const int feature = tile.feature + group * 64 + warp * 16 + (lane >> 2);
      const float scale[2] = {p.scale[feature], p.scale[feature + 8]};
      const auto bias_at = [&](int i) { return i < p.features ? bias_of(p.bias, p.bias_kind, i) : 0.f; };
      const float bias[2] = {bias_at(feature), bias_at(feature + 8)};
      if (2 * thread < TOKENS) touch(p.step + tile.token + 2 * thread);   // in the first cache by the time it is used
      int sum[SUMS];
      const int begun = HORNER ? multiply_high(sum, p, ring) : 0;
      multiply(sum, p.k_tiles - begun, HORNER, ring);
      const float* step = p.step + tile.token + 2 * (lane & 3);
      // Tile i of a store: features 8 (i & 1), tokens 8 (i >> 1); rows of 128 bytes, swizzled.
      const u32 row = staged + ((lane & 7) + (lane >> 4) * 8) * 128;
      const u32 at_row = row + (((2 * warp + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
#pragma unroll
      for (int round = 0; round < TOKENS / ROUND; round++) {
        if (thread == 0) stores_read();
        group_barrier(1 + group, 128);
#pragma unroll
        for (int i = 0; i < ROUND / 16; i++) {
          u32 pair[4];
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const int column = round * ROUND + 16 * i + 8 * j, d = column / 2;
            const float2 s = *(const float2*)(step + column);
#pragma unroll
            for (int half = 0; half < 2; half++)
              pair[2 * j + half] = y_pair(
                dequantized(sum[d + 2 * half], __fmul_rn(s.x, scale[half]), bias[half]),
                dequantized(sum[d + 2 * half + 1], __fmul_rn(s.y, scale[half]), bias[half]));
          }
          store_transposed(at_row + i * 16 * 128, pair[0], pair[1], pair[2], pair[3]);
        }
        shared_to_copy_engine();
        group_barrier(1 + group, 128);
        if (thread == 0) {
          store_box(p.y, tile.feature + group * 64, tile.token + round * ROUND, staged);
          stores_commit();
        }
      }
    }
    if (thread == 0) stores_done();
  }
}
