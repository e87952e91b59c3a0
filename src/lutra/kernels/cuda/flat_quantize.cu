// Activations to the integers that a flattened layer multiplies, in one pass: a block takes a token.
//
// With INPUT = 1 the activations are the RMS norm of x, with INPUT = 2 they are silu(x) * second; both round to 16
// bits where modules of PyTorch round (the factor of the norm, the norm; silu, the product).
//
//   x'[k]   = x[k] / smooth[k]                                       (SMOOTH)
//   step    = max_k |x'[k]| / limit[k], or the stored one            never below SMALLEST_STEP
//   q[k]    = clamp(round_half_even(x'[k] / step), -limit[k], limit[k])
//   column  = piece of q[source]                                     see kernels/flat/lowering.py
//
// All in float32 with divisions as IEEE has them, so the integers are those of the reference, bit for bit.
// A token with a NaN or an infinity has integers 0 and a step of NaN.
//
// Most channels have the same limit and are one column, in order: these are swept in vectors of 8. Channels
// with another limit are listed in `wide`, and the words of `keep` keep them out of the sweep's maximum.
// Columns that the sweep does not leave as they must be (further pieces, digits) are listed in `entries`.
// The sweep multiplies by 1 / step and corrects the quotient twice by its remainder, which gives what division
// gives (Markstein 1990) unless something underflows; tokens with very small or large steps are divided.
//
// Columns that no entry names and no channel fills are not written: their weights are 0.
//
// -D: X_TYPE 0 half | 1 bf16 | 2 float, VECTORS (of 8 channels, per thread), THREADS, BLOCKS (of a processor),
// HOLD 0|1 (vectors stay in registers between the two passes, else in shared memory), SMOOTH 0|1, WIDTH 8|4 (bits of a column; with 4, two columns are a byte), ALIGNED 0|1 (rows of x start at multiples
// of 16 bytes), INPUT 0|1|2 (1 and 2: 16 bits, HOLD, not SMOOTH). Grid: tokens.

#include "flat.cuh"

struct Arguments {
  const void* x;            // [tokens][inputs], rows x_stride elements apart
  const void* second;       // INPUT 1: [inputs], weight of the norm; 2: [tokens][inputs], rows second_stride apart
  char* q;                  // [tokens], rows q_stride bytes apart
  float* step;              // [tokens]
  const float* static_step; // [1] or null
  const float* smooth;      // [inputs]
  const uint4* keep;        // 16 bits a channel: 0x7FFF, or 0 if it is wide; up to a multiple of 8; or null
  const int2* wide;         // channel, limit
  const int4* entries;      // column, source, piece, limit
  long long x_stride, q_stride, second_stride;
  int inputs, first;        // column of channel 0
  int wide_count, entry_count;
  int limit, clamp;         // of the channels that are swept; what the sweep cuts at
  float epsilon;            // of the norm
};

constexpr int RAW = X_TYPE == 2 ? 8 : 4;        // words of a vector
constexpr int DIGIT = WIDTH == 8 ? 127 : 7;     // largest of a column
constexpr int BASE = 2 * DIGIT + 1;
constexpr float SMALLEST_STEP = 1.17549435e-38f;
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: adding it rounds to an integer, half to even

// Absolute values are compared as integers: that is their order, with infinity and NaN above all.
DEVICE u32 absolute(float f) { return __float_as_uint(f) & 0x7FFFFFFF; }
DEVICE u32 warp_max(u32 v) {
  u32 m;
  asm("redux.sync.max.u32 %0, %1, 0xFFFFFFFF;" : "=r"(m) : "r"(v));
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
};

DEVICE void copy16_async(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared), "l"(global) : "memory");
}
DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#ifndef INPUT
#define INPUT 0
#endif
DEVICE u16 from_float(float f) { return X_TYPE == 1 ? float_to_bf16(f) : float_to_half(f); }
DEVICE float rounded(float f) { return to_float(from_float(f)); }
DEVICE float normed(float x, float factor, float weight) { return rounded(rounded(x * factor) * weight); }
DEVICE float gated(float x, float second) { return rounded(rounded(__fdiv_rn(x, 1.f + expf(-x))) * second); }
DEVICE const char* second_row(const Arguments& p, long long token) {
  return (const char*)p.second + (INPUT == 2 ? token * p.second_stride * 2 : 0);
}

