// AVX2 + FMA + F16C. Cells are byte-transposed, [4 bytes][16 rows]: a ymm register holds two bytes of
// 16 rows, one in each half, and `vpshufb` looks up 32 entries in two tables of 16, one in each half.
//
// exact: 16-bit tables, biased by 32768 and split in a table of low and one of high bytes.
// fast: 8-bit tables, biased by 128.
//
// Sums of bytes without widening each lookup: with s two unsigned bytes (even row, odd row) of a
// 16-bit lane,  all += s  and  odd += s >> 8  leave  even = all - (odd << 8)  modulo 2^16. A chunk
// adds at most 16 bytes to a lane, far below 2^16.
#include <immintrin.h>

#include "kernels.h"

namespace lutra {
namespace {

#define LUTRA_INLINE static inline __attribute__((always_inline))

LUTRA_INLINE __m256 from_bfloat(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

LUTRA_INLINE __m128i to_bfloat(__m256 f) {  // round to nearest even; NaN stays NaN
  const __m256i x = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(f, f, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  const __m256i chosen = _mm256_srli_epi32(
      _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
  const __m256i packed = _mm256_packus_epi32(chosen, chosen);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

// 8 numbers of a per-row tensor, starting at element i.
LUTRA_INLINE __m256 numbers(const void* p, Dtype dtype, size_t i) {
  if (dtype == F16) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)p + i)));
  if (dtype == F32) return _mm256_loadu_ps((const float*)p + i);
  return from_bfloat(_mm_loadu_si128((const __m128i*)((const uint16_t*)p + i)));
}

LUTRA_INLINE int element_size(Dtype dtype) { return dtype == F32 ? 4 : 2; }

LUTRA_INLINE void copy_bytes(void* dst, const void* src, int n) {
  for (int i = 0; i < n; i++) ((unsigned char*)dst)[i] = ((const unsigned char*)src)[i];
}

void load(const void* src, Dtype dtype, int n, float* dst) {
  int i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, numbers(src, dtype, (size_t)i));
  if (i == n) return;
  alignas(32) unsigned char rest[32] = {};
  alignas(32) float values[8];
  const int size = element_size(dtype);
  copy_bytes(rest, (const unsigned char*)src + (size_t)i * size, (n - i) * size);
  _mm256_store_ps(values, numbers(rest, dtype, 0));
  copy_bytes(dst + i, values, (n - i) * 4);
}

LUTRA_INLINE void store8(__m256 value, Dtype dtype, void* dst) {
  if (dtype == F32)
    _mm256_storeu_ps((float*)dst, value);
  else
    _mm_storeu_si128((__m128i*)dst, dtype == F16
                                        ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)
                                        : to_bfloat(value));
}

void store(const float* src, const float* bias, int n, Dtype dtype, void* dst) {
  const int size = element_size(dtype);
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    __m256 value = _mm256_loadu_ps(src + i);
    if (bias) value = _mm256_add_ps(value, _mm256_loadu_ps(bias + i));
    store8(value, dtype, (unsigned char*)dst + (size_t)i * size);
  }
  if (i == n) return;
  alignas(32) float values[8] = {};
  alignas(32) unsigned char rest[32];
  for (int k = 0; k < n - i; k++) values[k] = bias ? src[i + k] + bias[i + k] : src[i + k];
  store8(_mm256_load_ps(values), dtype, rest);
  copy_bytes((unsigned char*)dst + (size_t)i * size, rest, (n - i) * size);
}

// Tables of one word, in order of use. Half b of a cell holds bytes 2b and 2b + 1 of the words, so
// its low nibbles are subgroups 4b and 4b + 2, its high nibbles 4b + 1 and 4b + 3.
//   fast   [half][nibble]{2 x 16 bytes}
//   exact  [half][nibble][low or high bytes]{2 x 16 bytes}
constexpr int kExactTable = 256, kFastTable = 128;

