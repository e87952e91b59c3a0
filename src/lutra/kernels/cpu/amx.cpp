// Matrix products in AMX tiles: bfloat16 in, float sums. Sapphire Rapids and later.
//
// A tile register is 16 rows of 64 bytes. `tdpbf16ps` adds to a 16 x 16 float tile the product of
// 16 x 32 bfloat16 (a, rows of weights, as they are decoded) and 32 x 16 (b, activations, pairs of k
// interleaved). It takes 16 cycles, a load some 8, so every tile loaded is used twice: 2 x 2 tiles of
// sums at a time.
#include <immintrin.h>

#include "kernels.h"

namespace lutra {
namespace {

struct alignas(64) Config {
  unsigned char palette, start_row, reserved[14];
  unsigned short row_bytes[16];
  unsigned char rows[16];
};

// Constant data, not a local: GCC's `_tile_loadconfig` tells the compiler of 8 of its 64 bytes only,
// and the stores of the others would be dropped. Loads and stores of tiles declare no memory at all,
// which is safe here because what they touch is written and read in other units.
const Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void begin() { _tile_loadconfig(&config); }

void end() { _tile_release(); }

constexpr int kTile = 512;     // bfloat16 in a 1 KiB tile
constexpr int kSums = 16 * 16;

// Tiles 0..3 hold sums, 4 and 5 a, 6 and 7 b. Tile numbers must be literals.
void two_by_two(float* c, size_t c_step, const uint16_t* a, size_t a_step, const uint16_t* b,
                size_t b_step, int words) {
  _tile_loadd(0, c, 64);
  _tile_loadd(1, c + kSums, 64);
  _tile_loadd(2, c + c_step, 64);
  _tile_loadd(3, c + c_step + kSums, 64);
  for (int i = 0; i < words; i++, a += kTile, b += kTile) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + b_step, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + a_step, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kSums, 64);
  _tile_stored(2, c + c_step, 64);
  _tile_stored(3, c + c_step + kSums, 64);
}

void two_by_one(float* c, size_t c_step, const uint16_t* a, size_t a_step, const uint16_t* b,
                int words) {
  _tile_loadd(0, c, 64);
  _tile_loadd(2, c + c_step, 64);
  for (int i = 0; i < words; i++, a += kTile, b += kTile) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + a_step, 64);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_stored(0, c, 64);
  _tile_stored(2, c + c_step, 64);
}

void one_by_one(float* c, const uint16_t* a, const uint16_t* b, int words) {
  _tile_loadd(0, c, 64);
  for (int i = 0; i < words; i++, a += kTile, b += kTile) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
  }
  _tile_stored(0, c, 64);
}

void multiply(float* c, const uint16_t* a, size_t a_step, int a_tiles, const uint16_t* b,
              size_t b_step, int b_tiles, int words) {
  const size_t c_step = (size_t)b_tiles * kSums;
  for (int j = 0; j < b_tiles; j += 2) {
    const bool pair = j + 1 < b_tiles;
    int i = 0;
    for (; i + 1 < a_tiles; i += 2) {
      float* sums = c + i * c_step + (size_t)j * kSums;
      if (pair)
        two_by_two(sums, c_step, a + i * a_step, a_step, b + j * b_step, b_step, words);
      else
        two_by_one(sums, c_step, a + i * a_step, a_step, b + j * b_step, words);
    }
    for (; i < a_tiles; i++) {
      float* sums = c + i * c_step + (size_t)j * kSums;
      one_by_one(sums, a + i * a_step, b + j * b_step, words);
      if (pair) one_by_one(sums + kSums, a + i * a_step, b + (j + 1) * b_step, words);
    }
  }
}

// 16 numbers of 32 bits from 16 rows, `stride` numbers apart.
inline __attribute__((always_inline)) __m512i column(const void* p, size_t stride) {
  const __m512i row = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_i32gather_epi32(_mm512_mullo_epi32(row, _mm512_set1_epi32((int)stride)), p, 4);
}

void pack(const uint16_t* rows, size_t stride, int words, uint16_t* dst) {
  for (int pair = 0; pair < words * 16; pair++)
    _mm512_storeu_si512(dst + (size_t)pair * 32, column(rows + (size_t)pair * 2, stride / 2));
}

void transpose(const float* tile, float* dst, size_t stride) {
  for (int j = 0; j < 16; j++)
    _mm512_storeu_ps(dst + j * stride, _mm512_castsi512_ps(column(tile + j, 16)));
}

const MatrixUnit unit = {begin, end, multiply, pack, transpose};

}  // namespace

const MatrixUnit* const kAmx = &unit;

}  // namespace lutra
