// Activations to the integers that a flattened layer multiplies, in one pass: a block takes a token.
//
//   x'[k]   = x[k] / smooth[k]                                       (SMOOTH)
//   step    = max_k |x'[k]| / limit[k], or the stored one            never below SMALLEST_STEP
//   q[k]    = clamp(round_half_even(x'[k] / step), -limit[k], limit[k])
//   column  = piece of q[source]                                     see kernels/flat/lowering.py
//
// All in float32 with divisions as IEEE has them, so the integers are those of the reference, bit for bit.
// A token with a NaN or an infinity has integers 0 and a step of NaN.
//
// Most channels have the same limit and are one column, in order: these are swept in vectors of 8 that stay
// in registers between the two passes. The others are listed as entries (column, source, piece, limit), and
// the bits of `special` keep them out of the sweep's maximum. The sweep multiplies by 1 / step and divides
// only where the product is so near to a half that the two could round apart.
//
// Columns that no entry names and no channel fills are not written: their weights are 0.
//
// -D: X_TYPE 0 half | 1 bf16 | 2 float, VECTORS (of 8 channels, per thread), THREADS, SMOOTH 0|1, WIDTH 8|4
// (bits of a column; with 4, two columns are a byte), ALIGNED 0|1 (rows of x start at multiples of 16 bytes).

#include "flat.cuh"

struct Arguments {
  const void* x;            // [tokens][inputs], rows x_stride elements apart
  char* q;                  // [tokens], rows q_stride bytes apart
  float* step;              // [tokens]
  const float* static_step; // [1] or null
  const float* smooth;      // [inputs]
  const unsigned char* special;   // [ceil(inputs / 8)], bit b is channel 8 i + b; or null
  const int4* entries;      // column, source, piece, limit
  long long x_stride, q_stride;
  int inputs, first;        // column of channel 0
  int entry_count, limit;   // of the channels that are swept
};

constexpr int RAW = X_TYPE == 2 ? 8 : 4;        // words of a vector
constexpr int DIGIT = WIDTH == 8 ? 127 : 7;     // largest of a column
constexpr int BASE = 2 * DIGIT + 1;
constexpr float SMALLEST_STEP = 1.17549435e-38f;
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: adding it rounds to an integer, half to even

DEVICE float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
DEVICE u32 max_pair(u32 a, u32 b) {   // of two halves or bf16, NaN wins
  u32 m;
  if (X_TYPE == 1) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
}
DEVICE float to_float(u16 v) { return X_TYPE == 1 ? bf16_to_float(v) : half_to_float(v); }

struct Vector {
  u32 raw[RAW];
  DEVICE float get(int i) const {
    if (X_TYPE == 2) return __uint_as_float(raw[i]);
    return to_float((u16)(raw[i / 2] >> (i % 2 * 16)));
  }
  DEVICE void drop(int i) {
    if (X_TYPE == 2) raw[i] = 0;
    else raw[i / 2] &= i % 2 ? 0xFFFFu : 0xFFFF0000u;
  }
};