void build(const float* x, const Weight& w, int begin, int end, Numerics numerics,
           unsigned char* entries, float* scale, float* sum) {
  const __m256 minus = _mm256_set1_ps(-0.0f);
  const __m256i low_v = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256 sign[3];  // sign bit to flip on input j of the first 8 sums
  for (int j = 0; j < 3; j++) {
    const __m256i bit = _mm256_and_si256(low_v, _mm256_set1_epi32(1 << j));
    const __m256 unset = _mm256_castsi256_ps(_mm256_cmpeq_epi32(bit, _mm256_setzero_si256()));
    sign[j] = _mm256_and_ps(unset, minus);
  }
  const float top = numerics == kFast ? 127.0f : 32767.0f;
  const __m256i bias = _mm256_set1_epi32(numerics == kFast ? 128 : 32768);
  for (int g = begin; g < end; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    float total = 0;
    for (int c = 0; c < w.chunks_per_group; c++) {
      const int from = first + c * kChunkWords;
      const int to = from + kChunkWords < last ? from + kChunkWords : last;
      float limit = 0;
      for (int i = from * 32; i < to * 32; i += 4) {
        float magnitude = 0, value = 0;
        for (int j = 0; j < 4; j++) {
          magnitude += __builtin_fabsf(x[i + j]);
          value += x[i + j];
        }
        total += value;
        limit = magnitude > limit ? magnitude : limit;
      }
      const __m256 inverse = _mm256_set1_ps(limit > 1e-33f ? top / limit : 0.0f);
      scale[g * w.chunks_per_group + c] = limit <= 1e-33f ? 0.0f : limit / top;
      for (int i = from; i < to; i++)
        for (int s = 0; s < 8; s++) {
          const float* p = x + i * 32 + s * 4;
          __m256 f = _mm256_xor_ps(_mm256_set1_ps(p[0]), sign[0]);
          f = _mm256_add_ps(f, _mm256_xor_ps(_mm256_set1_ps(p[1]), sign[1]));
          f = _mm256_add_ps(f, _mm256_xor_ps(_mm256_set1_ps(p[2]), sign[2]));
          const __m256 last_input = _mm256_set1_ps(p[3]);
          const __m256i n0 = _mm256_add_epi32(
              bias, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(f, last_input), inverse)));
          const __m256i n1 = _mm256_add_epi32(
              bias, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_add_ps(f, last_input), inverse)));
          // 16 unsigned words in order; rounding may reach past the ends by one, packus clamps.
          const __m256i n = _mm256_permute4x64_epi64(_mm256_packus_epi32(n0, n1), 0xD8);
          const int half = s >> 2, nibble = s & 1, lane = (s >> 1) & 1;
          const int place = half * 2 + nibble;
          const __m128i lo = _mm256_castsi256_si128(n), hi = _mm256_extracti128_si256(n, 1);
          if (numerics == kFast) {
            _mm_storeu_si128(
                (__m128i*)(entries + (size_t)i * kFastTable + place * 32 + lane * 16),
                _mm_packus_epi16(lo, hi));
          } else {
            const __m128i byte = _mm_set1_epi16(255);
            unsigned char* at = entries + (size_t)i * kExactTable + place * 64 + lane * 16;
            _mm_storeu_si128((__m128i*)at, _mm_packus_epi16(_mm_and_si128(lo, byte),
                                                            _mm_and_si128(hi, byte)));
            _mm_storeu_si128((__m128i*)(at + 32), _mm_packus_epi16(_mm_srli_epi16(lo, 8),
                                                                   _mm_srli_epi16(hi, 8)));
          }
        }
    }
    sum[g] = total;
  }
}

struct Sums {  // unsigned sums of bytes, see the top of the file
  __m256i all, odd;
};

LUTRA_INLINE void add(Sums& a, __m256i bytes) {
  a.all = _mm256_add_epi16(a.all, bytes);
  a.odd = _mm256_add_epi16(a.odd, _mm256_srli_epi16(bytes, 8));
}

