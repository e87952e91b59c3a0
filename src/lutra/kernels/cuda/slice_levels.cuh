// The levels of a slice, in fp32: what the kernels that make dense rows or keep x in fp32 start from.

// Of rows g and g + 8 and 32 inputs of one lane (lane = 4 g + t, see common.cuh).
struct SliceLevels {
  uint2 w[BITS];
  float2 alpha[BITS], offset;

  // `input` is the first of the lane's inputs in its row.
  DEVICE SliceLevels(const char* planes, const char* all_scales, int tile, int slice, int slices, int groups,
                     int items_per_group, int input) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
    const long long stored = (long long)tile * slices + slice;
#pragma unroll
    for (int q = 0; q < BITS; q++) w[q] = ((const uint2*)(planes + stored * SLICE_BYTES))[q * 32 + lane];
    const int group = GROUP == 256 ? slice / 2 / items_per_group : input / GROUP;
    const char* scales = all_scales + ((long long)tile * groups + group) * (16 * SLOTS * SCALE_SIZE);
    offset = scale_pair(scales, g * SLOTS + SLOTS - 1);
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      alpha[q] = scale_pair(scales, g * SLOTS + (UNIFORM ? 0 : q));
      if (UNIFORM) { alpha[q].x *= 1.f / (1 << q); alpha[q].y *= 1.f / (1 << q); }
    }
  }
  // Of the b-th input.
  DEVICE float2 pair(int b) const {
    float2 level = offset;
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      const u32 x = ~(w[q].x << (31 - b)) & 0x80000000u, y = ~(w[q].y << (31 - b)) & 0x80000000u;
      level.x += __uint_as_float(__float_as_uint(alpha[q].x) ^ x);
      level.y += __uint_as_float(__float_as_uint(alpha[q].y) ^ y);
    }
    return level;
  }
};