DEVICE float load_one(const Arguments& p, const char* row, int channel, float factor) {
  const float x = X_TYPE == 2 ? ((const float*)row)[channel] : to_float(((const u16*)row)[channel]);
  if (INPUT) {
    const float second = to_float(((const u16*)second_row(p, blockIdx.x))[channel]);
    return INPUT == 1 ? normed(x, factor, second) : gated(x, second);
  }
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

// The largest absolute value of a vector's channels that are kept: bits of a float, or of two 16-bit ones.
DEVICE u32 largest_of(u32 most, const Arguments& p, const Vector& v, int vector, const uint4& keep) {
  const u32 kept[4] = {keep.x, keep.y, keep.z, keep.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    if (SMOOTH || X_TYPE == 2) {
      if (kept[j] & 0xFFFF) most = max(most, absolute(value(p, v, vector, 2 * j)));
      if (kept[j] >> 16) most = max(most, absolute(value(p, v, vector, 2 * j + 1)));
    } else {
      most = max_pair(most, v.raw[j] & kept[j]);
    }
  }
  return most;
}
DEVICE u32 largest_of_both(u32 most) {
  if (SMOOTH || X_TYPE == 2) return most;
  return max(absolute(to_float((u16)most)), absolute(to_float((u16)(most >> 16))));
}

// x / step, rounded as division rounds it; both far from the ends of the range.
DEVICE float quotient(float x, float step, float inverse) {
  float q = x * inverse;
  q = fmaf(fmaf(-q, step, x), inverse, q);
  return fmaf(fmaf(-q, step, x), inverse, q);
}
// The integers of a vector: in the low bits of 8 words.
DEVICE void integers_of(u32 (&out)[8], const Arguments& p, const Vector& v, int vector, float step, float inverse) {
  const float limit = (float)p.clamp;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const float q = quotient(value(p, v, vector, j), step, inverse);
    out[j] = __float_as_uint(__fadd_rn(fminf(fmaxf(q, -limit), limit), MAGIC));
  }
}
DEVICE int integer_of(float x, float step, int limit) {
  const float wide = (float)limit;
  return step == step ? (int)fminf(fmaxf(rintf(__fdiv_rn(x, step)), -wide), wide) : 0;
}

DEVICE void store_integers(const u32 (&byte)[8], const Arguments& p, char* out, int vector) {
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
  u32 word = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) word |= (byte[j] & 15) << 4 * j;
  char* at = out + p.first / 2 + vector * 4;
  if (left >= 8) *(u32*)at = word;
  else {   // the upper half of the last byte may be an entry's column, which comes after this
    for (int j = 0; j < (left + 1) / 2; j++) at[j] = (char)(word >> 8 * j);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
flat_quantize(const __grid_constant__ Arguments p) {
  __shared__ u32 maxima[THREADS / 32];
#if HOLD == 0
  extern __shared__ __align__(16) uint4 rows[];   // [VECTORS][RAW / 4][THREADS]
#endif
  const int thread = threadIdx.x;
  // What this thread does besides the sweep, as far as it fits a turn: fetched before the activations are there.
  const bool has_wide = thread < p.wide_count, has_entry = thread < p.entry_count;
  const int2 wide = has_wide ? p.wide[thread] : make_int2(0, 1);
  const int4 entry = has_entry ? p.entries[thread] : make_int4(0, 0, 0, 1);
  uint4 keep[HOLD ? VECTORS : 1];
  const auto keep_of = [&](int vector) {
    const bool some = p.keep && vector * 8 < p.inputs;
    return some ? p.keep[vector] : make_uint4(0x7FFF7FFF, 0x7FFF7FFF, 0x7FFF7FFF, 0x7FFF7FFF);
  };
  if (HOLD) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) keep[HOLD ? i : 0] = keep_of(i * THREADS + thread);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  const long long token = blockIdx.x;
  const char* row = (const char*)p.x + token * p.x_stride * (X_TYPE == 2 ? 4 : 2);
  char* out = p.q + token * p.q_stride;
  Vector held[HOLD ? VECTORS : 1];
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + thread;
    if (vector * 8 >= p.inputs) continue;
#if HOLD
    load_vector(held[i], p, row, vector);
#else
    if (ALIGNED && vector * 8 + 8 <= p.inputs) {
#pragma unroll
      for (int w = 0; w < RAW / 4; w++)
        copy16_async(shared_address(rows + (i * (RAW / 4) + w) * THREADS + thread),
                     (const uint4*)row + vector * (RAW / 4) + w);
    } else {
      load_vector(held[0], p, row, vector);
#pragma unroll
      for (int w = 0; w < RAW / 4; w++)
        rows[(i * (RAW / 4) + w) * THREADS + thread] =
          make_uint4(held[0].raw[4 * w], held[0].raw[4 * w + 1], held[0].raw[4 * w + 2], held[0].raw[4 * w + 3]);
    }
#endif
  }
  float factor = 0.f;
#if INPUT
  {
    const char* second = second_row(p, token);
    float squares = 0.f;
    if (INPUT == 1) {
      __shared__ float sums[THREADS / 32];
#pragma unroll
      for (int i = 0; i < VECTORS; i++)
        if ((i * THREADS + thread) * 8 < p.inputs) {
#pragma unroll
          for (int j = 0; j < 8; j++) squares = fmaf(held[i].get(j), held[i].get(j), squares);
        }
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, lanes);
      if ((thread & 31) == 0) sums[thread / 32] = squares;
      __syncthreads();
      squares = 0.f;
      for (int w = 0; w < THREADS / 32; w++) squares += sums[w];
      factor = rsqrtf(squares / (float)p.inputs + p.epsilon);
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int vector = i * THREADS + thread;
      if (vector * 8 >= p.inputs) continue;
      Vector other;
      load_vector(other, p, second, vector);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 pair = 0;
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float x = held[i].get(2 * j + k), o = other.get(2 * j + k);
          pair |= (u32)from_float(INPUT == 1 ? normed(x, factor, o) : gated(x, o)) << 16 * k;
        }
        held[i].raw[j] = pair;
      }
    }
  }