LUTRA_INLINE __m256i table_at(const unsigned char* p) {
  return _mm256_loadu_si256((const __m256i*)p);
}

// 16 sums in row order, as two registers of 8 x int32.
LUTRA_INLINE void in_row_order(const Sums& a, __m256i* first, __m256i* second) {
  const __m256i even = _mm256_sub_epi16(a.all, _mm256_slli_epi16(a.odd, 8));
  const __m128i e = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
  const __m128i o = _mm_add_epi16(_mm256_castsi256_si128(a.odd),
                                  _mm256_extracti128_si256(a.odd, 1));
  *first = _mm256_cvtepu16_epi32(_mm_unpacklo_epi16(e, o));
  *second = _mm256_cvtepu16_epi32(_mm_unpackhi_epi16(e, o));
}

template <bool FAST>
void tile_times_row(const Weight& w, int tile, const Table& table, float* y) {
  constexpr int kTable = FAST ? kFastTable : kExactTable;
  const unsigned char* cell =
      (const unsigned char*)(w.planes + (size_t)tile * w.words * w.bits * kTileRows);
  const __m256i nibble = _mm256_set1_epi8(15);
  const size_t planes_of_scale = w.uniform ? 1 : w.bits;
  size_t scale_at = (size_t)tile * w.groups * planes_of_scale * kTileRows;
  size_t offset_at = (size_t)tile * w.groups * kTileRows;
  __m256 y0 = _mm256_setzero_ps(), y1 = _mm256_setzero_ps();
  for (int g = 0; g < w.groups; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    float halving = 1.0f;
    for (int q = 0; q < w.bits; q++) {
      __m256 plane0 = _mm256_setzero_ps(), plane1 = _mm256_setzero_ps();
      const float* chunk_scale = table.scale + g * w.chunks_per_group;
      for (int from = first; from < last; from += kChunkWords) {
        const int to = from + kChunkWords < last ? from + kChunkWords : last;
        Sums low = {_mm256_setzero_si256(), _mm256_setzero_si256()}, high = low;
        const unsigned char* t = table.entries + (size_t)from * kTable;
        for (int i = from; i < to; i++, cell += 64, t += kTable) {
          _mm_prefetch((const char*)cell + 2048, _MM_HINT_T0);
#pragma GCC unroll 2
          for (int half = 0; half < 2; half++) {
            const __m256i v = _mm256_loadu_si256((const __m256i*)(cell + half * 32));
            const __m256i n0 = _mm256_and_si256(v, nibble);
            const __m256i n1 = _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
            if constexpr (FAST) {
              add(low, _mm256_shuffle_epi8(table_at(t + half * 64), n0));
              add(low, _mm256_shuffle_epi8(table_at(t + half * 64 + 32), n1));
            } else {
              add(low, _mm256_shuffle_epi8(table_at(t + half * 128), n0));
              add(high, _mm256_shuffle_epi8(table_at(t + half * 128 + 32), n0));
              add(low, _mm256_shuffle_epi8(table_at(t + half * 128 + 64), n1));
              add(high, _mm256_shuffle_epi8(table_at(t + half * 128 + 96), n1));
            }
          }
        }
        __m256i a, b;
        in_row_order(low, &a, &b);
        if constexpr (!FAST) {
          __m256i c, d;
          in_row_order(high, &c, &d);
          a = _mm256_add_epi32(a, _mm256_slli_epi32(c, 8));
          b = _mm256_add_epi32(b, _mm256_slli_epi32(d, 8));
        }
        const __m256i bias = _mm256_set1_epi32((FAST ? 128 : 32768) * 8 * (to - from));
        const __m256 s = _mm256_set1_ps(*chunk_scale++);
        plane0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(a, bias)), s, plane0);
        plane1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(b, bias)), s, plane1);
      }
      const __m256 h = _mm256_set1_ps(halving);
      y0 = _mm256_fmadd_ps(plane0, _mm256_mul_ps(numbers(w.scale, w.scale_dtype, scale_at), h),
                           y0);
      y1 = _mm256_fmadd_ps(
          plane1, _mm256_mul_ps(numbers(w.scale, w.scale_dtype, scale_at + 8), h), y1);
      if (w.uniform)
        halving *= 0.5f;
      else
        scale_at += kTileRows;
    }
    if (w.uniform) scale_at += kTileRows;
    const __m256 total = _mm256_set1_ps(table.sum[g]);
    y0 = _mm256_fmadd_ps(numbers(w.offset, w.offset_dtype, offset_at), total, y0);
    y1 = _mm256_fmadd_ps(numbers(w.offset, w.offset_dtype, offset_at + 8), total, y1);
    offset_at += kTileRows;
  }
  _mm256_storeu_ps(y, y0);
  _mm256_storeu_ps(y + 8, y1);
}

