// y = x W^T for some tens of tokens, on fp16 tensor cores of Hopper (wgmma, sm_90a).
//
// Weights are the A operand, cut from plane words in registers as exact subnormal halves (fields.cuh);
// x comes arranged by arrange.cu, by bulk copies into a ring in shared memory. Products of one slice of
// 128 inputs are exact integers times x, added in fp32, and only then multiplied by the group's alpha in
// fp32: no weight is ever rounded. With uniform levels a weight is one operand, else one per plane.
//
// A block takes WARPGROUPS x 64 rows and TOKENS tokens; the blocks of a cluster split the inputs and add
// up through distributed shared memory, in order: two runs give the same bits. The first thread fetches x.
//
// -D: TOKENS 8|16|32|64, WARPGROUPS, STAGES (slices of x in the ring), AHEAD (slices of weights in
// registers), BLOCKS (of a processor at a time). GROUP is 128 or 256. Grid: (cluster size, row blocks, token tiles).

#include "fields.cuh"
#include "hopper.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  const char* arranged;    // see arrange.cu
  const float* factors;
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;
  int tiles, items, groups, items_per_group;
};

constexpr int ROWS = WARPGROUPS * 64;
constexpr int THREADS = WARPGROUPS * 128;
constexpr int LAG = 2;                                // slices that warps may be apart
constexpr int X_BYTES = TOKENS * 260;                 // a slice of x and its sums
constexpr int SUMS = TOKENS / 2;                      // of a lane
constexpr int PITCH = ROWS + 4;                       // of the block's sums in shared memory