#endif
  const float x_wide = load_one(p, row, wide.x, factor), x_entry = load_one(p, row, entry.y, factor);
  const auto take = [&](int i) -> const Vector& {   // a thread keeps its own vectors: no barrier
#if HOLD
    return held[i];
#else
#pragma unroll
    for (int w = 0; w < RAW / 4; w++) {
      const uint4 four = rows[(i * (RAW / 4) + w) * THREADS + thread];
      held[0].raw[4 * w] = four.x; held[0].raw[4 * w + 1] = four.y;
      held[0].raw[4 * w + 2] = four.z; held[0].raw[4 * w + 3] = four.w;
    }
    return held[0];
#endif
  };
#if HOLD == 0
  wait_copies();
#endif
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = i * THREADS + thread;
    if (vector * 8 < p.inputs) most = largest_of(most, p, take(i), vector, HOLD ? keep[HOLD ? i : 0] : keep_of(vector));
  }
  // Division keeps the order, so it may come after the maximum.
  most = absolute(__fdiv_rn(__uint_as_float(warp_max(largest_of_both(most))), (float)p.limit));
  if (has_wide) most = max(most, absolute(__fdiv_rn(x_wide, (float)wide.y)));
  for (int e = thread + THREADS; e < p.wide_count; e += THREADS)
    most = max(most, absolute(__fdiv_rn(load_one(p, row, p.wide[e].x, factor), (float)p.wide[e].y)));
  __syncwarp();
  most = warp_max(most);
  if ((thread & 31) == 0) maxima[thread / 32] = most;
  __syncthreads();
  most = warp_max((thread & 31) < THREADS / 32 ? maxima[thread & 31] : 0);
  const bool sound = most < 0x7F800000u;   // neither infinity nor NaN
  float step = p.static_step ? *p.static_step : fmaxf(__uint_as_float(most), SMALLEST_STEP);
  if (!sound) step = __int_as_float(0x7FC00000);
  if (thread == 0) p.step[token] = step;
  if (step > 1e-30f && step < 1e30f) {
    const float inverse = __fdiv_rn(1.f, step);
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int vector = i * THREADS + thread;
      if (vector * 8 >= p.inputs) continue;
      u32 integers[8];
      integers_of(integers, p, take(i), vector, step, inverse);
      store_integers(integers, p, out, vector);
    }
  } else {
    for (int vector = thread; vector * 8 < p.inputs; vector += THREADS) {
      u32 integers[8];
#pragma unroll
      for (int j = 0; j < 8; j++) integers[j] = 0;
#pragma unroll 1
      for (int j = 0; j < 8; j++) {
        const int q = vector * 8 + j < p.inputs ? integer_of(load_one(p, row, vector * 8 + j, factor), step, p.clamp) : 0;
#pragma unroll
        for (int at = 0; at < 8; at++) if (at == j) integers[at] = (u32)q;
      }
      store_integers(integers, p, out, vector);
    }
  }
  if (p.entry_count == 0) return;
  __syncthreads();   // entries write over what the sweep left in their columns
#if WIDTH == 8
  if (has_entry) out[entry.x] = (char)piece_of(integer_of(x_entry, step, entry.w), entry.z);
  for (int e = thread + THREADS; e < p.entry_count; e += THREADS) {
    const int4 next = p.entries[e];
    out[next.x] = (char)piece_of(integer_of(load_one(p, row, next.y, factor), step, next.w), next.z);
  }
#else
  // Two columns share a byte: entries are sorted by column, and one thread writes both of a byte.
  const auto digit = [&](const int4& of) {
    return (u32)piece_of(integer_of(load_one(p, row, of.y, factor), step, of.w), of.z) & 15;
  };
  for (int e = thread; e < p.entry_count; e += THREADS) {
    const int4 here = p.entries[e];
    if (e > 0 && (here.x & 1) && p.entries[e - 1].x == here.x - 1) continue;
    u32 byte = (unsigned char)out[here.x / 2];
    byte = here.x & 1 ? (byte & 0x0F) | digit(here) << 4 : (byte & 0xF0) | digit(here);
    if (!(here.x & 1) && e + 1 < p.entry_count && p.entries[e + 1].x == here.x + 1)
      byte = (byte & 0x0F) | digit(p.entries[e + 1]) << 4;
    out[here.x / 2] = (char)byte;
  }
#endif
}
