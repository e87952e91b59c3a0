// Activations to the integers that a flattened layer multiplies, in one pass: a block takes a token after the other.
//
//   x'[k]   = x[k] / smooth[k]                                       (SMOOTH)
//   step    = max_k |x'[k]| / limit[k], or the stored one            never below SMALLEST_STEP
//   q[k]    = clamp(round_half_even(x'[k] / step), -limit[k], limit[k])
//   column  = piece of q[source]                                     see kernels/flat/lowering.py
//
// What is quantized may be computed of x on the way, rounded to 16 bits where modules of PyTorch round (INPUT):
//
//   1  RMS norm        second[k] * round(x[k] * rsqrt(mean(x^2) + epsilon))
//   2  layer norm      (x[k] - mean(x)) * rsqrt(var(x) + epsilon) * second[k] + third[k]
//   3  activation      act(x[k])
//   4  gated           round(act(x[k])) * second[token][k]
//
// with ACT 0 silu, 1 relu, 2 gelu, 3 gelu by tanh. Sums of norms are those of 8 channels in float, added up in
// double: the result hardly depends on how many threads share a token, and so on how many tokens there are.
//
// All in float32 with divisions as IEEE has them, so the integers are those of the reference, bit for bit.
// A token with a NaN or an infinity has integers 0 and a step of NaN.
//
// Most channels have the same limit and are one column, in order: these are swept in vectors of 8. Channels
// with another limit are listed in `wide`, and the words of `keep` keep them out of the sweep's maximum.
// Columns that the sweep does not leave as they must be (further pieces, digits) are listed in `entries`.
//
// The sweep multiplies by 1 / step and corrects the quotient by its remainder, once: for x of 11 bits or less
// that rounds to the same integer as the quotient of IEEE division, for every step (no such quotient is within
// 2^-44 of where it would matter, but for a few that were tried). Smoothed x have 24 bits and are corrected twice,
// which gives the quotient itself (Markstein 1990). Tokens with very small or large steps are divided.
//
// With AHEAD the next token is fetched while this one is computed. Tokens that do not fit the registers (HOLD 0)
// are read again for each of the two passes.
//
// Columns that no entry names and no channel fills are not written: their weights are 0.
//
// -D: X_TYPE 0 half | 1 bf16, VECTORS (of 8 channels, per thread, if HOLD), THREADS, BLOCKS (of a processor),
// HOLD 0|1, AHEAD 0|1, SMOOTH 0|1, WIDTH 8|4 (bits of a column; with 4, two columns are a byte),
// ALIGNED 0|1 (rows start at multiples of 16 bytes), FULL 0|1 (ALIGNED, and the vectors of all threads are the
// token), INPUT 0..4 (1 and more: HOLD), ACT 0..3.

#include "flat.cuh"

struct Arguments {
  const char* x;            // [tokens][inputs], rows x_stride elements apart
  const char* second;       // [inputs], or [tokens][inputs] with rows second_stride apart
  const char* third;        // [inputs]
  char* q;                  // [tokens], rows q_stride bytes apart
  float* step;              // [tokens]
  const float* static_step; // [1] or null
  const float* smooth;      // [inputs]
  const uint4* keep;        // 16 bits a channel: 0x7FFF, or 0 if it is wide; up to a multiple of 8; or null
  const int2* wide;         // channel, limit
  const int4* entries;      // column, source, piece, limit
  long long x_stride, q_stride, second_stride;
  int tokens, inputs, first;   // first: column of channel 0
  int wide_count, entry_count;
  int limit, clamp;         // of the channels that are swept; what the sweep cuts at
  float epsilon;            // of the norm
};

