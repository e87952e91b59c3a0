// Contract of the CPU kernels of FlattenQuant layers:
//
//     y[m, o] = float(acc[m, o]) * (step[m] * scale[o]) + bias[o],   acc = sum_c a[m, c] w[o, c]
//
// with 8-bit integers a (activations) and 4- or 8-bit integers w, summed exactly.
//
// Columns. A layer is multiplied in its lowered order: `high` columns first, then one column per
// input channel, then extra ones. Column c holds a part of the integer q of its channel, |q| <=
// limit: piece j of q, which is what lies between 127 j and 127 (j + 1), or, where q = 255 h + l, the
// digit l, or, in the high columns only, a piece of h. Sums of the high columns are multiplied by
// 255 before the other columns are added. `high` and `columns` are multiples of 64; padding has
// weight 0 and activation 0. kernels/flat/lowering.py makes the columns.
//
// Weights are stored unsigned, w + 8 or w + 128, because the instructions of x86 multiply unsigned by
// signed: what that adds, 8 or 128 times the sum of the row of activations, is subtracted at the end.
// Integers wrap at 32 bits, so the result is exact when acc itself fits.
//
//     data     [tile of 16 outputs][64 columns]{16 quads of columns}{16 outputs}{4 columns}
//
// of bytes; for 4 bits {8 pairs of quads}{16 outputs}{4 columns}, the first quad of a pair in the low
// nibbles. A tile of 64 columns (1024 or 512 bytes) is thus a tile register of AMX, 64 bytes of it the
// operand of one `vpdpbusd`. Outputs past the last have weight 0.
//
//     activations  [tile of `height` rows][64 columns]{height rows}{64 columns}
//
// Who allocates: the caller, everything. Nothing here throws, allocates or keeps state. As to units and
// flags see kernels.h; sums and products of floats must not be contracted (-ffp-contract=off), for
// results are the same bits everywhere.
#pragma once

#include "kernels.h"

namespace lutra {

constexpr int kFlatDigit = 127;                  // the largest digit of an activation
constexpr int kFlatBase = 2 * kFlatDigit + 1;    // of the digits h and l
constexpr int kFlatColumns = 64;                 // columns of a tile
constexpr int kFlatMaxRows = 8, kFlatMaxTiles = 4;  // of one call of `multiply`

// What of its channel's integer a column has: j >= 0 is piece j, kFlatHigh - j is piece j of h.
enum FlatPiece : int { kFlatLow = -1, kFlatHigh = -2 };

struct FlatWeight {
  const uint8_t* data;
  const float* scale;  // [out]
  int out, bits;       // bits 4 or 8
  int columns, high;
};

// How a row of x becomes the columns.
struct FlatInput {
  int in, columns, high;
  const float* limit;       // [in], the largest |q| of each channel, an integer
  const float* smooth;      // [in], x is divided by it first; or null
  const float* step;        // the static step; or null, then max |x| / limit of each row
  float usual;              // the limit of most channels
  const uint32_t* mask;     // [in], 0x7fffffff where limit == usual, else 0
  const int32_t* wide;      // [wides], the channels of other limits
  int wides;
  const int32_t* low;       // [lows], the channels whose first column holds l
  int lows;
  const int32_t* source;    // [high + extras], channel of each high, then each extra column; -1: padding
  const int32_t* piece;     // [high + extras]
  int extras;               // columns - high - in, padding included
};

struct FlatIsa {
  const char* name;
  const Isa* const* base;  // for reading and writing rows of other dtypes
  int rows, tiles;         // `multiply` is fastest with so many
  // One row x (in * float) to row 0 of a tile of activations at `dst`, divided by `smooth` in `own`
  // (in * float, may be x) if there is that; its step, and the sum of its columns, high ones 255 times. A row with NaN or infinity has columns
  // 0 and a step of NaN.
  void (*quantize)(const FlatInput& input, const float* x, float* own, int8_t* dst, int height,
                   float* step, int32_t* sum);
  // c[row][kFlatMaxTiles * 16] = products of rows 0 <= row < `rows` of activations with tiles [tile,
  // tile + tiles) of the weight, as stored.
  void (*multiply)(const FlatWeight& w, int tile, int tiles, const int8_t* a, int height, int rows,
                   int32_t* c);
  // y[i] = float(sum i - excess) * (step * scale[i]); sums in runs of 16, `c_step` numbers apart.
  void (*finish)(const int32_t* c, size_t c_step, int32_t excess, float step, const float* scale,
                 int n, float* y);
};

// A matrix unit: c += or = a b, for tiles of 16 rows and 16 outputs.
struct FlatMatrix {
  void (*begin)();
  void (*end)();
  // c: [a_tiles] `c_step` numbers apart, each [b_tiles]{16 x 16}; a: [a_tiles] `a_step` bytes apart,
  // each [depth]{16}{64}; b: [b_tiles] `b_step` bytes apart, each [depth]{16}{64}, unsigned; b_tiles
  // 1 or 2. Beyond the end of each up to 1 KiB may be prefetched.
  void (*multiply)(int32_t* c, size_t c_step, const int8_t* a, size_t a_step, int a_tiles,
                   const uint8_t* b, size_t b_step, int b_tiles, int depth, bool add);
  // `tiles` tiles of 4 bits to 8.
  void (*unpack)(const uint8_t* packed, int tiles, uint8_t* dst);
  // c *= 255.
  void (*raise)(int32_t* c, size_t n);
};

struct FlatLevel {
  const char* name;
  const FlatIsa* isa;
  const FlatMatrix* matrix;  // or null
};

inline constexpr int kFlatLevelCount = 5;
// In falling order of preference; null where this build does not have it.
extern const FlatMatrix* const kFlatAmx;
extern const FlatIsa* const kFlatAvx512Vnni;
extern const FlatIsa* const kFlatAvxVnni;
extern const FlatIsa* const kFlatAvx2;
extern const FlatIsa* const kFlatPortable;

// The levels that this build has and this machine can run, best first; returns their number.
int available_flat_levels(FlatLevel levels[kFlatLevelCount]);

// Between stored digits, two's complement of `bits` bits from the low end of [out] rows of `words`
// words, and `w.data`. `origin` [w.columns] is the stored column that stands in each, or -1 for
// padding; the first of `stored` columns stand behind the high ones, in order.
void flat_prepare(const FlatWeight& w, const uint32_t* digits, int words, const int32_t* origin,
                  int threads);
void flat_restore(const FlatWeight& w, uint32_t* digits, int words, int stored, int threads);

// y[m][out] = the layer of x[m][in]. Strides in elements; bias float or null. `tiles_from`: the
// smallest number of rows for the matrix unit.
void flat_linear(const FlatLevel& level, const FlatWeight& w, const FlatInput& input, const void* x,
                 Dtype x_dtype, size_t x_stride, int m, const float* bias, void* y, int tiles_from,
                 int threads);

// The integers themselves, for tests: columns [m][columns], sums [m] and steps [m].
void flat_quantize(const FlatLevel& level, const FlatInput& input, const void* x, Dtype x_dtype,
                   size_t x_stride, int m, int8_t* columns, int32_t* sums, float* steps,
                   int threads);

}  // namespace lutra
