// The plain C++ level of flat.h.
#include "flat_quantize.inc"

namespace lutra {
namespace {

void multiply(const FlatWeight& w, int tile, int tiles, const int8_t* a, int height, int rows,
              int32_t* c) {
  const int depth = w.columns / kFlatColumns, high = w.high / kFlatColumns;
  const size_t tile_bytes = (size_t)kFlatColumns * 16 * w.bits / 8;
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tiles; t++) {
      int32_t sums[16] = {};
      const uint8_t* p = w.data + (size_t)(tile + t) * depth * tile_bytes;
      for (int k = 0; k < depth; k++, p += tile_bytes) {
        if (k == high && k)
          for (int n = 0; n < 16; n++) sums[n] = (int32_t)((uint32_t)sums[n] * kFlatBase);
        const int8_t* x = a + ((size_t)k * height + r) * kFlatColumns;
        for (int quad = 0; quad < 16; quad++) {
          const uint8_t* v = w.bits == 8 ? p + quad * 64 : p + (quad / 2) * 64;
          const int shift = w.bits == 8 ? 0 : (quad & 1) * 4, keep = w.bits == 8 ? 255 : 15;
          const int x0 = x[4 * quad], x1 = x[4 * quad + 1], x2 = x[4 * quad + 2];
          const int x3 = x[4 * quad + 3];
          for (int n = 0; n < 16; n++) {
            const uint8_t* u = v + 4 * n;
            const int term = (u[0] >> shift & keep) * x0 + (u[1] >> shift & keep) * x1 +
                             (u[2] >> shift & keep) * x2 + (u[3] >> shift & keep) * x3;
            sums[n] = (int32_t)((uint32_t)sums[n] + (uint32_t)term);
          }
        }
      }
      if (high == depth)
        for (int n = 0; n < 16; n++) sums[n] = (int32_t)((uint32_t)sums[n] * kFlatBase);
      memcpy(c + (r * kFlatMaxTiles + t) * 16, sums, sizeof sums);
    }
}

const FlatIsa isa = {"portable", &kPortable, 4, 4, quantize, multiply, finish};

}  // namespace

const FlatIsa* const kFlatPortable = &isa;

}  // namespace lutra
