// The plain C++ level: any machine, float tables (so `fast` and `exact` are the same), no intrinsics.
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace lutra {
namespace {

float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16;
  uint32_t exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&bits, &value, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (mantissa << 13);
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_half(float f) {  // round to nearest even
  uint32_t x;
  memcpy(&x, &f, 4);
  const uint16_t sign = (uint16_t)((x >> 16) & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return sign | 0x7e00;
  if (x >= 0x477ff000) return sign | 0x7c00;  // rounds past 65504
  if (x < 0x38800000) {                       // subnormal: add a float whose last bit is 2^-24
    float magnitude;
    memcpy(&magnitude, &x, 4);
    magnitude += 0.5f;
    memcpy(&x, &magnitude, 4);
    return sign | (uint16_t)(x - 0x3f000000);
  }
  return sign | (uint16_t)((x - 0x38000000 + 0xfff + ((x >> 13) & 1)) >> 13);
}

float from_bfloat(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

uint16_t to_bfloat(float f) {
  uint32_t x;
  memcpy(&x, &f, 4);
  if ((x & 0x7fffffff) > 0x7f800000) return (uint16_t)((x >> 16) | 64);
  return (uint16_t)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

float number(const void* p, Dtype dtype, size_t i) {
  if (dtype == F32) return ((const float*)p)[i];
  const uint16_t h = ((const uint16_t*)p)[i];
  return dtype == F16 ? from_half(h) : from_bfloat(h);
}

void load(const void* src, Dtype dtype, int n, float* dst) {
  for (int i = 0; i < n; i++) dst[i] = number(src, dtype, i);
}

void store(const float* src, const float* bias, int n, Dtype dtype, void* dst) {
  for (int i = 0; i < n; i++) {
    const float value = bias ? src[i] + bias[i] : src[i];
    if (dtype == F32)
      ((float*)dst)[i] = value;
    else
      ((uint16_t*)dst)[i] = dtype == F16 ? to_half(value) : to_bfloat(value);
  }
}

void build(const float* x, const Weight& w, int begin, int end, Numerics, unsigned char* entries,
           float* scale, float* sum) {
  for (int g = begin; g < end; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    double total = 0;
    for (int i = first * 32; i < last * 32; i++) total += x[i];
    sum[g] = (float)total;
    for (int c = 0; c < w.chunks_per_group; c++) scale[g * w.chunks_per_group + c] = 1.0f;
    for (int s = first * 8; s < last * 8; s++)
      for (int v = 0; v < 16; v++) {
        float f = 0;
        for (int j = 0; j < 4; j++) f += (v >> j) & 1 ? x[4 * s + j] : -x[4 * s + j];
        ((float*)entries)[16 * s + v] = f;
      }
  }
}

void multiply(const Weight& w, int block, const Table* tables, int m, Numerics, float* out) {
  const size_t scales = w.uniform ? 1 : w.bits;
  for (int r = 0; r < m; r++) {
    const uint32_t* cell = w.planes + (size_t)block * w.words * w.bits * kTileRows;
    const float* table = (const float*)tables[r].entries;
    float* y = out + (size_t)r * kMaxBlockRows;
    for (int row = 0; row < kTileRows; row++) y[row] = 0;
    for (int g = 0; g < w.groups; g++) {
      const int first = g * w.group_words;
      const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
      const size_t at = (size_t)block * w.groups + g;
      float halving = 1;
      for (int q = 0; q < w.bits; q++) {
        float acc[kTileRows] = {};
        for (int i = first; i < last; i++, cell += kTileRows)
          for (int row = 0; row < kTileRows; row++) {
            const float* t = table + (size_t)i * 128;
            float s = 0;
            for (int n = 0; n < 8; n++) s += t[16 * n + (cell[row] >> (4 * n) & 15)];
            acc[row] += s;
          }
        for (int row = 0; row < kTileRows; row++)
          y[row] += acc[row] * halving *
                    number(w.scale, w.scale_dtype,
                           (at * scales + (w.uniform ? 0 : q)) * kTileRows + row);
        if (w.uniform) halving *= 0.5f;
      }
      for (int row = 0; row < kTileRows; row++)
        y[row] += tables[r].sum[g] * number(w.offset, w.offset_dtype, at * kTileRows + row);
    }
  }
}

void decode(const Weight& w, int block, Dtype dtype, void* dst, size_t stride) {
  const uint32_t* cell = w.planes + (size_t)block * w.words * w.bits * kTileRows;
  const size_t scales = w.uniform ? 1 : w.bits;
  for (int g = 0; g < w.groups; g++) {
    const int first = g * w.group_words;
    const int last = first + w.group_words < w.words ? first + w.group_words : w.words;
    const size_t at = (size_t)block * w.groups + g, count = (size_t)(last - first);
    for (int row = 0; row < kTileRows; row++) {
      const float z = number(w.offset, w.offset_dtype, at * kTileRows + row);
      float alpha[kMaxBits];
      for (int q = 0; q < w.bits; q++)
        alpha[q] = w.uniform
                       ? number(w.scale, w.scale_dtype, at * kTileRows + row) / (float)(1 << q)
                       : number(w.scale, w.scale_dtype, (at * scales + q) * kTileRows + row);
      for (size_t i = 0; i < count; i++)
        for (int t = 0; t < 32; t++) {
          float value = z;
          for (int q = 0; q < w.bits; q++)
            value += cell[(q * count + i) * kTileRows + row] >> t & 1 ? alpha[q] : -alpha[q];
          const size_t to = row * stride + (first + i) * 32 + t;
          if (dtype == F32)
            ((float*)dst)[to] = value;
          else
            ((uint16_t*)dst)[to] = to_bfloat(value);
        }
    }
    cell += count * w.bits * kTileRows;
  }
}

const Isa isa = {"portable", 1, 0, {512, 512}, load, store, build, multiply, decode, nullptr};

}  // namespace

const Isa* const kPortable = &isa;

}  // namespace lutra