void multiply(const Weight& w, int block, const Table* tables, int m, Numerics numerics,
              float* out) {
  for (int r = 0; r < m; r++) {
    float* y = out + (size_t)r * kMaxBlockRows;
    if (numerics == kFast)
      tile_times_row<true>(w, block, tables[r], y);
    else
      tile_times_row<false>(w, block, tables[r], y);
  }
}

void decode(const Weight& w, int block, Dtype dtype, void* dst, size_t stride) {
  const unsigned char* cell =
      (const unsigned char*)(w.planes + (size_t)block * w.words * w.bits * kTileRows);
  const size_t planes_of_scale = w.uniform ? 1 : w.bits;
  const __m256i bits_of_byte = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
  for (int g = 0; g < w.groups; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    const int count = last - first;
    const size_t at = (size_t)block * w.groups + g;
    float alpha[kMaxBits][kTileRows], offset[kTileRows];
    for (int k = 0; k < kTileRows; k += 8) {
      for (int q = 0; q < w.bits; q++) {
        const size_t from = (at * planes_of_scale + (w.uniform ? 0 : q)) * kTileRows + k;
        const __m256 halving = _mm256_set1_ps(w.uniform ? 1.0f / (float)(1 << q) : 1.0f);
        _mm256_storeu_ps(alpha[q] + k,
                         _mm256_mul_ps(numbers(w.scale, w.scale_dtype, from), halving));
      }
      _mm256_storeu_ps(offset + k, numbers(w.offset, w.offset_dtype, at * kTileRows + k));
    }
    const size_t plane_step = (size_t)count * 64;
    for (int row = 0; row < kTileRows; row++) {
      __m256 a[kMaxBits];
      for (int q = 0; q < w.bits; q++) a[q] = _mm256_set1_ps(alpha[q][row]);
      const __m256 z = _mm256_set1_ps(offset[row]);
      for (int i = 0; i < count; i++)
        for (int byte = 0; byte < 4; byte++) {
          const unsigned char* p = cell + (size_t)i * 64 + byte * 16 + row;
          __m256 value = z;
          for (int q = 0; q < w.bits; q++) {
            const __m256i set = _mm256_and_si256(_mm256_set1_epi32(p[q * plane_step]), bits_of_byte);
            const __m256i clear = _mm256_cmpeq_epi32(set, _mm256_setzero_si256());
            const __m256 flip = _mm256_and_ps(_mm256_castsi256_ps(clear), _mm256_set1_ps(-0.0f));
            value = _mm256_add_ps(value, _mm256_xor_ps(a[q], flip));
          }
          const size_t to = (size_t)row * stride + (size_t)(first + i) * 32 + byte * 8;
          if (dtype == F32)
            _mm256_storeu_ps((float*)dst + to, value);
          else
            _mm_storeu_si128((__m128i*)((uint16_t*)dst + to), to_bfloat(value));
        }
    }
    cell += plane_step * w.bits;
  }
}

const Isa isa = {"avx2", 1,     1,        {kExactTable, kFastTable}, load, store,
                 build,  multiply, decode, nullptr};

}  // namespace

const Isa* const kAvx2 = &isa;

}  // namespace lutra