constexpr int DIGIT = WIDTH == 8 ? 127 : 7;     // largest of a column
constexpr int BASE = 2 * DIGIT + 1;
constexpr float SMALLEST_STEP = 1.17549435e-38f;
constexpr float MAGIC = 12582912.f;             // 1.5 * 2^23: adding it rounds to an integer, half to even
constexpr int WARPS = THREADS / 32;
constexpr bool NORM = INPUT == 1 || INPUT == 2, SECOND_ROW = INPUT == 4;
constexpr int LONE = HOLD && VECTORS > 4 ? 2 : 1;   // wide channels and entries that a thread fetches ahead

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
DEVICE float low_of(u32 pair) { return to_float<X_TYPE>((u16)pair); }
DEVICE float high_of(u32 pair) { return to_float<X_TYPE>((u16)(pair >> 16)); }
// Products of pairs, rounded once: a b - 0.
DEVICE u32 times(u32 a, u32 b) {
  u32 product;
  if (X_TYPE == 1) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000));
  return product;
}
// x / (1 + exp(-x)). EXACT 0: division as IEEE has it but at the ends of the range, where `unsure` is set.
template <bool EXACT> DEVICE float silu(float x, bool& unsure) {
  const float below = 1.f + expf(-x);
  if (EXACT) return __fdiv_rn(x, below);
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(below));
  inverse = fmaf(fmaf(-below, inverse, 1.f), inverse, inverse);
  const float y = x * inverse;
  unsure |= below > 1e30f;
  unsure |= fabsf(x) < 1e-30f;
  unsure |= fabsf(x) > 1e30f;
  return fmaf(fmaf(-below, y, x), inverse, y);
}
template <bool EXACT> DEVICE float act(float x, bool& unsure) {   // as PyTorch computes it
  if (ACT == 2) return x * 0.5f * (1.f + erff(x * 0.70710678118654752440f));
  if (ACT == 3) {
    const float inner = 0.79788456080286535588f * (x + 0.044715f * (x * x * x));
    return 0.5f * x * (1.f + tanhf(inner));
  }
  return silu<EXACT>(x, unsure);
}

struct Sums { float mean, factor; };   // of a norm
// What is quantized of two x, before smoothing; where it is unsure, it must be computed exactly.
template <bool EXACT> DEVICE u32 computed(u32 x, u32 second, u32 third, const Sums& of, bool& unsure) {
  if (INPUT == 1) return times(rounded_pair<X_TYPE>(low_of(x) * of.factor, high_of(x) * of.factor), second);
  if (INPUT == 2)
    return rounded_pair<X_TYPE>(fmaf(low_of(second), of.factor * (low_of(x) - of.mean), low_of(third)),
                   fmaf(high_of(second), of.factor * (high_of(x) - of.mean), high_of(third)));
  if (INPUT >= 3) {
    const u32 y = ACT == 1 ? max_pair(x, 0) : rounded_pair<X_TYPE>(act<EXACT>(low_of(x), unsure), act<EXACT>(high_of(x), unsure));
    return INPUT == 4 ? times(y, second) : y;
  }
  return x;
}

struct Vector {   // 8 channels
  u32 pair[4];
  DEVICE float get(int i) const { return to_float<X_TYPE>((u16)(pair[i / 2] >> (i % 2 * 16))); }
};
DEVICE void load_vector(Vector& v, const char* row, int vector, int inputs) {
  const int channel = vector * 8;
  if (FULL || (ALIGNED && channel + 8 <= inputs)) {
    const uint4 w = ((const uint4*)row)[vector];
    v.pair[0] = w.x; v.pair[1] = w.y; v.pair[2] = w.z; v.pair[3] = w.w;
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v.pair[i] = 0;
      if (channel + 2 * i < inputs) v.pair[i] = ((const u16*)row)[channel + 2 * i];
      if (channel + 2 * i + 1 < inputs) v.pair[i] |= (u32)((const u16*)row)[channel + 2 * i + 1] << 16;
    }
  }
}
// Channel i of a vector as it is quantized.
DEVICE float value(const Arguments& p, const Vector& v, int vector, int i) {
  const int channel = vector * 8 + i;
  if (SMOOTH) return channel < p.inputs ? __fdiv_rn(v.get(i), p.smooth[channel]) : 0.f;
  return v.get(i);
}
DEVICE const char* x_row(const Arguments& p, long long token) { return p.x + token * p.x_stride * 2; }
DEVICE const char* second_row(const Arguments& p, long long token) {
  return p.second + (SECOND_ROW ? token * p.second_stride * 2 : 0);
}

