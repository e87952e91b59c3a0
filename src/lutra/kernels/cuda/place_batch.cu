// y = x W^T for 9 to 64 tokens by sparse products of warpgroups (wgmma.sp) in which no weight bit is unpacked, for
// Hopper (sm_90a): free levels of 2 to 4 bits, groups of 128 and more, scales in half.
//
// The products are those of `sparse_linear.cu`: the two numbers that a row has for every four inputs are the alphas
// of two planes, the four places are what two inputs add up to by their signs, and the places that the numbers pick
// are the bits of the planes. So the operand of a row is the same two numbers from the first to the last input of a
// group, the metadata are plane words interleaved by two bits, and the sums stay in the accumulators. A dense
// product for each slice adds the offset of the levels times the sum of x, and takes off what `place_arrange.cu`
// added to the places to round them by less.
//
// A block has GROUPS warpgroups of TALL x 64 rows each; one more (of it, one thread) fetches weights, scales and x
// into a ring. Blocks share the work as units.cuh says.
//
// -D: TOKENS 16|32|64, GROUPS 2 to 4, TALL 1|2|4, STAGES. Grid: as many blocks as the card has processors, or fewer.

#include "fields.cuh"
#include "hopper.cuh"

constexpr int ROWS = GROUPS * TALL * 64;
constexpr int THREADS = GROUPS * 128 + 128;
constexpr int FETCH_REGISTERS = 40;
constexpr int START_REGISTERS = 65536 / THREADS / 8 * 8;   // of a thread, as launched: what the compiler takes
constexpr int MULTIPLY_REGISTERS = (START_REGISTERS * (GROUPS + 1) - FETCH_REGISTERS) / GROUPS / 8 * 8;
constexpr int GROUP_SCALE_BYTES = 16 * SLOTS * 2;     // of 16 rows
constexpr int TILES = ROWS / 16;                      // of 16 rows; a warp has one
constexpr int COUPLES = (BITS + 1) / 2;               // of planes
constexpr int PRODUCT_BYTES = TOKENS * 64;            // of x: 16 inputs, four places for each two
constexpr int X_SUMS = 8 * PRODUCT_BYTES, X_BYTES = X_SUMS + TOKENS * 32;   // of a slice, see place_arrange.cu
constexpr int PLANES = TILES * SLICE_BYTES, SCALES = TILES * GROUP_SCALE_BYTES;
constexpr int AT_PLANES = X_BYTES, AT_SCALES = AT_PLANES + PLANES;   // of a slice in the ring
constexpr int STAGE_BYTES = AT_SCALES + SCALES;
constexpr int RESULT_BYTES = 16 * TOKENS * 2;         // of a warp and 16 rows, behind the ring
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr float RESULT_UNIT = 1.f;
constexpr u32 PLACES_STRIDES = 512 >> 4;              // as X_STRIDES, of places

#include "units.cuh"

struct Arguments {
  TensorMap planes;        // [tiles][slices * words of a slice], see common.cuh; boxes: TILES slices
  TensorMap scales;        // [tiles][groups * words of a group]; boxes: TILES groups
  const char* arranged;    // see place_arrange.cu
  const float* factors;
  Results results;         // tokens <= TOKENS
  int tiles, items, groups, items_per_group;
  Shares shares;
};

