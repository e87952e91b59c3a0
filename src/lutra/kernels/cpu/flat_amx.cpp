// Integer products in AMX tiles for flat.h. `tdpbsud` adds to a 16 x 16 tile of sums the product of
// 16 rows of 64 signed activations and of 64 unsigned weights of 16 outputs, 16384 products in 16
// clocks. As in amx.cpp, 2 x 2 tiles of sums at a time, so that every tile loaded is used twice.
#include <immintrin.h>

#include "flat.h"

namespace lutra {
namespace {

struct alignas(64) Config {
  unsigned char palette, start_row, reserved[14];
  unsigned short row_bytes[16];
  unsigned char rows[16];
};

// Constant data and no clobbers, for the reasons given in amx.cpp.
const Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&config); }

void end() { _tile_release(); }

constexpr int kTile = 1024;     // bytes
constexpr int kSums = 16 * 16;

// The tile of the next step into the first-level cache. The prefetchers of the hardware do not follow
// tile loads far enough: with this the loop is some 1.5 times as fast where another thread of the core
// takes half of the caches, and as fast where none does.
inline __attribute__((always_inline)) void prefetch(const void* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm_prefetch((const char*)tile + kTile + i * 64, _MM_HINT_T0);
}

// Tiles 0..3 hold sums, 4 and 5 activations, 6 and 7 weights. Tile numbers must be literals.
void two_by_two(int32_t* c, size_t c_step, const int8_t* a, size_t a_step, const uint8_t* b,
                size_t b_step, int depth, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kSums, 64);
    _tile_loadd(2, c + c_step, 64);
    _tile_loadd(3, c + c_step + kSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int i = 0; i < depth; i++, a += kTile, b += kTile) {
    _tile_loadd(6, b, 64);
    prefetch(b);
    _tile_loadd(4, a, 64);
    prefetch(a);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, b + b_step, 64);
    prefetch(b + b_step);
    _tile_dpbsud(1, 4, 7);
    _tile_loadd(5, a + a_step, 64);
    prefetch(a + a_step);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kSums, 64);
  _tile_stored(2, c + c_step, 64);
  _tile_stored(3, c + c_step + kSums, 64);
}

void two_by_one(int32_t* c, size_t c_step, const int8_t* a, size_t a_step, const uint8_t* b,
                int depth, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(2, c + c_step, 64);
  } else {
    _tile_zero(0);
    _tile_zero(2);
  }
  for (int i = 0; i < depth; i++, a += kTile, b += kTile) {
    _tile_loadd(6, b, 64);
    prefetch(b);
    _tile_loadd(4, a, 64);
    prefetch(a);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, a + a_step, 64);
    prefetch(a + a_step);
    _tile_dpbsud(2, 5, 6);
  }
  _tile_stored(0, c, 64);
  _tile_stored(2, c + c_step, 64);
}

void one_by_two(int32_t* c, const int8_t* a, const uint8_t* b, size_t b_step, int depth, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + kSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int i = 0; i < depth; i++, a += kTile, b += kTile) {
    _tile_loadd(4, a, 64);
    prefetch(a);
    _tile_loadd(6, b, 64);
    prefetch(b);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(7, b + b_step, 64);
    prefetch(b + b_step);
    _tile_dpbsud(1, 4, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kSums, 64);
}

void one_by_one(int32_t* c, const int8_t* a, const uint8_t* b, int depth, bool add) {
  if (add)
    _tile_loadd(0, c, 64);
  else
    _tile_zero(0);
  for (int i = 0; i < depth; i++, a += kTile, b += kTile) {
    _tile_loadd(4, a, 64);
    prefetch(a);
    _tile_loadd(6, b, 64);
    prefetch(b);
    _tile_dpbsud(0, 4, 6);
  }
  _tile_stored(0, c, 64);
}

void multiply(int32_t* c, size_t c_step, const int8_t* a, size_t a_step, int a_tiles,
              const uint8_t* b, size_t b_step, int b_tiles, int depth, bool add) {
  int i = 0;
  for (; i + 1 < a_tiles; i += 2, a += 2 * a_step, c += 2 * c_step)
    if (b_tiles == 2)
      two_by_two(c, c_step, a, a_step, b, b_step, depth, add);
    else
      two_by_one(c, c_step, a, a_step, b, depth, add);
  if (i < a_tiles) {
    if (b_tiles == 2)
      one_by_two(c, a, b, b_step, depth, add);
    else
      one_by_one(c, a, b, depth, add);
  }
}

void unpack(const uint8_t* packed, int tiles, uint8_t* dst) {
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int i = 0; i < tiles * 8; i++, packed += 64, dst += 128) {
    const __m512i v = _mm512_loadu_si512(packed);
    _mm512_storeu_si512(dst, _mm512_and_si512(v, nibble));
    _mm512_storeu_si512(dst + 64, _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble));
  }
}

void raise(int32_t* c, size_t n) {
  for (size_t i = 0; i < n; i++) c[i] = (int32_t)((uint32_t)c[i] * kFlatBase);
}

const FlatMatrix unit = {begin, end, multiply, unpack, raise};

}  // namespace

const FlatMatrix* const kFlatAmx = &unit;

}  // namespace lutra