// A channel by itself: what is fetched of it, and what it is once the norm is known.
struct Single { u16 x, second, third; };
DEVICE Single fetch_single(const Arguments& p, int token, int channel) {
  Single s;
  s.x = ((const u16*)x_row(p, token))[channel];
  s.second = NORM || SECOND_ROW ? ((const u16*)second_row(p, token))[channel] : 0;
  s.third = INPUT == 2 ? ((const u16*)p.third)[channel] : 0;
  return s;
}
DEVICE float value_of(const Arguments& p, const Single& s, int channel, const Sums& sums) {
  bool sure = true;
  const float x = low_of(computed<true>(s.x, s.second, s.third, sums, sure));
  return SMOOTH ? __fdiv_rn(x, p.smooth[channel]) : x;
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

// Which channels the maximum takes: of four vectors in a word, flag (vector v, channel 2 j + c) is bit
// 7 - (2 v + j / 2) of byte 2 (j & 1) + c, so that one shift brings the flags of two pairs to the signs of bytes.
DEVICE u32 flags_of(const uint4& keep, int v) {
  const u32 kept[4] = {keep.x, keep.y, keep.z, keep.w};
  u32 flags = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) {
#pragma unroll
    for (int c = 0; c < 2; c++) flags |= (kept[j] >> 16 * c & 1) << (8 * (2 * (j & 1) + c) + 7 - (2 * v + j / 2));
  }
  return flags;
}
// Bytes full of the signs of others. Volatile, or a loop's masks would all be kept in registers.
DEVICE u32 signs_of(u32 word, u32 which) {
  u32 signs;
  asm volatile("prmt.b32 %0, %1, 0, %2;" : "=r"(signs) : "r"(word), "r"(which));
  return signs;
}
// The largest absolute value of a vector's channels that are kept: bits of a float, or of two 16-bit ones.
DEVICE u32 largest_of(u32 most, const Arguments& p, const Vector& v, int vector, u32 flags, int place) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 kept = signs_of(flags << (2 * place + j / 2), j & 1 ? 0xBBAA : 0x9988);
    if (SMOOTH) {
      if (kept & 0xFFFF) most = max(most, absolute(value(p, v, vector, 2 * j)));
      if (kept >> 16) most = max(most, absolute(value(p, v, vector, 2 * j + 1)));
    } else {
      most = max_pair(most, v.pair[j] & kept & 0x7FFF7FFF);
    }
  }
  return most;
}
DEVICE u32 largest_of_both(u32 most) {
  if (SMOOTH) return most;
  return max(absolute(to_float<X_TYPE>((u16)most)), absolute(to_float<X_TYPE>((u16)(most >> 16))));
}

// x / step, near enough to round to the same integer; both far from the ends of the range.
DEVICE float quotient(float x, float step, float inverse) {
  float q = x * inverse;
  q = fmaf(fmaf(-q, step, x), inverse, q);
  return SMOOTH ? fmaf(fmaf(-q, step, x), inverse, q) : q;
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
  if (FULL || left >= 8) *(uint2*)at = make_uint2(low, high);
  else {
    for (int j = 0; j < left; j++) at[j] = (char)(j < 4 ? low >> 8 * j : high >> 8 * (j - 4));
  }
#else
  u32 word = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) word |= (byte[j] & 15) << 4 * j;
  char* at = out + p.first / 2 + vector * 4;
  if (FULL || left >= 8) *(u32*)at = word;
  else {   // the upper half of the last byte may be an entry's column, which comes after this
    for (int j = 0; j < (left + 1) / 2; j++) at[j] = (char)(word >> 8 * j);
  }
#endif
}

// What a thread holds of a token.
struct Held {
  Vector x[HOLD ? VECTORS : 1], second[HOLD && SECOND_ROW ? VECTORS : 1];
  Single wide[LONE], entry[LONE];
};

struct Block {
  const Arguments& p;
  const int thread;
  u32 kept[(VECTORS + 3) / 4];
  u32* maxima;      // [2][WARPS]
  double* parts;    // [2][WARPS]

