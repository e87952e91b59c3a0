// For each group of a row with free levels, the integer that its largest alpha becomes (levels.cuh).
//
// Of all integers for the largest alpha with which the sum of the rounded alphas stays below 2047, the
// one is taken with which rounding changes the alphas least (simultaneous approximation of their
// ratios). How near that comes differs from group to group, and gets worse with every plane.
// Grid: blocks of 256 threads, one for each group of a row.

struct Arguments {
  const char* scales;      // see common.cuh
  u16* steps;              // [tiles][groups][8 g][2]
  int groups_of_rows;      // tiles * groups * 16
};

extern "C" __global__ void __launch_bounds__(256) steps(const __grid_constant__ Arguments p) {
  const int index = blockIdx.x * 256 + threadIdx.x;
  if (index >= p.groups_of_rows) return;
  wait_for_previous_kernel();
  const u16* alphas = (const u16*)p.scales + (index >> 1) * (long long)(2 * SLOTS) + (index & 1);
  float alpha[BITS], largest = 0.f, total = 0.f;
  for (int q = 0; q < BITS; q++) {
    alpha[q] = fabsf(half_to_float(alphas[2 * q]));
    largest = fmaxf(largest, alpha[q]);
    total += alpha[q];
  }
  int best = 1;
  if (largest > 0.f && total < 1e30f) {
    const float inverse = 1.f / largest;
    for (int q = 0; q < BITS; q++) alpha[q] *= inverse;
    const int most = (int)((2047.f - 0.5f * BITS) * largest / total);
    float least = 1e30f;
    for (int m = most; m > most / 3; m--) {
      float error = 0.f;
      for (int q = 0; q < BITS; q++) {
        const float off = alpha[q] * (float)m - rintf(alpha[q] * (float)m);
        error = fmaf(off, off, error);
      }
      error = error / ((float)m * (float)m);
      if (error < least) {
        least = error;
        best = m;
      }
    }
  }
  p.steps[index] = (u16)best;
}
