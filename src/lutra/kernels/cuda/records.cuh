// Free levels of 2 to 4 bits as exact half operands, by multiplication.
//
// Of a group's alphas, one step is found (steps.cu) of which all of them are integers m_q, very nearly, that
// add up to less than 2048. A bit of a plane under a zero exponent is a power of two (fields.cuh), so the
// sum of m_q times these bits is an exact half: a multiply-add in half for each plane, which another pipe
// does than the masks. Twice the step is what it counts; -1 instead of 0 goes into the offset.
//
// A lane finds the integers, the units and the offsets of one slice in four, from scales that it fetched four
// slices ahead, and leaves them in shared memory for the four lanes that multiply a row.

DEVICE float2 halves(u32 pair) { return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16))); }
DEVICE u32 half_pair(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 multiply_halves(u32 a, u32 b) { u32 d; asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

constexpr int RECORD_BYTES = BITS == 2 ? 32 : 48;
constexpr int RECORDS_BYTES = 32 * RECORD_BYTES;   // of a tile: four slices

// Scales of rows g and g + 8 of one group, fetched ahead.
struct RecordSource {
  u32 pairs[SLOTS], step;   // see common.cuh and steps.cu

  DEVICE void fetch(const char* scales, const char* steps, long long at) {   // tile and group * 8 + g
    const u32* from = (const u32*)scales + at * SLOTS;
    if (SLOTS == 4) {
      const uint4 v = __ldg((const uint4*)from);
      pairs[0] = v.x; pairs[1] = v.y; pairs[SLOTS - 2] = v.z; pairs[SLOTS - 1] = v.w;
    } else {
#pragma unroll
      for (int q = 0; q < SLOTS; q++) pairs[q] = __ldg(from + q);
    }
    step = __ldg((const u32*)steps + at);
  }
};

// What the lanes of a row share for a slice, of rows g and g + 8. Lane 4 g + t makes that of slice t of every four.
struct Record {
  u32 integers[2][BITS];   // both halves the same
  float2 unit, offset;

  DEVICE void make(const RecordSource& from) {
    constexpr float LEAST = 8.6736174e-19f;   // a step of 0 would leave no unit for the sums
    float2 alpha[BITS], largest = make_float2(LEAST, LEAST), sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      alpha[q] = halves(from.pairs[q]);
      largest.x = fmaxf(largest.x, fabsf(alpha[q].x));
      largest.y = fmaxf(largest.y, fabsf(alpha[q].y));
    }
    const float2 m = make_float2((float)(from.step & 0xFFFFu), (float)(from.step >> 16));
    const float2 inverse = make_float2(divide(m.x, largest.x), divide(m.y, largest.y));
#pragma unroll
    for (int q = 0; q < BITS; q++) {   // rounded by the addition; NaN stays
      const float2 integer = make_float2(fmaf(alpha[q].x, inverse.x, 12582912.f) - 12582912.f,
                                         fmaf(alpha[q].y, inverse.y, 12582912.f) - 12582912.f);
      integers[0][q] = half_pair(integer.x, integer.x);
      integers[1][q] = half_pair(integer.y, integer.y);
      sum.x += integer.x;
      sum.y += integer.y;
    }
    unit = make_float2(divide(largest.x, m.x), divide(largest.y, m.y));
    offset = halves(from.pairs[SLOTS - 1]);
    offset.x = fmaf(-unit.x, sum.x, offset.x);
    offset.y = fmaf(-unit.y, sum.y, offset.y);
  }
  DEVICE void write(char* to) const {
#pragma unroll
    for (int q = 0; q < BITS; q++) *(uint2*)(to + 8 * q) = make_uint2(integers[0][q], integers[1][q]);
    *(float4*)(to + RECORD_BYTES - 16) = make_float4(unit.x, unit.y, offset.x, offset.y);
  }
  DEVICE void read_integers(const char* from) {
#pragma unroll
    for (int q = 0; q < BITS; q++) {
      const uint2 v = *(const uint2*)(from + 8 * q);
      integers[0][q] = v.x;
      integers[1][q] = v.y;
    }
  }
  DEVICE void read_units(const char* from) {
    const float4 v = *(const float4*)(from + RECORD_BYTES - 16);
    unit = make_float2(v.x, v.y);
    offset = make_float2(v.z, v.w);
  }
};

// Planes of one row of a slice, as the words from which bits are cut.
struct Planes {
  Fields fields[BITS];

  DEVICE u32 pair(int b, const u32 (&integers)[BITS]) const {   // levels of inputs b and b + 16, in steps
    u32 sum = multiply_halves(fields[0].pair(b), integers[0]);
#pragma unroll
    for (int q = 1; q < BITS; q++) sum = multiply_add_halves(fields[q].pair(b), integers[q], sum);
    return sum;
  }
};