  DEVICE int vector(int i) const { return i * THREADS + thread; }
  DEVICE bool holds(int i) const { return FULL || vector(i) * 8 < p.inputs; }
  DEVICE u32 flags(int at, int place) const {
    const bool some = p.keep && at * 8 < p.inputs;
    return flags_of(some ? p.keep[at] : make_uint4(0x00010001, 0x00010001, 0x00010001, 0x00010001), place);
  }
  DEVICE void fetch(Held& h, int token) const {
    if (HOLD) {
      const char* row = x_row(p, token);
#pragma unroll
      for (int i = 0; i < VECTORS; i++) {
        if (!holds(i)) continue;
        load_vector(h.x[HOLD ? i : 0], row, vector(i), p.inputs);
        if (SECOND_ROW) load_vector(h.second[HOLD && SECOND_ROW ? i : 0], second_row(p, token), vector(i), p.inputs);
      }
    }
#pragma unroll
    for (int i = 0; i < LONE; i++) {
      if (vector(i) < p.wide_count) h.wide[i] = fetch_single(p, token, p.wide[vector(i)].x);
      if (vector(i) < p.entry_count) h.entry[i] = fetch_single(p, token, p.entries[vector(i)].y);
    }
  }
  DEVICE double sum(double mine, int turn) const {
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) mine += __shfl_xor_sync(0xFFFFFFFFu, mine, lanes);
    if ((thread & 31) == 0) parts[turn * WARPS + thread / 32] = mine;
    __syncthreads();
    double all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += parts[turn * WARPS + w];
    return all;
  }
  // Sum over the token of the channels less `from`, or of the squares of that.
  template <bool SQUARES> DEVICE double sum_of(const Held& h, float from, int turn) const {
    double mine = 0;
#pragma unroll
    for (int i = 0; i < (HOLD ? VECTORS : 0); i++) {
      const int left = FULL ? 8 : p.inputs - vector(i) * 8;
      if (left <= 0) continue;
      float part = 0.f;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float x = j < left ? h.x[HOLD ? i : 0].get(j) - from : 0.f;
        part = SQUARES ? fmaf(x, x, part) : part + x;
      }
      mine += (double)part;
    }
    return sum(mine, turn);
  }
  DEVICE Sums sums_of(const Held& h) const {
    Sums s = {0.f, 0.f};
    if (INPUT == 2) s.mean = (float)(sum_of<false>(h, 0.f, 0) / p.inputs);
    if (NORM) s.factor = rsqrtf((float)(sum_of<true>(h, s.mean, 1) / p.inputs) + p.epsilon);
    return s;
  }
  // Puts what is quantized in the place of what was fetched.
  DEVICE void compute(Held& h, const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < (HOLD ? VECTORS : 0); i++) {
      if (!holds(i)) continue;
      Vector other, third;
      if (NORM) load_vector(other, p.second, vector(i), p.inputs);
      if (INPUT == 2) load_vector(third, p.third, vector(i), p.inputs);
      Vector& x = h.x[HOLD ? i : 0];
      Vector y;
      bool unsure = false;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (SECOND_ROW) other.pair[j] = h.second[HOLD && SECOND_ROW ? i : 0].pair[j];
        y.pair[j] = computed<false>(x.pair[j], other.pair[j], INPUT == 2 ? third.pair[j] : 0, sums, unsure);
      }
      if (INPUT >= 3 && ACT == 0 && unsure) {
#pragma unroll
        for (int j = 0; j < 4; j++) y.pair[j] = computed<true>(x.pair[j], other.pair[j], 0, sums, unsure);
      }
      x = y;
    }
  }
  // `visit(vector, its number, i)` for all vectors of this thread.
  template <class Visit> DEVICE void each(const Held& h, int token, Visit visit) const {
    if (HOLD) {
#pragma unroll
      for (int i = 0; i < VECTORS; i++)
        if (holds(i)) visit(h.x[HOLD ? i : 0], vector(i), i);
    } else {
      for (int at = thread; at * 8 < p.inputs; at += THREADS) {
        Vector v;
        load_vector(v, x_row(p, token), at, p.inputs);
        visit(v, at, 0);
      }
    }
  }

  // `turn` is 0 and 1 in turns: the maxima of one token may still be read while those of the next are written.
  DEVICE void quantize(Held& h, Held& next, int token, int next_token, int turn) const {
    if (AHEAD && next_token < p.tokens) fetch(next, next_token);
    const Sums sums = sums_of(h);
    if (INPUT) compute(h, sums);
    u32 most = 0;
    each(h, token, [&](const Vector& v, int at, int i) {
      if (HOLD) most = largest_of(most, p, v, at, kept[i / 4], i % 4);
      else most = largest_of(most, p, v, at, flags(at, 0), 0);
    });
    // Division keeps the order, so it may come after the maximum.
    most = absolute(__fdiv_rn(__uint_as_float(warp_max(largest_of_both(most))), (float)p.limit));
    const auto ratio = [&](const Single& s, int e) {
      const int2 of = p.wide[e];
      most = max(most, absolute(__fdiv_rn(value_of(p, s, of.x, sums), (float)of.y)));
    };
#pragma unroll
    for (int i = 0; i < LONE; i++) if (vector(i) < p.wide_count) ratio(h.wide[i], vector(i));
    for (int e = vector(LONE); e < p.wide_count; e += THREADS) ratio(fetch_single(p, token, p.wide[e].x), e);
    __syncwarp();
    most = warp_max(most);
    if ((thread & 31) == 0) maxima[turn * WARPS + thread / 32] = most;
    __syncthreads();
    most = warp_max((thread & 31) < WARPS ? maxima[turn * WARPS + (thread & 31)] : 0);
    const bool sound = most < 0x7F800000u;   // neither infinity nor NaN
    float step = p.static_step ? *p.static_step : fmaxf(__uint_as_float(most), SMALLEST_STEP);
    if (!sound) step = __int_as_float(0x7FC00000);
    if (thread == 0) p.step[token] = step;
    char* out = p.q + token * p.q_stride;
    if (step > 1e-30f && step < 1e30f) {
      const float inverse = __fdiv_rn(1.f, step);
      each(h, token, [&](const Vector& v, int at, int) {
        u32 integers[8];
        integers_of(integers, p, v, at, step, inverse);
        store_integers(integers, p, out, at);
      });
    } else {
      for (int at = thread; at * 8 < p.inputs; at += THREADS) {
        u32 integers[8];
#pragma unroll
        for (int j = 0; j < 8; j++) integers[j] = 0;
#pragma unroll 1
        for (int j = 0; j < 8; j++) {
          const int channel = at * 8 + j;
          int q = 0;
          if (channel < p.inputs)
            q = integer_of(value_of(p, fetch_single(p, token, channel), channel, sums), step, p.clamp);
#pragma unroll
          for (int to = 0; to < 8; to++) if (to == j) integers[to] = (u32)q;
        }
        store_integers(integers, p, out, at);
      }
    }
    if (p.entry_count == 0) return;
    __syncthreads();   // entries write over what the sweep left in their columns
    const auto digit = [&](const Single& s, const int4& of) {
      return piece_of(integer_of(value_of(p, s, of.y, sums), step, of.w), of.z);
    };
#if WIDTH == 8
#pragma unroll
    for (int i = 0; i < LONE; i++)
      if (vector(i) < p.entry_count) { const int4 of = p.entries[vector(i)]; out[of.x] = (char)digit(h.entry[i], of); }
    for (int e = vector(LONE); e < p.entry_count; e += THREADS) {
      const int4 of = p.entries[e];
      out[of.x] = (char)digit(fetch_single(p, token, of.y), of);
    }
#else
    // Two columns share a byte: entries are sorted by column, and one thread writes both of a byte.
    const auto nibble = [&](const int4& of) { return (u32)digit(fetch_single(p, token, of.y), of) & 15; };
    for (int e = thread; e < p.entry_count; e += THREADS) {
      const int4 here = p.entries[e];
      if (e > 0 && (here.x & 1) && p.entries[e - 1].x == here.x - 1) continue;
      u32 byte = (unsigned char)out[here.x / 2];
      byte = here.x & 1 ? (byte & 0x0F) | nibble(here) << 4 : (byte & 0xF0) | nibble(here);
      if (!(here.x & 1) && e + 1 < p.entry_count && p.entries[e + 1].x == here.x + 1)
        byte = (byte & 0x0F) | nibble(p.entries[e + 1]) << 4;
      out[here.x / 2] = (char)byte;
    }
#endif
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
flat_quantize(const __grid_constant__ Arguments p) {
  __shared__ u32 maxima[2 * WARPS];
  __shared__ double parts[NORM ? 2 * WARPS : 1];
  Block block = {p, (int)threadIdx.x, {}, maxima, parts};
  if (HOLD) {
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      if (i % 4 == 0) block.kept[i / 4] = 0;
      block.kept[i / 4] |= block.flags(block.vector(i), i % 4);
    }
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int every = gridDim.x;
  int token = blockIdx.x;
  Held held, next;
  if (token < p.tokens) block.fetch(next, token);
  for (int turn = 0; token < p.tokens; token += every, turn ^= 1) {
    held = next;
    block.quantize(held, next, token, token + every, turn);
    if (!AHEAD && token + every < p.tokens) block.fetch(next, token + every);
  }
}
