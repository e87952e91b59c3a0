// Contract of the CPU kernels: y[m, o] = sum_i w[o, i] x[m, i], with
//   w[o, i] = sum_q alpha[q, o, g(i)] * b[q, o, i] + z[o, g(i)],   b in {-1, +1}, g(i) = i / group.
//
// Layout of a prepared weight. Rows lie in tiles of 16, tiles in blocks of `Isa::tiles` (the last
// block may have fewer), inputs in words of 32. One *cell* is 64 bytes: 16 rows of one word of one
// plane. In memory, outermost first:
//
//     planes  [block][group][plane][word of the group][tile of the block] { 64-byte cell }
//     scale   [block][group][plane, or 1 if uniform][tile][16 rows]
//     offset  [block][group][tile][16 rows]
//
// so that a thread which owns a range of blocks reads three plain forward streams. Inside a cell the
// 16 words of the 16 rows follow each other (`Isa::byte_cells` false), or their bytes are transposed,
// [4 bytes][16 rows] (true, for instruction sets whose byte shuffle is confined to 16 bytes).
// Rows past `out` are zero in all three.
//
// Lookup tables. Four neighbouring inputs have 16 signed sums; bits 4s..4s+3 of a word select one
// of those of subgroup s. Tables are scaled per *chunk* of at most 4 words within a group: entries
// are integers, `Table::scale` turns them back. `Table::sum` is sum(x) per group, for the offsets.
//
// Who allocates: the caller, everything. Nothing here throws, allocates or keeps state.
// Each instruction set is one translation unit with flags of its own; no unit may use an inline
// function or template that another unit could also emit, for the linker keeps only one copy.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lutra {

enum Dtype : int { F32 = 0, F16 = 1, BF16 = 2 };

constexpr int kTileRows = 16;
constexpr int kMaxTiles = 4;
constexpr int kMaxBlockRows = kTileRows * kMaxTiles;
constexpr int kChunkWords = 4;
constexpr int kMaxBits = 8;

struct Weight {
  const uint32_t* planes;
  const void* scale;
  const void* offset;
  Dtype scale_dtype, offset_dtype;
  int out, in, bits;
  int words;             // 32-bit words per row
  int group_words;       // words per group; the last group may have fewer
  int groups;
  int chunks_per_group;  // ceil(group_words / kChunkWords)
  int uniform;           // one stored scale per group, plane q has scale / 2^q
  int tiles;             // tiles per full block
  int total_tiles;       // ceil(out / 16)
};

// Lookup tables of one row of activations.
struct Table {
  const unsigned char* entries;  // [word][Isa::table_bytes]
  const float* scale;            // [group][chunk]
  const float* sum;              // [group]
};

enum Numerics : int { kExact = 0, kFast = 1 };

struct Isa {
  const char* name;
  int tiles;           // tiles per block of the prepared layout
  int byte_cells;      // bytes of a cell transposed
  int table_bytes[2];  // per word of inputs, by Numerics
  // n values of `dtype` to float.
  void (*load)(const void* src, Dtype dtype, int n, float* dst);
  // float to n values of `dtype`, after adding `bias` (may be null).
  void (*store)(const float* src, const float* bias, int n, Dtype dtype, void* dst);
  // Tables of groups [begin, end) of one row of activations, padded with zeros to words * 32.
  void (*build)(const float* x, const Weight& w, int begin, int end, Numerics numerics,
                unsigned char* entries, float* scale, float* sum);
  // out[m][kMaxBlockRows] = the rows of one block, for m rows of activations.
  void (*multiply)(const Weight& w, int block, const Table* tables, int m, Numerics numerics,
                   float* out);
  // Dense rows of one block into dst (float or bfloat16), row stride `stride` >= words * 32.
  void (*decode)(const Weight& w, int block, Dtype dtype, void* dst, size_t stride);
  // Words [from, to) of one block as bfloat16 tiles [tile][word]{16 rows}{32 inputs}; `rest` (may be
  // null) gets what the rounding left, rounded again. Null where no matrix unit could use it.
  void (*decode_tiles)(const Weight& w, int block, int from, int to, uint16_t* dst,
                       uint16_t* rest);
};

// A matrix unit: c[i][j] += sum over k of a[i][k] b[j][k], 16 x 16 x 32 at a time.
struct MatrixUnit {
  // The unit's state, before and after a thread's work.
  void (*begin)();
  void (*end)();
  // c: [a_tiles][b_tiles]{16 x 16 float}, added to; a: [a_tiles][words]{16 x 32 bfloat16}, with
  // `a_step` elements from tile to tile; b: [b_tiles]{words}{16 pairs of k}{16 j}{2}, `b_step`.
  void (*multiply)(float* c, const uint16_t* a, size_t a_step, int a_tiles, const uint16_t* b,
                   size_t b_step, int b_tiles, int words);
  // 16 rows of bfloat16, `stride` apart, to [words]{16 pairs}{16 rows}{2}.
  void (*pack)(const uint16_t* rows, size_t stride, int words, uint16_t* dst);
  // A tile {16 i}{16 j} of c, transposed.
  void (*transpose)(const float* tile, float* dst, size_t stride);
};

inline constexpr int kIsaCount = 5;
// In falling order of preference; null where this build does not have it.
extern const Isa* const kAvx512Vnni;
extern const Isa* const kAvx512Bw;
extern const Isa* const kAvx2;
extern const Isa* const kNeon;
extern const Isa* const kPortable;
extern const MatrixUnit* const kAmx;

}  // namespace lutra
