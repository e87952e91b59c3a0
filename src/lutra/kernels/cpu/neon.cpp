// AArch64: `tbl` looks up 16 bytes in a table of 16. Cells are byte-transposed, [4 bytes][16 rows], so a
// register holds one byte of 16 rows; lookups are added to 16-bit sums by `uaddw`.
//
// exact: 16-bit tables, biased by 32768 and split in a table of low and one of high bytes.
// fast: 8-bit tables, biased by 128.
#include <arm_neon.h>

#include "kernels.h"

namespace lutra {
namespace {

#define LUTRA_INLINE static inline __attribute__((always_inline))

LUTRA_INLINE float32x4_t numbers(const void* p, Dtype dtype, size_t i) {
  if (dtype == F32) return vld1q_f32((const float*)p + i);
  const uint16x4_t h = vld1_u16((const uint16_t*)p + i);
  if (dtype == F16) return vcvt_f32_f16(vreinterpret_f16_u16(h));
  return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

LUTRA_INLINE uint16x4_t to_bfloat(float32x4_t f) {  // round to nearest even; NaN stays NaN
  const uint32x4_t x = vreinterpretq_u32_f32(f);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(x, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(x, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(x, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(f, f), rounded, quiet), 16);
}

LUTRA_INLINE void store4(float32x4_t value, Dtype dtype, void* dst, size_t i) {
  if (dtype == F32)
    vst1q_f32((float*)dst + i, value);
  else
    vst1_u16((uint16_t*)dst + i,
             dtype == F16 ? vreinterpret_u16_f16(vcvt_f16_f32(value)) : to_bfloat(value));
}

LUTRA_INLINE int element_size(Dtype dtype) { return dtype == F32 ? 4 : 2; }

LUTRA_INLINE void copy_bytes(void* dst, const void* src, int n) {
  for (int i = 0; i < n; i++) ((unsigned char*)dst)[i] = ((const unsigned char*)src)[i];
}

void load(const void* src, Dtype dtype, int n, float* dst) {
  int i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(dst + i, numbers(src, dtype, (size_t)i));
  if (i == n) return;
  unsigned char rest[16] = {};
  float values[4];
  const int size = element_size(dtype);
  copy_bytes(rest, (const unsigned char*)src + (size_t)i * size, (n - i) * size);
  vst1q_f32(values, numbers(rest, dtype, 0));
  copy_bytes(dst + i, values, (n - i) * 4);
}

void store(const float* src, const float* bias, int n, Dtype dtype, void* dst) {
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    float32x4_t value = vld1q_f32(src + i);
    if (bias) value = vaddq_f32(value, vld1q_f32(bias + i));
    store4(value, dtype, dst, (size_t)i);
  }
  if (i == n) return;
  float values[4] = {};
  unsigned char rest[16];
  for (int k = 0; k < n - i; k++) values[k] = bias ? src[i + k] + bias[i + k] : src[i + k];
  store4(vld1q_f32(values), dtype, rest, 0);
  const int size = element_size(dtype);
  copy_bytes((unsigned char*)dst + (size_t)i * size, rest, (n - i) * size);
}

// Tables of one word, in order of use: [byte][nibble]{16}, for exact [byte][nibble][low, high]{16}.
constexpr int kExactTable = 256, kFastTable = 128;

void build(const float* x, const Weight& w, int begin, int end, Numerics numerics,
           unsigned char* entries, float* scale, float* sum) {
  const float top = numerics == kFast ? 127.0f : 32767.0f;
  const int bias = numerics == kFast ? 128 : 32768;
  for (int g = begin; g < end; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    float total = 0;
    for (int c = 0; c < w.chunks_per_group; c++) {
      const int from = first + c * kChunkWords;
      const int to = from + kChunkWords < last ? from + kChunkWords : last;
      float limit = 0;
      for (int i = from * 32; i < to * 32; i += 4) {
        const float32x4_t v = vld1q_f32(x + i);
        total += vaddvq_f32(v);
        const float magnitude = vaddvq_f32(vabsq_f32(v));
        limit = magnitude > limit ? magnitude : limit;
      }
      const float inverse = limit > 1e-33f ? top / limit : 0.0f;
      scale[g * w.chunks_per_group + c] = limit <= 1e-33f ? 0.0f : limit / top;
      for (int s = from * 8; s < to * 8; s++) {
        const float* p = x + (size_t)s * 4;
        unsigned char* at = entries + (size_t)s * (numerics == kFast ? 16 : 32);
        for (int v = 0; v < 16; v += 4) {
          const float high = (v & 8 ? p[3] : -p[3]) + (v & 4 ? p[2] : -p[2]);
          const float four[4] = {high - p[1] - p[0], high - p[1] + p[0], high + p[1] - p[0],
                                 high + p[1] + p[0]};
          const int32x4_t n = vaddq_s32(vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(four), inverse)),
                                        vdupq_n_s32(bias));
          uint32_t out[4];
          vst1q_u32(out, vreinterpretq_u32_s32(n));
          for (int k = 0; k < 4; k++) {
            at[v + k] = (unsigned char)out[k];
            if (numerics != kFast) at[16 + v + k] = (unsigned char)(out[k] >> 8);
          }
        }
      }
    }
    sum[g] = total;
  }
}

struct Sums {
  uint16x8_t first, second;  // rows 0..7 and 8..15
};

LUTRA_INLINE void add(Sums& a, const unsigned char* table, uint8x16_t index) {
  const uint8x16_t bytes = vqtbl1q_u8(vld1q_u8(table), index);
  a.first = vaddw_u8(a.first, vget_low_u8(bytes));
  a.second = vaddw_high_u8(a.second, bytes);
}

template <bool FAST>
void tile_times_row(const Weight& w, int tile, const Table& table, float* y) {
  constexpr int kTable = FAST ? kFastTable : kExactTable, kNibble = FAST ? 16 : 32;
  const unsigned char* cell =
      (const unsigned char*)(w.planes + (size_t)tile * w.words * w.bits * kTileRows);
  const size_t planes_of_scale = w.uniform ? 1 : w.bits;
  size_t scale_at = (size_t)tile * w.groups * planes_of_scale * kTileRows;
  size_t offset_at = (size_t)tile * w.groups * kTileRows;
  float32x4_t out[4];
  for (int k = 0; k < 4; k++) out[k] = vdupq_n_f32(0);
  for (int g = 0; g < w.groups; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    float halving = 1.0f;
    for (int q = 0; q < w.bits; q++) {
      float32x4_t plane[4];
      for (int k = 0; k < 4; k++) plane[k] = vdupq_n_f32(0);
      const float* chunk_scale = table.scale + g * w.chunks_per_group;
      for (int from = first; from < last; from += kChunkWords) {
        const int to = from + kChunkWords < last ? from + kChunkWords : last;
        Sums low = {vdupq_n_u16(0), vdupq_n_u16(0)}, high = low;
        const unsigned char* t = table.entries + (size_t)from * kTable;
        for (int i = from; i < to; i++, cell += 64, t += kTable) {
          __builtin_prefetch(cell + 2048);
#pragma GCC unroll 4
          for (int byte = 0; byte < 4; byte++) {
            const uint8x16_t v = vld1q_u8(cell + byte * 16);
            const uint8x16_t n0 = vandq_u8(v, vdupq_n_u8(15)), n1 = vshrq_n_u8(v, 4);
            const unsigned char* p = t + byte * 2 * kNibble;
            add(low, p, n0);
            add(low, p + kNibble, n1);
            if constexpr (!FAST) {
              add(high, p + 16, n0);
              add(high, p + kNibble + 16, n1);
            }
          }
        }
        uint32x4_t sums[4] = {vmovl_u16(vget_low_u16(low.first)), vmovl_high_u16(low.first),
                              vmovl_u16(vget_low_u16(low.second)), vmovl_high_u16(low.second)};
        if constexpr (!FAST) {
          sums[0] = vaddq_u32(sums[0], vshll_n_u16(vget_low_u16(high.first), 8));
          sums[1] = vaddq_u32(sums[1], vshll_high_n_u16(high.first, 8));
          sums[2] = vaddq_u32(sums[2], vshll_n_u16(vget_low_u16(high.second), 8));
          sums[3] = vaddq_u32(sums[3], vshll_high_n_u16(high.second, 8));
        }
        const int32x4_t bias = vdupq_n_s32((FAST ? 128 : 32768) * 8 * (to - from));
        const float s = *chunk_scale++;
        for (int k = 0; k < 4; k++)
          plane[k] = vfmaq_n_f32(
              plane[k], vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(sums[k]), bias)), s);
      }
      for (int k = 0; k < 4; k++)
        out[k] = vfmaq_f32(out[k], plane[k],
                           vmulq_n_f32(numbers(w.scale, w.scale_dtype, scale_at + 4 * k), halving));
      if (w.uniform)
        halving *= 0.5f;
      else
        scale_at += kTileRows;
    }
    if (w.uniform) scale_at += kTileRows;
    for (int k = 0; k < 4; k++)
      out[k] = vfmaq_n_f32(out[k], numbers(w.offset, w.offset_dtype, offset_at + 4 * k),
                           table.sum[g]);
    offset_at += kTileRows;
  }
  for (int k = 0; k < 4; k++) vst1q_f32(y + 4 * k, out[k]);
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
  const uint32_t bits_of_byte[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  for (int g = 0; g < w.groups; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    const int count = last - first;
    const size_t at = (size_t)block * w.groups + g;
    float alpha[kMaxBits][kTileRows], offset[kTileRows];
    for (int k = 0; k < kTileRows; k += 4) {
      for (int q = 0; q < w.bits; q++) {
        const size_t from = (at * planes_of_scale + (w.uniform ? 0 : q)) * kTileRows + k;
        vst1q_f32(alpha[q] + k, vmulq_n_f32(numbers(w.scale, w.scale_dtype, from),
                                            w.uniform ? 1.0f / (float)(1 << q) : 1.0f));
      }
      vst1q_f32(offset + k, numbers(w.offset, w.offset_dtype, at * kTileRows + k));
    }
    const size_t plane_step = (size_t)count * 64;
    for (int row = 0; row < kTileRows; row++)
      for (int i = 0; i < count; i++)
        for (int byte = 0; byte < 4; byte++)
          for (int half = 0; half < 2; half++) {
            const unsigned char* p = cell + (size_t)i * 64 + byte * 16 + row;
            const uint32x4_t masks = vld1q_u32(bits_of_byte + 4 * half);
            float32x4_t value = vdupq_n_f32(offset[row]);
            for (int q = 0; q < w.bits; q++) {
              const uint32x4_t set = vtstq_u32(vdupq_n_u32(p[q * plane_step]), masks);
              const float32x4_t a = vdupq_n_f32(alpha[q][row]);
              value = vaddq_f32(value, vbslq_f32(set, a, vnegq_f32(a)));
            }
            store4(value, dtype, dst,
                   (size_t)row * stride + (size_t)(first + i) * 32 + byte * 8 + half * 4);
          }
    cell += plane_step * w.bits;
  }
}

const Isa isa = {"neon", 1,        1,      {kExactTable, kFastTable}, load, store,
                 build,  multiply, decode, nullptr};

}  // namespace

const Isa* const kNeon = &isa;

}  // namespace lutra