// d += A x, 64 rows by N tokens by 16 inputs; see multiply_add of hopper.cuh. The numbers of a row are the same two
// in turn, a[0] and a[2] of rows g, a[1] and a[3] of rows g + 8. Places are in the words of lanes 0 and 1 of every four, or 2 and 3.
template <int N, int PLACES_OF>
DEVICE void multiply_add_places(float (&d)[N / 2], const u32 (&a)[4], u64 x, u32 places);
template <> DEVICE void multiply_add_places<16, 0>(float (&d)[8], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n16k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7"
    "}, {%8, %9, %10, %11}, %12, %13, 0, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}
template <> DEVICE void multiply_add_places<16, 1>(float (&d)[8], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n16k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7"
    "}, {%8, %9, %10, %11}, %12, %13, 1, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}
template <> DEVICE void multiply_add_places<32, 0>(float (&d)[16], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
    "}, {%16, %17, %18, %19}, %20, %21, 0, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}
template <> DEVICE void multiply_add_places<32, 1>(float (&d)[16], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
    "}, {%16, %17, %18, %19}, %20, %21, 1, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}
template <> DEVICE void multiply_add_places<64, 0>(float (&d)[32], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
    "}, {%32, %33, %34, %35}, %36, %37, 0, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}
template <> DEVICE void multiply_add_places<64, 1>(float (&d)[32], const u32 (&a)[4], u64 x, u32 places) {
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16 {"
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
    "}, {%32, %33, %34, %35}, %36, %37, 1, 1, 1, 1, 0;"
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
      "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
      "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"(places));
}

DEVICE void fetch(const Arguments& p, int unit, int last, u32 ring, u32 full, u32 empty) {
  const int slices = p.items * 2, ahead = min(unit + STAGES, last);
  auto fetch_weights = [&](int tile, int slice, u32 stage, u32 barrier) {
    const int group = GROUP == 256 ? slice / 2 / p.items_per_group : slice;
    barrier_expect(barrier, STAGE_BYTES);
    copy_box(stage + AT_PLANES, p.planes, slice * (SLICE_BYTES / 4), tile * TILES, barrier);
    copy_box(stage + AT_SCALES, p.scales, group * (GROUP_SCALE_BYTES / 4), tile * TILES, barrier);
  };
  auto fetch_x = [&](int slice, u32 stage, u32 barrier) {
    copy_bulk(stage, p.arranged + (long long)slice * X_BYTES, X_BYTES, barrier);
  };
  Place at = {0, full, 0};
  for (int u = unit; u < ahead; u++, at.next(full)) fetch_weights(u / slices, u % slices, ring + at.stage, at.barrier);
  wait_for_previous_kernel();
  at = {0, full, 0};
  for (int u = unit; u < ahead; u++, at.next(full)) fetch_x(u % slices, ring + at.stage, at.barrier);
  Place used = {0, empty, 0};
  int tile = ahead / slices, slice = ahead % slices;
#pragma unroll 1
  for (int u = ahead; u < last; u++) {
    barrier_wait(used.barrier, used.parity);
    fetch_weights(tile, slice, ring + used.stage, used.barrier - 8 * STAGES);
    fetch_x(slice, ring + used.stage, used.barrier - 8 * STAGES);
    used.next(empty);
    if (++slice == slices) {
      slice = 0;
      tile++;
    }
  }
}

DEVICE u32 bytes_of(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// What a warp multiplies a slice with: 16 rows.
struct Operand {
  u32 numbers[COUPLES][4], places[COUPLES][4], others[4];

  // From addresses in shared memory: the planes of a tile, and its scales.
  DEVICE void make(const char* planes, const char* scales, int lane) {
    u32 slot[SLOTS + 1];   // of rows g and g + 8
#pragma unroll
    for (int q = 0; q < SLOTS; q++) slot[q] = *(const u32*)(scales + (lane >> 2) * (4 * SLOTS) + 4 * q);
    uint2 words[2 * COUPLES];
#pragma unroll
    for (int q = 0; q < 2 * COUPLES; q++)
      words[q] = q < BITS ? *(const uint2*)(planes + q * 256 + lane * 8) : make_uint2(0, 0);
#pragma unroll
    for (int c = 0; c < COUPLES; c++) {
      const u32 first = slot[2 * c], second = 2 * c + 1 < BITS ? slot[2 * c + 1] : 0;
      numbers[c][0] = bytes_of(first, second, 0x5410);
      numbers[c][1] = bytes_of(first, second, 0x7632);
      // Four registers side by side. Made in two ways they are four for the compiler, too, which else copies two of
      // them for every product.
      numbers[c][2] = bytes_of(second, first, 0x1054);
      numbers[c][3] = bytes_of(second, first, 0x3276);
#pragma unroll
      for (int h = 0; h < 2; h++) {   // halves of the words, those of rows g and g + 8 side by side
        const u32 pick = h ? 0x7632 : 0x5410;
        const u32 a = __byte_perm(words[2 * c].x, words[2 * c].y, pick);
        const u32 b = __byte_perm(words[2 * c + 1].x, words[2 * c + 1].y, pick);
        places[c][2 * h] = choose_bits(0x33333333u, a, b << 2);
        places[c][2 * h + 1] = choose_bits(0x33333333u, a >> 2, b);
      }
    }
    // Two columns of each lane: the offset, alphas of planes 0 to 2; behind them, in lane 0, that of plane 3.
    const int t = lane & 3;
    const u32 here = t == 0 ? slot[SLOTS - 1] : t == 1 ? slot[0] : t == 2 ? slot[1] : BITS > 2 ? slot[2] : 0;
    others[0] = __byte_perm(here, 0, 0x1010);
    others[1] = __byte_perm(here, 0, 0x3232);
    const u32 last = BITS == 4 && t == 0 ? slot[3] : 0;
    others[2] = __byte_perm(last, 0, 0x1010);
    others[3] = __byte_perm(last, 0, 0x3232);
  }
};

DEVICE void multiply_all(Operand& by, float (&d)[SUMS], u32 stage) {
#pragma unroll
  for (int c = 0; c < COUPLES; c++) {   // ready before the products begin, whatever the compiler thinks
    asm volatile("" : "+r"(by.numbers[c][0]), "+r"(by.numbers[c][1]), "+r"(by.numbers[c][2]), "+r"(by.numbers[c][3]));
    asm volatile("" : "+r"(by.places[c][0]), "+r"(by.places[c][1]), "+r"(by.places[c][2]), "+r"(by.places[c][3]));
  }
  asm volatile("" : "+r"(by.others[0]), "+r"(by.others[1]), "+r"(by.others[2]), "+r"(by.others[3]));
  const u32 x = x_descriptor(stage);
  const u64 first = (u64)PLACES_STRIDES << 32 | x;
  products_begin();
#pragma unroll
  for (int i = 0; i < 4; i++)   // half and middle two bits
#pragma unroll
    for (int c = 0; c < COUPLES; c++) {
      multiply_add_places<TOKENS, 0>(d, by.numbers[c], first + i * (PRODUCT_BYTES >> 4), by.places[c][i]);
      multiply_add_places<TOKENS, 1>(d, by.numbers[c], first + (4 + i) * (PRODUCT_BYTES >> 4), by.places[c][i]);
    }
  multiply_add<TOKENS>(d, by.others, x + (X_SUMS >> 4));
  products_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
place_batch(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // the ring, results of each warp
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  __shared__ float factors[TOKENS];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);   // uniform
  const int slices = p.items * 2, first = p.shares.first(blockIdx.x), last = p.shares.first(blockIdx.x + 1);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    init_ring(full, empty, STAGES, GROUPS * 4);
  }
  __syncthreads();
  let_next_kernel_start();

  if (warp >= GROUPS * 4) {
    give_registers<FETCH_REGISTERS>();
    if (warp == GROUPS * 4 && lane == 0) fetch(p, first, last, shared_address(shared), full, empty);
    return;
  }
  take_registers<MULTIPLY_REGISTERS>();
  const u32 ring = shared_address(shared);
  auto tile_of = [&](int t) { return ((warp >> 2) * TALL + t) * 4 + (warp & 3); };   // of the block's
  Place read = {0, full, 0}, used = {0, empty, 0};
  auto release = [&]() {
    __syncwarp();
    if (lane == 0) barrier_arrive(used.barrier);
    used.next(empty);
  };
  float sum[TALL][SUMS];
  auto make = [&](Operand& to, int t) {   // tile t of the slice to be read
    const char* at = shared + read.stage;
    to.make(at + AT_PLANES + tile_of(t) * SLICE_BYTES, at + AT_SCALES + tile_of(t) * GROUP_SCALE_BYTES, lane);
  };
  wait_for_previous_kernel();
  if (threadIdx.x < TOKENS) factors[threadIdx.x] = p.factors[threadIdx.x];
  asm volatile("bar.sync 1, %0;" :: "n"(GROUPS * 128) : "memory");

#pragma unroll 1
  for (int unit = first; unit < last;) {
    const Item item(unit, last, slices);
    unit += item.end - item.begin;
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) sum[t][i] = 0.f;
    // While the products of one operand run, the next is made; if there is but one, they are waited for.
    Operand operand[2];
    auto slice = [&](auto first_slice) {
      constexpr bool FIRST = decltype(first_slice)::value;
      barrier_wait(read.barrier, read.parity);
#pragma unroll
      for (int t = 0; t < TALL; t++) {
        if (TALL == 1 && !FIRST) {
          products_wait<0>();
          release();
        }
        make(operand[t % 2], t);
        multiply_all(operand[t % 2], sum[t], ring + read.stage);
        if (TALL > 1 && (t > 0 || !FIRST)) products_wait<1>();
        if (TALL > 1 && t == 0 && !FIRST) release();   // of the slice before
      }
      read.next(full);
    };
    slice(Yes());
#pragma unroll 1
    for (int n = item.begin + 1; n < item.end; n++) slice(No());
    products_wait<0>();
    release();
#pragma unroll
    for (int t = 0; t < TALL; t++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) asm volatile("" : "+f"(sum[t][i]));
    if (item.begin > 0) {
      give_sums(p.shares, sum, blockIdx.x * (GROUPS * 4) + warp);
      continue;
    }
    take_sums(p.shares, sum, warp, GROUPS * 4, item.end, slices);
#pragma unroll
    for (int t = 0; t < TALL; t++)
      store_results(p.results, sum[t], item.tile * ROWS + tile_of(t) * 16, factors, shared + STAGES * STAGE_BYTES + warp * RESULT_BYTES);
  }
}