DEVICE float load_one(const Arguments& p, const char* row, int channel) {
  const float x = X_TYPE == 2 ? ((const float*)row)[channel] : to_float(((const u16*)row)[channel]);
  return SMOOTH ? __fdiv_rn(x, p.smooth[channel]) : x;
}
DEVICE void load_vector(Vector& v, const Arguments& p, const char* row, int vector) {
  const int channel = vector * 8;
  if (ALIGNED && channel + 8 <= p.inputs) {
    const uint4* from = (const uint4*)row + vector * (RAW / 4);
#pragma unroll
    for (int i = 0; i < RAW / 4; i++) {
      const uint4 w = from[i];
      v.raw[4 * i] = w.x; v.raw[4 * i + 1] = w.y; v.raw[4 * i + 2] = w.z; v.raw[4 * i + 3] = w.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < RAW; i++) {
    v.raw[i] = 0;
    if (X_TYPE == 2) { if (channel + i < p.inputs) v.raw[i] = ((const u32*)row)[channel + i]; }
    else {
      if (channel + 2 * i < p.inputs) v.raw[i] = ((const u16*)row)[channel + 2 * i];
      if (channel + 2 * i + 1 < p.inputs) v.raw[i] |= (u32)((const u16*)row)[channel + 2 * i + 1] << 16;
    }
  }
}
// What vector i holds of channel c, smoothed.
DEVICE float value(const Arguments& p, const Vector& v, int vector, int i) {
  const int channel = vector * 8 + i;
  if (SMOOTH) return channel < p.inputs ? __fdiv_rn(v.get(i), p.smooth[channel]) : 0.f;
  return v.get(i);
}

DEVICE int part(int q, int piece) {
  const int upper = (piece + 1) * DIGIT, lower = piece * DIGIT;
  return max(-upper, min(q, upper)) - max(-lower, min(q, lower));
}
DEVICE int piece_of(int q, int piece) {
  if (piece >= 0) return part(q, piece);
  const int shifted = q + DIGIT;
  const int high = (shifted >= 0 ? shifted : shifted - (BASE - 1)) / BASE;   // rounds down
  return piece == -1 ? q - BASE * high : part(high, -2 - piece);
}

extern "C" __global__ void __launch_bounds__(THREADS)
flat_quantize(const __grid_constant__ Arguments p) {
  __shared__ float maxima[THREADS / 32];
  __shared__ float token_step;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const long long token = blockIdx.x;
  const char* row = (const char*)p.x + token * p.x_stride * (X_TYPE == 2 ? 4 : 2);
  char* out = p.q + token * p.q_stride;
  Vector v[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + threadIdx.x;
    if (vector * 8 < p.inputs) load_vector(v[i], p, row, vector);
    else {
#pragma unroll
      for (int w = 0; w < RAW; w++) v[i].raw[w] = 0;
    }
  }
  if (p.special) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int vector = i * THREADS + threadIdx.x;
      const u32 bits = vector * 8 < p.inputs ? p.special[vector] : 0;
      if (bits) {
#pragma unroll
        for (int j = 0; j < 8; j++) if (bits >> j & 1) v[i].drop(j);
      }
    }
  }
  float largest = 0.f;
  if (SMOOTH || X_TYPE == 2) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        largest = max_or_nan(largest, fabsf(value(p, v[i], i * THREADS + threadIdx.x, j)));
  } else {
    u32 pair = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; i++)
#pragma unroll
      for (int j = 0; j < RAW; j++) pair = max_pair(pair, v[i].raw[j] & 0x7FFF7FFFu);
    largest = max_or_nan(to_float((u16)pair), to_float((u16)(pair >> 16)));
  }
  largest = __fdiv_rn(largest, (float)p.limit);   // division keeps the order, so it may come after the maximum
  for (int e = threadIdx.x; e < p.entry_count; e += THREADS) {
    const int4 entry = p.entries[e];
    largest = max_or_nan(largest, __fdiv_rn(fabsf(load_one(p, row, entry.y)), (float)entry.w));
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2)
    largest = max_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
  if ((threadIdx.x & 31) == 0) maxima[threadIdx.x / 32] = largest;
  __syncthreads();
  if (threadIdx.x < 32) {
    largest = threadIdx.x < THREADS / 32 ? maxima[threadIdx.x] : 0.f;
#pragma unroll
    for (int lanes = THREADS / 64; lanes; lanes /= 2)
      largest = max_or_nan(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lanes));
    if (threadIdx.x == 0) {
      const bool sound = largest < __int_as_float(0x7F800000);   // false for NaN
      float step = p.static_step ? *p.static_step : fmaxf(largest, SMALLEST_STEP);
      if (!sound) step = __int_as_float(0x7FC00000);
      token_step = step;
      p.step[token] = step;
    }
  }
  __syncthreads();
  const float step = token_step;
  const bool sound = step == step;
  const float inverse = __fdiv_rn(1.f, step);
  const bool divide = !(inverse > 1e-37f);   // then the inverse is not exact enough
  const float limit = (float)p.limit;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + threadIdx.x;
    if (vector * 8 >= p.inputs) continue;
    float r[8];
    float near = divide ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const float exact = value(p, v[i], vector, j) * inverse;
      const float clamped = fminf(fmaxf(exact, -limit), limit);
      r[j] = __fadd_rn(clamped, MAGIC);
      near = fmaxf(near, fabsf(clamped - __fadd_rn(r[j], -MAGIC)));
    }
    if (near > 0.4999f) {
#pragma unroll
      for (int j = 0; j < 8; j++)
        r[j] = __fadd_rn(fminf(fmaxf(__fdiv_rn(value(p, v[i], vector, j), step), -limit), limit), MAGIC);
    }
    if (!sound) {
#pragma unroll
      for (int j = 0; j < 8; j++) r[j] = MAGIC;
    }
    u32 byte[8];
