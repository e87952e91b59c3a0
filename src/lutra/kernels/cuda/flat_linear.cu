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
// -D: TOKENS 64|128|192|256, WARPGROUPS 1..3, STAGES, WEIGHT_BITS 4|8, HORNER 0|1, Y_BF16 0|1, OVERLAP 0|1 (1: 256
// tokens, three tiles of columns at least, 32 high ones at most).

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
constexpr int FETCH_REGISTERS = WARPGROUPS == 2 ? 24 : 32;
constexpr int MULTIPLY_REGISTERS = WARPGROUPS == 3 ? 160 : 240;

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

struct Ring {
  u32 stages, full, empty;
  u32 mine;   // bytes from a stage to the weights of this warpgroup
  Position at;

  DEVICE u32 wait() const {
    barrier_wait(full + 8 * at.stage, at.parity);
    return stages + at.stage * STAGE_BYTES;
  }
  DEVICE void release(int stage) const {
    __syncwarp();   // one lane speaks for all, which may have read 4-bit weights from it
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * stage);
  }
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

struct Stage {   // that is under way, -1 is none
  int number;
  DEVICE void release(const Ring& ring) const { if (number >= 0) ring.release(number); }
};

// Adds tiles to the sums. Those of the last are under way at the end, and its stage is returned; `before` is the one
// that is under way at first.
DEVICE Stage multiply(int (&sum)[SUMS], int tiles, int add, Ring& ring, Stage before) {
  const auto step = [&](Operand& w) {
    const u32 stage = ring.wait();
    w.load(stage + ring.mine);
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) {
#if OVERLAP   // registers that are multiplied by halves elsewhere; the compiler would copy them for whole products
      w.multiply_half<0>(sum, j, descriptor(stage), j ? 1 : add);
      w.multiply_half<1>(sum, j, descriptor(stage), j ? 1 : add);
#else
      w.multiply(sum, j, descriptor(stage), j ? 1 : add);
#endif
    }
    products_commit();
    products_wait<1>();
    before.release(ring);
    before.number = ring.at.stage;
    ring.at.next();
    add = 1;
  };
  Operand even, odd;   // while the tensor cores read the registers of one, the other is loaded
  int k = 0;
  for (; k + 1 < tiles; k += 2) { step(even); step(odd); }
  if (k < tiles) step(even);
  return before;
}

#if OVERLAP
// A tile of columns that is multiplied by half of the tokens at a time. FIRST: the sums begin with it.
template <bool FIRST> struct Halves {
  Operand w;
  u32 x;

  DEVICE Stage load(Ring& ring) {
    const Stage stage = {ring.at.stage};
    x = ring.wait();
    w.load(x + ring.mine);
    ring.at.next();
    return stage;
  }
  template <int HALF> DEVICE void multiply(int (&sum)[SUMS], int base) const {
    products_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (FIRST && HORNER && j == 1) {   // behind the high columns
        products_commit();
        products_wait<0>();
#pragma unroll
        for (int i = 0; i < SUMS / 2; i++) sum[HALF * (SUMS / 2) + i] *= base;
        products_begin();
      }
      w.template multiply_half<HALF>(sum, j, descriptor(x), !FIRST || j > 0);
    }
    products_commit();
  }
};
#endif

struct Row {   // where a tile of a warpgroup goes, and what its lanes' two features are scaled by
  int feature, token;
  float scale[2], bias[2];
  DEVICE Row(const Arguments& p, const Tile& tile, int group) {
    const int thread = threadIdx.x & 127;
    feature = tile.feature + group * 64;
    token = tile.token;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = feature + (thread >> 5) * 16 + ((thread & 31) >> 2) + 8 * half;
      scale[half] = p.scale[i];
      bias[half] = i < p.features ? bias_of(p.bias, p.bias_kind, i) : 0.f;
    }
    if (2 * thread < TOKENS) touch(p.step + token + 2 * thread);   // in the first cache by the time it is used
  }
};

struct Output {
  const Arguments& p;
  const u32 staged;
  const int group, thread, lane;
  u32 at_row;
  DEVICE Output(const Arguments& p, u32 staged, int group)
      : p(p), staged(staged), group(group), thread(threadIdx.x & 127), lane(threadIdx.x & 31) {
    // Tile i of a store: features 8 (i & 1), tokens 8 (i >> 1); rows of 128 bytes, swizzled.
    const u32 row = staged + ((lane & 7) + (lane >> 4) * 8) * 128;
    at_row = row + (((2 * (thread >> 5) + (lane >> 3 & 1)) ^ (lane & 7)) << 4);
  }
  // ROUND tokens to memory.
  DEVICE void store(const int (&sum)[SUMS], const Row& row, int round) const {
    const float* step = p.step + row.token + 2 * (lane & 3);
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
          pair[2 * j + half] = rounded_pair<Y_BF16>(
            dequantized<WEIGHT_BITS>(sum[d + 2 * half], s.x, row.scale[half], row.bias[half]),
            dequantized<WEIGHT_BITS>(sum[d + 2 * half + 1], s.y, row.scale[half], row.bias[half]));
      }
      store_transposed(at_row + i * 16 * 128, pair[0], pair[1], pair[2], pair[3]);
    }
    shared_to_copy_engine();
    group_barrier(1 + group, 128);
    if (thread == 0) {
      store_box(p.y, row.feature, row.token + round * ROUND, staged);
      stores_commit();
    }
  }
};

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
    const int group = warpgroup - 1;
    const u32 staged = stages + STAGES * STAGE_BYTES + group * Y_BYTES;
    wait_for_previous_kernel();
    Ring ring = {stages, full, empty, (u32)(X_BYTES + group * W_GROUP_BYTES), {}};
    const Output output(p, staged, group);
    int sum[SUMS];
#if OVERLAP
    // The first and the last tile of columns are multiplied by halves of the tokens: while the tensor cores have one
    // half of the last, or of the first of the next tile of y, the other half is stored.
    Stage first, last;
    const auto multiply_rest = [&]() {   // all behind the first; the second half of the last is under way at the end
      const Stage previous = multiply(sum, p.k_tiles - 2, 1, ring, first);
      Halves<false> halves;
      last = halves.load(ring);
      halves.multiply<0>(sum, 0);
      halves.multiply<1>(sum, 0);
      products_wait<2>();
      previous.release(ring);
      products_wait<1>();
    };
    int index = blockIdx.x;
    {
      Halves<true> halves;
      first = halves.load(ring);
      halves.multiply<0>(sum, p.base);
      halves.multiply<1>(sum, p.base);
    }
    for (; index + (int)gridDim.x < tiles; index += gridDim.x) {
      const Row row(p, Tile(p, index), group);
      multiply_rest();
      output.store(sum, row, 0);
      Halves<true> halves;
      first = halves.load(ring);
      halves.multiply<0>(sum, p.base);
      products_wait<1>();
      last.release(ring);
      output.store(sum, row, 1);
      halves.multiply<1>(sum, p.base);
    }
    const Row row(p, Tile(p, index), group);
    multiply_rest();
    output.store(sum, row, 0);
    products_wait<0>();
    output.store(sum, row, 1);
#else
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Row row(p, Tile(p, index), group);
      const int begun = HORNER ? multiply_high(sum, p, ring) : 0;
      const Stage last = multiply(sum, p.k_tiles - begun, HORNER, ring, {-1});
      products_wait<0>();
      last.release(ring);
#pragma unroll
      for (int round = 0; round < TOKENS / ROUND; round++) output.store(sum, row, round);
    }
#endif
    if ((threadIdx.x & 127) == 0) stores_done();
  }
}
