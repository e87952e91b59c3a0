// The plain C++ level of flat.h, in the 16-byte vectors that every 64-bit target has (GCC's and Clang's
// extension, no intrinsics).
//
// The bytes of four outputs are eight 16-bit lanes: masks and shifts give columns 0 and 2 and columns 1
// and 3 of each quad, and the product with an activation fits 16 bits, as 255 * 127 does. Products of
// 4-bit weights are added eight quads long before they are widened.
#include "flat_quantize.inc"

namespace lutra {
namespace {

typedef uint16_t Unsigned16 __attribute__((vector_size(16)));
typedef int16_t Signed16 __attribute__((vector_size(16)));
typedef uint32_t Unsigned32 __attribute__((vector_size(16)));
typedef int32_t Signed32 __attribute__((vector_size(16)));

// Both halves of 32-bit lanes, added.
static inline Unsigned32 widened(Signed16 v) {
  const Signed32 high = (Signed32)v >> 16;
  const Signed32 low = (Signed32)((Unsigned32)v << 16) >> 16;
  return (Unsigned32)high + (Unsigned32)low;
}

// Activations x[0], x[2] or x[1], x[3] in every pair of lanes.
static inline Signed16 pairs(const int8_t* x) {
  const uint32_t both = (uint16_t)x[0] | (uint32_t)(uint16_t)x[2] << 16;
  return (Signed16)(Unsigned32{both, both, both, both});
}

// R rows times a tile.
template <int R, bool Four>
void block(const FlatWeight& w, int tile, const int8_t* a, int height, int32_t* c) {
  constexpr size_t tile_bytes = Four ? 512 : 1024;
  const int depth = w.columns / kFlatColumns, high = w.high / kFlatColumns;
  const uint8_t* p = w.data + (size_t)tile * depth * tile_bytes;
  Unsigned32 sums[R][4] = {};
  const auto raise = [&] {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 4; v++) sums[r][v] *= (uint32_t)kFlatBase;
  };
  for (int k = 0; k < depth; k++, p += tile_bytes) {
    if (k == high && k) raise();
    const int8_t* x = a + (size_t)k * height * kFlatColumns;
    Signed16 narrow[R][4] = {};
    for (int quad = 0; quad < 16; quad++) {
      const uint8_t* from = p + (Four ? quad / 2 : quad) * 64;
      Signed16 even_x[R], odd_x[R];
      for (int r = 0; r < R; r++) {
        even_x[r] = pairs(x + r * kFlatColumns + quad * 4);
        odd_x[r] = pairs(x + r * kFlatColumns + quad * 4 + 1);
      }
      for (int v = 0; v < 4; v++) {
        Unsigned16 bytes;
        memcpy(&bytes, from + v * 16, 16);
        const Unsigned16 nibbles = quad % 2 ? bytes >> 4 : bytes;
        const Signed16 even = (Signed16)(Four ? nibbles & 15 : bytes & 255);
        const Signed16 odd = (Signed16)(Four ? nibbles >> 8 & 15 : bytes >> 8);
        for (int r = 0; r < R; r++)
          if (Four)
            narrow[r][v] += even * even_x[r] + odd * odd_x[r];
          else
            sums[r][v] += widened(even * even_x[r]) + widened(odd * odd_x[r]);
      }
      if (Four && quad % 8 == 7)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < 4; v++) {
            sums[r][v] += widened(narrow[r][v]);
            narrow[r][v] = Signed16{};
          }
    }
  }
  if (high == depth) raise();
  for (int r = 0; r < R; r++) memcpy(c + r * kFlatMaxTiles * 16, sums[r], 64);
}

void multiply(const FlatWeight& w, int tile, int tiles, const int8_t* a, int height, int rows,
              int32_t* c) {
  const bool four = w.bits == 4;
  for (int t = 0; t < tiles; t++)
    (rows == 2 ? four ? block<2, true> : block<2, false>
               : four ? block<1, true> : block<1, false>)(w, tile + t, a, height, c + t * 16);
}

const FlatIsa isa = {"portable", &kPortable, 2, 4, quantize, multiply, finish};

}  // namespace

const FlatIsa* const kFlatPortable = &isa;

}  // namespace lutra