#pragma unroll
    for (int j = 0; j < 8; j++) byte[j] = __float_as_uint(r[j]);
    const int left = p.inputs - vector * 8;
#if WIDTH == 8
    const u32 low = __byte_perm(__byte_perm(byte[0], byte[1], 0x0040), __byte_perm(byte[2], byte[3], 0x0040), 0x5410);
    const u32 high = __byte_perm(__byte_perm(byte[4], byte[5], 0x0040), __byte_perm(byte[6], byte[7], 0x0040), 0x5410);
    char* at = out + p.first + vector * 8;
    if (left >= 8) *(uint2*)at = make_uint2(low, high);
    else {
      for (int j = 0; j < left; j++) at[j] = (char)(j < 4 ? low >> 8 * j : high >> 8 * (j - 4));
    }
#else
    u32 word = 0;   // columns past the last channel belong to entries or to nobody
#pragma unroll
    for (int j = 0; j < 8; j++) word |= (byte[j] & 15) << 4 * j;
    char* at = out + p.first / 2 + vector * 4;
    if (left >= 8) *(u32*)at = word;
    else {
      for (int j = 0; j < (left + 1) / 2; j++) at[j] = (char)(word >> 8 * j);
    }
#endif
  }
  if (p.entry_count == 0) return;
  __syncthreads();   // entries write over what the sweep left in their columns
#if WIDTH == 8
  for (int e = threadIdx.x; e < p.entry_count; e += THREADS) {
    const int4 entry = p.entries[e];
    const float wide = (float)entry.w;
    const float r = fminf(fmaxf(rintf(__fdiv_rn(load_one(p, row, entry.y), step)), -wide), wide);
    out[entry.x] = (char)(sound ? piece_of((int)r, entry.z) : 0);
  }
#else
  // Two columns share a byte, so entries are sorted by column and one thread writes both of a byte.
  for (int e = threadIdx.x; e < p.entry_count; e += THREADS) {
    const int4 entry = p.entries[e];
    if (e > 0 && (entry.x & 1) && p.entries[e - 1].x == entry.x - 1) continue;
    const auto digit = [&](const int4& entry) {
      const float wide = (float)entry.w;
      const float r = fminf(fmaxf(rintf(__fdiv_rn(load_one(p, row, entry.y), step)), -wide), wide);
      return (u32)(sound ? piece_of((int)r, entry.z) : 0) & 15;
    };
    u32 byte = (unsigned char)out[entry.x / 2];
    byte = entry.x & 1 ? (byte & 0x0F) | digit(entry) << 4 : (byte & 0xF0) | digit(entry);
    if (!(entry.x & 1) && e + 1 < p.entry_count && p.entries[e + 1].x == entry.x + 1)
      byte = (byte & 0x0F) | digit(p.entries[e + 1]) << 4;
    out[entry.x / 2] = (char)byte;
  }
#endif
}
