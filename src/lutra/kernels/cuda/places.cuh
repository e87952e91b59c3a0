// Places of sparse products: what two inputs a and b add up to by their signs, moved by a number that makes halves of
// them (`sparse_linear.cu`, `place_arrange.cu`).

DEVICE u32 half_pair(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// What is added to the four sums of two inputs, a + b, a - b and their negatives, so that all are nearly halves.
// The smaller of the two, rounded: then one of the four is 0, two are as exact as their distance to it, a or b
// twice, and what is rounded is shared by the other two. Where the smaller one is rounded by much and the larger
// one is of the same magnitude, half a unit of both: what remains is at most as much as was missing to half a unit.
DEVICE float shift_of(float sum, float difference) {
  const float small = fabsf(sum) < fabsf(difference) ? sum : difference;
  const float rounded = half_to_float(float_to_half(small));
  const float unit = __uint_as_float(__float_as_uint(sum) & 0x7F800000u) * (1.f / 2048.f);   // half of the last place
  const bool alike = ((__float_as_uint(sum) ^ __float_as_uint(difference)) & 0x7F800000u) == 0;
  return alike && fabsf(rounded - small) > 0.6f * unit ? unit : rounded;
}
