// How the blocks of `place_batch.cu` divide the work, hand sums to each other and store results.
//
// The slices of all blocks of rows are one row of units, of which each block takes an equal share: the rest of a
// block of rows, whole ones, the beginning of another. Who has the first inputs of some rows adds up the sums of
// all who have others, in order: two runs give the same bits. It may wait for those behind it, which give theirs
// before they wait for any themselves.

struct Shares {
  int share, extra;        // units of each block, and how many blocks have one more
  float4* partial;         // [blocks][warps][TALL][SUMS / 4][32 lanes]
  u32* flags;              // [blocks][warps], zeros
  DEVICE int first(int block) const { return share * block + min(extra, block); }
};
struct Results {
  const u16* bias;         // [rows] in the type of x, or null
  u16* y;                  // [tokens][rows], rows y_stride apart
  long long y_stride;
  int rows, tokens;
};

// A block's part of a block of rows: slices begin to end - 1.
struct Item {
  int tile, begin, end;
  DEVICE Item(int unit, int last, int slices) {
    tile = unit / slices;
    begin = unit - tile * slices;
    end = min(slices, begin + last - unit);
  }
};

// A place in the ring. Addresses that go along are cheaper than a stage's number.
struct Place {
  u32 stage, barrier, parity;
  DEVICE void next(u32 barriers) {
    stage += STAGE_BYTES;
    barrier += 8;
    if (barrier == barriers + 8 * STAGES) {
      stage = 0;
      barrier = barriers;
      parity ^= 1;
    }
  }
};

// Sums of a warp for the block that has the first inputs of its rows.
DEVICE void give_sums(const Shares& p, const float (&sum)[TALL][SUMS], int warp) {
  const int lane = threadIdx.x & 31;
  float4* to = p.partial + (long long)warp * (TALL * SUMS / 4 * 32) + lane;
#pragma unroll
  for (int t = 0; t < TALL; t++)
#pragma unroll
    for (int i = 0; i < SUMS; i += 4)
      to[(t * SUMS + i) * 8] = make_float4(sum[t][i], sum[t][i + 1], sum[t][i + 2], sum[t][i + 3]);
  __syncwarp();
  if (lane == 0) asm volatile("fence.acq_rel.gpu;\nst.release.gpu.global.u32 [%0], 1;" :: "l"(p.flags + warp) : "memory");
}
// From those behind a block that have the other slices of its rows, from `have` on.
DEVICE void take_sums(const Shares& p, float (&sum)[TALL][SUMS], int warp, int warps, int have, int slices) {
  const int lane = threadIdx.x & 31;
  int block = blockIdx.x + 1;
#pragma unroll 1
  while (have < slices) {
    // As many as have them, but no more than lanes, which look for one each.
    int givers = 0;
    for (; have < slices && givers < 32; givers++) have += p.share + (block + givers < p.extra);
    const u32* flag = p.flags + (block + lane) * warps + warp;
    u32 given = lane >= givers;
    do
      if (!given) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(given) : "l"(flag) : "memory");
    while (!__all_sync(~0u, given));
    __syncwarp();   // what one lane has seen, all have
    const float4* from = p.partial + (long long)(block * warps + warp) * (TALL * SUMS / 4 * 32) + lane;
#pragma unroll 4
    for (int i = 0; i < givers; i++, from += warps * (TALL * SUMS / 4 * 32))
#pragma unroll
      for (int t = 0; t < TALL; t++)
#pragma unroll
        for (int j = 0; j < SUMS; j += 4) {
          float4 v;
          asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from + (t * SUMS + j) * 8));
          sum[t][j] += v.x;
          sum[t][j + 1] += v.y;
          sum[t][j + 2] += v.z;
          sum[t][j + 3] += v.w;
        }
    block += givers;
  }
}

DEVICE u32 y_pair(float low, float high) {
  u32 pair;
  if (X_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Two 8x8 tiles of 16-bit values, each stored transposed; lane 8 i + j gives the address of row j of tile i.
DEVICE void store_transposed(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" :: "r"(address), "r"(a), "r"(b) : "memory");
}

// Results of a warp's 16 rows from `row` on, through its lines of 16 rows in shared memory.
DEVICE void store_results(const Results& p, const float (&sum)[SUMS], int row, const float* factors, char* staged) {
  const int lane = threadIdx.x & 31, of = row + (lane >> 2);
  float bias[2] = {0.f, 0.f};
  if (p.bias) {
    if (of < p.rows) bias[0] = x_to_float(p.bias[of]);
    if (of + 8 < p.rows) bias[1] = x_to_float(p.bias[of + 8]);
  }
  const u32 at = shared_address(staged) + (lane & 7) * 32 + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int i = 0; i < SUMS; i += 4) {
    const float2 f = *(const float2*)(factors + 2 * i + 2 * (lane & 3));
    auto result = [&](float v, float factor, float b) { return fmaf(v * RESULT_UNIT, factor, b); };
    store_transposed(at + i * 64, y_pair(result(sum[i], f.x, bias[0]), result(sum[i + 1], f.y, bias[0])),
                     y_pair(result(sum[i + 2], f.x, bias[1]), result(sum[i + 3], f.y, bias[1])));
  }
  __syncwarp();
  const int here = row + (lane & 1) * 8;
#pragma unroll 1
  for (int token = lane >> 1; token < p.tokens; token += 16) {
    const uint4 v = *(const uint4*)(staged + token * 32 + (lane & 1) * 16);
    u16* y = p.y + token * p.y_stride + here;
    if (here + 8 <= p.rows && ((u64)y & 15) == 0) {
      *(uint4*)y = v;
    } else {
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (here + i < p.rows) y[i] = (u16)(words[i >> 1] >> (i & 1) * 16);
    }
  }
  __syncwarp();
}

struct Yes { static constexpr bool value = true; };
struct No { static constexpr bool value = false; };
