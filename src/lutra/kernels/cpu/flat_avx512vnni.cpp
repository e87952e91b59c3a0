// The AVX-512 level of flat.h: `vpdpbusd` adds the products of four unsigned bytes of each of 16
// outputs and four signed ones of a row, which are broadcast from memory. Cascade Lake, Zen 4 and on.
#include <immintrin.h>

#include "flat_quantize.inc"

namespace lutra {
namespace {

// R rows times T tiles; `step` bytes from tile to tile of the weight.
template <int R, int T, bool Four>
void block(const FlatWeight& w, int tile, const int8_t* a, int height, int32_t* c) {
  constexpr size_t tile_bytes = Four ? 512 : 1024;
  const int depth = w.columns / kFlatColumns, high = w.high / kFlatColumns;
  const size_t step = (size_t)depth * tile_bytes, a_step = (size_t)height * kFlatColumns;
  const uint8_t* p = w.data + (size_t)tile * step;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512i sums[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sums[r][t] = _mm512_setzero_si512();
  const auto add = [&](int r, int t, __m512i weight, const int8_t* x) {
    int32_t four;
    memcpy(&four, x, 4);
    sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], weight, _mm512_set1_epi32(four));
  };
  int k = 0;
  for (int part = 0; part < 2; part++) {
    for (const int end = part ? depth : high; k < end; k++, p += tile_bytes, a += a_step)
#pragma GCC unroll 2
      for (int i = 0; i < (Four ? 8 : 16); i++) {
        __m512i v[T], u[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
          v[t] = _mm512_loadu_si512(p + t * step + i * 64);
          if (Four) {
            u[t] = _mm512_and_si512(_mm512_srli_epi16(v[t], 4), nibble);
            v[t] = _mm512_and_si512(v[t], nibble);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const int8_t* x = a + r * kFlatColumns + i * (Four ? 8 : 4);
#pragma GCC unroll 4
          for (int t = 0; t < T; t++) add(r, t, v[t], x);
          if (Four)
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) add(r, t, u[t], x + 4);
        }
      }
    if (!part && high)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++)
          sums[r][t] = _mm512_mullo_epi32(sums[r][t], _mm512_set1_epi32(kFlatBase));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int t = 0; t < T; t++)
      _mm512_storeu_si512(c + (r * kFlatMaxTiles + t) * 16, sums[r][t]);
}

using Block = void (*)(const FlatWeight&, int, const int8_t*, int, int32_t*);

template <int T, bool Four>
Block block_of(int rows) {
  static constexpr Block blocks[] = {block<1, T, Four>, block<2, T, Four>, block<3, T, Four>,
                                     block<4, T, Four>, block<5, T, Four>, block<6, T, Four>};
  return blocks[rows - 1];
}

void multiply(const FlatWeight& w, int tile, int tiles, const int8_t* a, int height, int rows,
              int32_t* c) {
  const bool four = w.bits == 4;
  if (tiles == 4) {
    (four ? block_of<4, true>(rows) : block_of<4, false>(rows))(w, tile, a, height, c);
    return;
  }
  const Block one = four ? block_of<1, true>(rows) : block_of<1, false>(rows);
  for (int t = 0; t < tiles; t++) one(w, tile + t, a, height, c + t * 16);
}

const FlatIsa isa = {"avx512vnni", &kAvx512Bw, 6, 4, quantize, multiply, finish};

}  // namespace

const FlatIsa* const kFlatAvx512Vnni = &isa;

}  // namespace lutra