DEVICE uint2 load_weights(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// As multiply_add, or from zero: clearing the sums would take registers that some widths do not have.
template <int N> DEVICE void matrix_product(float (&d)[N / 2], const u32 (&a)[4], u32 x, bool add);
template <> DEVICE void matrix_product<8>(float (&d)[4], const u32 (&a)[4], u32 x, bool add) {
  asm volatile("{ .reg .pred p; .reg .b64 x; setp.ne.b32 p, %10, 0; mov.b64 x, {%8, %9};\n"
               "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, x, p, 1, 1, 0; }"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES), "r"((int)add));
}
template <> DEVICE void matrix_product<16>(float (&d)[8], const u32 (&a)[4], u32 x, bool add) {
  asm volatile("{ .reg .pred p; .reg .b64 x; setp.ne.b32 p, %14, 0; mov.b64 x, {%12, %13};\n"
               "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, "
               "{%8, %9, %10, %11}, x, p, 1, 1, 0; }"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES), "r"((int)add));
}
template <> DEVICE void matrix_product<32>(float (&d)[16], const u32 (&a)[4], u32 x, bool add) {
  asm volatile("{ .reg .pred p; .reg .b64 x; setp.ne.b32 p, %22, 0; mov.b64 x, {%20, %21};\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
               "%10, %11, %12, %13, %14, %15}, "
               "{%16, %17, %18, %19}, x, p, 1, 1, 0; }"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                 "+f"(d[15])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES), "r"((int)add));
}
template <> DEVICE void matrix_product<64>(float (&d)[32], const u32 (&a)[4], u32 x, bool add) {
  asm volatile("{ .reg .pred p; .reg .b64 x; setp.ne.b32 p, %38, 0; mov.b64 x, {%36, %37};\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
               "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "
               "%29, %30, %31}, "
               "{%32, %33, %34, %35}, x, p, 1, 1, 0; }"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
                 "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),
                 "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),
                 "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),
                 "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x), "r"(X_STRIDES), "r"((int)add));
}

// What a lane needs of one slice: the words of rows g and g + 8 of all planes, and their scales.
struct Weights {
  uint2 plane[BITS];
  u32 raw[SLOTS * SCALE_SIZE / 2];   // scales as stored: nothing may wait for a load before it is used

  DEVICE void load(const char* planes, const char* scales) {
#pragma unroll
    for (int q = 0; q < BITS; q++) plane[q] = load_weights(planes + q * 256);
#pragma unroll
    for (int s = 0; s < SLOTS * SCALE_SIZE / 2; s++) raw[s] = ((const u32*)scales)[s];
  }
  DEVICE float2 scale(int slot) const { return scale_pair((const char*)raw, slot); }
};

// x is the lower half of a descriptor, x_sums the sums of the lane's first two tokens.
DEVICE void multiply_slice(const Weights& w, u32 x, const float* x_sums, float (&sum)[SUMS]) {
  float2 offset = w.scale(SLOTS - 1);   // of a weight whose bits are all 0, as fields count them
#pragma unroll
  for (int o = 0; o < OPERANDS; o++) {
    Fields fields[2];
    u32 low[CODES ? BITS : 1], high[CODES ? BITS : 1];
#pragma unroll
    for (int q = 0; q < (CODES ? BITS : 1); q++) {
      low[q] = w.plane[CODES ? q : o].x;
      high[q] = w.plane[CODES ? q : o].y;
    }
    fields[0].interleave(low);
    fields[1].interleave(high);
    u32 a[8][4];
    float part[SUMS];
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int j = half * 4; j < half * 4 + 4; j++) {
        a[j][0] = fields[0].pair(2 * j);
        a[j][1] = fields[1].pair(2 * j);
        a[j][2] = fields[0].pair(2 * j + 1);
        a[j][3] = fields[1].pair(2 * j + 1);
      }
      products_begin();
#pragma unroll
      for (int j = half * 4; j < half * 4 + 4; j++)
        matrix_product<TOKENS>(part, a[j], x + j * (TOKENS * 2), j > 0);
      products_commit();
    }
    products_wait<0>();
    // Levels +1 and -1 from bits 1 and 0; a code c of BITS planes is sum_q 2^(BITS-1-q) b_q.
    float2 step;
    if (CODES) {
      const float2 alpha = w.scale(0);
      const float all = 2.f - 2.f / (1 << BITS);
      step = make_float2(alpha.x * (4.f / (1 << BITS)), alpha.y * (4.f / (1 << BITS)));
      offset.x -= all * alpha.x;
      offset.y -= all * alpha.y;
    } else {
      const float2 alpha = w.scale(UNIFORM ? 0 : o);
      const float level = UNIFORM ? 1.f / (1 << o) : 1.f;
      step = make_float2(2.f * level * alpha.x, 2.f * level * alpha.y);
      offset.x -= level * alpha.x;
      offset.y -= level * alpha.y;
    }
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      sum[i] = fmaf(step.x, part[i], sum[i]);
      sum[i + 1] = fmaf(step.x, part[i + 1], sum[i + 1]);
      sum[i + 2] = fmaf(step.y, part[i + 2], sum[i + 2]);
      sum[i + 3] = fmaf(step.y, part[i + 3], sum[i + 3]);
    }
  }
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    const float2 of_x = *(const float2*)(x_sums + 2 * i);
    sum[i] = fmaf(offset.x, of_x.x, sum[i]);
    sum[i + 1] = fmaf(offset.x, of_x.y, sum[i + 1]);
    sum[i + 2] = fmaf(offset.y, of_x.x, sum[i + 2]);
    sum[i + 3] = fmaf(offset.y, of_x.y, sum[i + 3]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
field_linear(const __grid_constant__ Arguments p) {
  extern __shared__ __align__(128) char shared[];   // the ring of x, later the sums [TOKENS][PITCH]
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 parts = cluster_size(), part = cluster_rank();
  const int slices = p.items * 2;
  const int begin = (int)((long long)slices * part / parts), end = (int)((long long)slices * (part + 1) / parts);
  const u32 full = shared_address(barriers), empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    init_ring(full, empty, STAGES, THREADS / 32);
  }
  __syncthreads();
  let_next_kernel_start();

  const int tile = min((int)blockIdx.y * (ROWS / 16) + warp, p.tiles - 1);
  const char* planes = p.planes + ((long long)tile * slices + begin) * SLICE_BYTES + lane * 8;
  const char* row_scales = p.scales + ((long long)tile * p.groups * 8 + (lane >> 2)) * (2 * SLOTS * SCALE_SIZE);
  auto scales = [&](int n) {   // of slice n of this block
    const int group = GROUP == 256 ? (begin + n) / 2 / p.items_per_group : begin + n;
    return row_scales + group * (16 * SLOTS * SCALE_SIZE);
  };
  const int count = end - begin;
  Weights ahead[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < count) ahead[i].load(planes + i * SLICE_BYTES, scales(i));
  wait_for_previous_kernel();

  const char* x_slices = p.arranged + (long long)blockIdx.z * slices * X_BYTES;
  auto fetch = [&](int n) {   // slice n of this block, by its first thread
    const u32 barrier = full + 8 * (n % STAGES);
    barrier_expect(barrier, X_BYTES);
    copy_bulk(shared_address(shared + n % STAGES * X_BYTES), x_slices + (long long)(begin + n) * X_BYTES,
              X_BYTES, barrier);
  };
  if (threadIdx.x == 0)
    for (int n = 0; n < min(STAGES - LAG, count); n++) fetch(n);

  float sum[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
  for (int first = 0; first < count; first += AHEAD) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int n = first + i, stage = n % STAGES;
      if (n >= count) break;
      if (threadIdx.x == 0 && n + STAGES - LAG < count) {
        if (n >= LAG) barrier_wait(empty + 8 * ((n - LAG) % STAGES), ((n - LAG) / STAGES) & 1);
        fetch(n + STAGES - LAG);
      }
      __syncwarp();
      barrier_wait(full + 8 * stage, (n / STAGES) & 1);
      const char* x = shared + stage * X_BYTES;
      multiply_slice(ahead[i], x_descriptor(shared_address(x)), (const float*)(x + TOKENS * 256) + 2 * (lane & 3), sum);
      if (n + AHEAD < count) ahead[i].load(planes + (i + AHEAD) * SLICE_BYTES, scales(n + AHEAD));
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + 8 * stage);
    }
    planes += AHEAD * SLICE_BYTES;
  }
  __syncthreads();   // every copy of x has been used

  float* sums = (float*)shared;
  const int tile_row = warp * 16 + (lane >> 2), first_token = 2 * (lane & 3);
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    float* at = sums + (2 * i + first_token) * PITCH + tile_row;
    at[0] = sum[i];
    at[PITCH] = sum[i + 1];
    at[8] = sum[i + 2];
    at[PITCH + 8] = sum[i + 3];
  }
  cluster_sync();
  // Each block of the cluster finishes a share of the tokens.
  const int tokens = min(TOKENS, p.tokens - (int)blockIdx.z * TOKENS);
  for (int o = part * THREADS + threadIdx.x; o < tokens * (ROWS / 4); o += parts * THREADS) {
    const int token = o / (ROWS / 4), row = o % (ROWS / 4) * 4, y_row = blockIdx.y * ROWS + row;
    const u32 at = shared_address(sums + token * PITCH + row);
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    for (u32 r = 0; r < parts; r++) {
      const float4 v = load_cluster(at, r);
      total.x += v.x; total.y += v.y; total.z += v.z; total.w += v.w;
    }
    const float values[4] = {total.x, total.y, total.z, total.w};
    const long long y_token = (long long)blockIdx.z * TOKENS + token;
    const float factor = p.factors[y_token];
    u16 out[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float bias = p.bias && y_row + i < p.rows ? x_to_float(p.bias[y_row + i]) : 0.f;
      out[i] = float_to_x(values[i] * 16777216.f * factor + bias);
    }
    store_four(p.y + y_token * p.y_stride + y_row, out, y_row, p.rows);
  }
  cluster_sync();   // no block leaves while another reads its sums
}
