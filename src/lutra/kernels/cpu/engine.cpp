#include "engine.h"

#include <cstring>
#include <memory>

#include "pool.h"

namespace lutra {
namespace {

int size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

int tiles_of(const Weight& w, int block) {
  const int left = w.total_tiles - block * w.tiles;
  return left < w.tiles ? left : w.tiles;
}

int words_of(const Weight& w, int group) {
  const int left = w.words - group * w.group_words;
  return left < w.group_words ? left : w.group_words;
}

int blocks_of(const Weight& w) { return (w.total_tiles + w.tiles - 1) / w.tiles; }

// A lambda as the pool's work.
template <class F>
void parallel(int items, int threads, F& f) {
  run_parallel(
      items, threads, [](void* c, int item, int thread) { (*(F*)c)(item, thread); }, &f);
}

// Vectors of the compiler, which every target here has in 16 bytes.
typedef unsigned char Bytes __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
#if defined(__clang__)
#define LUTRA_SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LUTRA_SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

// Turns 16 x 16 numbers: four times the first half interleaved with the second.
void transpose_numbers(uint16_t numbers[kTileRows][kTileRows]) {
  constexpr int kVectors = kTileRows * kTileRows / 8;
  Halves a[kVectors], b[kVectors];
  memcpy(a, numbers, sizeof a);
  for (int round = 0; round < 2; round++) {
    for (int i = 0; i < kVectors / 2; i++) {
      b[2 * i] = LUTRA_SHUFFLE(Halves, a[i], a[kVectors / 2 + i], 0, 8, 1, 9, 2, 10, 3, 11);
      b[2 * i + 1] = LUTRA_SHUFFLE(Halves, a[i], a[kVectors / 2 + i], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < kVectors / 2; i++) {
      a[2 * i] = LUTRA_SHUFFLE(Halves, b[i], b[kVectors / 2 + i], 0, 8, 1, 9, 2, 10, 3, 11);
      a[2 * i + 1] = LUTRA_SHUFFLE(Halves, b[i], b[kVectors / 2 + i], 4, 12, 5, 13, 6, 14, 7, 15);
    }
  }
  memcpy(numbers, a, sizeof a);
}

void transpose_numbers(uint32_t numbers[kTileRows][kTileRows]) {
  for (int i = 0; i < kTileRows; i++)
    for (int j = 0; j < i; j++) {
      const uint32_t held = numbers[i][j];
      numbers[i][j] = numbers[j][i], numbers[j][i] = held;
    }
}

// At most 16 lines of at most 16 numbers, a stride apart, to or from a square. Copies of a known size
// become plain loads and stores, which whole lines are worth.
template <class T>
void move_lines(T* lines, size_t stride, int rows, int count, T square[kTileRows][kTileRows],
                bool load) {
  if (rows == kTileRows && count == kTileRows) {
    for (int r = 0; r < kTileRows; r++, lines += stride)
      memcpy(load ? square[r] : lines, load ? lines : square[r], sizeof square[r]);
    return;
  }
  if (load) memset(square, 0, kTileRows * sizeof square[0]);
  for (int r = 0; r < rows; r++, lines += stride)
    for (int i = 0; i < count; i++)
      if (load)
        square[r][i] = lines[i];
      else
        lines[i] = square[r][i];
}

// Between per-row numbers [plane][out][groups] and [group][plane][tile][16] of one block.
template <class T>
void move_numbers(const Weight& w, int block, int planes, T* canonical, T* prepared,
                  bool to_prepared) {
  const int rows = tiles_of(w, block) * kTileRows, first = block * w.tiles * kTileRows;
  const int valid = w.out - first < rows ? w.out - first : rows;
  T* base = prepared + (size_t)first * w.groups * planes;
  T square[kTileRows][kTileRows] = {};
  for (int q = 0; q < planes; q++)
    for (int row = 0; row < rows; row += kTileRows) {
      const int height = valid - row < kTileRows ? valid - row : kTileRows;
      for (int from = 0; from < w.groups; from += kTileRows) {
        const int width = w.groups - from < kTileRows ? w.groups - from : kTileRows;
        T* c = canonical + ((size_t)q * w.out + first + row) * w.groups + from;
        T* p = base + ((size_t)from * planes + q) * rows + row;
        const size_t step = (size_t)planes * rows;
        if (to_prepared) {
          move_lines(c, w.groups, height, width, square, true);
          transpose_numbers(square);
          for (int g = 0; g < width; g++) memcpy(p + g * step, square[g], sizeof square[g]);
        } else {
          for (int g = 0; g < width; g++) memcpy(square[g], p + g * step, sizeof square[g]);
          transpose_numbers(square);
          move_lines(c, w.groups, height, width, square, false);
        }
      }
    }
}

void move_numbers(const Weight& w, int block, int planes, Dtype dtype, void* canonical,
                  void* prepared, bool to_prepared) {
  if (dtype == F32)
    move_numbers(w, block, planes, (uint32_t*)canonical, (uint32_t*)prepared, to_prepared);
  else
    move_numbers(w, block, planes, (uint16_t*)canonical, (uint16_t*)prepared, to_prepared);
}

// The first half of 64 bytes interleaved with the second: addresses rotate left by one bit.
void interleave(Bytes v[4]) {
  const Bytes a = v[0], b = v[1], c = v[2], d = v[3];
#define LUTRA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LUTRA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
  v[0] = LUTRA_SHUFFLE(Bytes, a, c, LUTRA_LOW);
  v[1] = LUTRA_SHUFFLE(Bytes, a, c, LUTRA_HIGH);
  v[2] = LUTRA_SHUFFLE(Bytes, b, d, LUTRA_LOW);
  v[3] = LUTRA_SHUFFLE(Bytes, b, d, LUTRA_HIGH);
#undef LUTRA_LOW
#undef LUTRA_HIGH
}

// The 16 x 4 bytes of a cell to [4 bytes][16 rows], or back.
void transpose_bytes(uint32_t* cell, bool back) {
  Bytes v[4];
  memcpy(v, cell, 64);
  for (int i = 0; i < (back ? 2 : 4); i++) interleave(v);
  memcpy(cell, v, 64);
}

using Square = uint32_t[kTileRows][kTileRows];

void transpose(const Square& from, Square& to) {
  for (int i = 0; i < kTileRows; i += 4)
    for (int j = 0; j < kTileRows; j += 4) {
      Words r[4];
      for (int k = 0; k < 4; k++) memcpy(&r[k], &from[i + k][j], 16);
      const Words a = LUTRA_SHUFFLE(Words, r[0], r[1], 0, 4, 1, 5);
      const Words b = LUTRA_SHUFFLE(Words, r[0], r[1], 2, 6, 3, 7);
      const Words c = LUTRA_SHUFFLE(Words, r[2], r[3], 0, 4, 1, 5);
      const Words d = LUTRA_SHUFFLE(Words, r[2], r[3], 2, 6, 3, 7);
      r[0] = LUTRA_SHUFFLE(Words, a, c, 0, 1, 4, 5);
      r[1] = LUTRA_SHUFFLE(Words, a, c, 2, 3, 6, 7);
      r[2] = LUTRA_SHUFFLE(Words, b, d, 0, 1, 4, 5);
      r[3] = LUTRA_SHUFFLE(Words, b, d, 2, 3, 6, 7);
      for (int k = 0; k < 4; k++) memcpy(&to[j + k][i], &r[k], 16);
    }
}
#undef LUTRA_SHUFFLE

// Between words [plane][out][words] and the cells of one block, 16 words of 16 rows at a time. Rows
// follow each other in the canonical layout, so the lines of the next 16 are wanted soon.
void move_planes(const Weight& w, const Isa& isa, int block, uint32_t* canonical, uint32_t* prepared,
                 bool to_prepared) {
  const int tiles = tiles_of(w, block);
  const size_t step = (size_t)tiles * kTileRows, next_tile = (size_t)kTileRows * w.words;
  uint32_t* base = prepared + (size_t)block * w.tiles * kTileRows * w.words * w.bits;
  alignas(64) Square lines, cells = {};
  for (int t = 0; t < tiles; t++) {
    const int row = (block * w.tiles + t) * kTileRows;
    const int rows = w.out - row < kTileRows ? w.out - row : kTileRows;
    for (int q = 0; q < w.bits; q++) {
      int group = 0, word = 0, words = words_of(w, 0);  // the place within the row
      uint32_t* cell = base + ((size_t)q * words * tiles + t) * kTileRows;
      for (int from = 0; from < w.words; from += kTileRows) {
        const int count = w.words - from < kTileRows ? w.words - from : kTileRows;
        uint32_t* c = canonical + ((size_t)q * w.out + row) * w.words + from;
        if (to_prepared) {
          for (int r = 0; r < kTileRows; r++)
            __builtin_prefetch(c + next_tile + (size_t)r * w.words);
          move_lines(c, w.words, rows, count, lines, true);
          transpose(lines, cells);
          if (isa.byte_cells)
            for (int i = 0; i < count; i++) transpose_bytes(cells[i], false);
        }
        for (int i = 0; i < count; i++) {
          memcpy(to_prepared ? cell : cells[i], to_prepared ? cells[i] : cell, 64);
          cell += step;
          if (++word < words) continue;
          cell += (size_t)words * (w.bits - 1 - q) * step;  // planes after q in this group
          word = 0, words = ++group < w.groups ? words_of(w, group) : 1;
          cell += (size_t)words * q * step;  // and before it in the next
        }
        if (!to_prepared) {
          if (isa.byte_cells)
            for (int i = 0; i < count; i++) transpose_bytes(cells[i], true);
          transpose(cells, lines);
          move_lines(c, w.words, rows, count, lines, false);
        }
      }
    }
  }
}

void move_all(const Weight& w, const Isa& isa, uint32_t* planes, void* scale, void* offset,
              int threads, bool to_prepared) {
  auto work = [&](int block, int) {
    move_planes(w, isa, block, planes, (uint32_t*)w.planes, to_prepared);
    move_numbers(w, block, w.uniform ? 1 : w.bits, w.scale_dtype, scale, (void*)w.scale,
                 to_prepared);
    move_numbers(w, block, 1, w.offset_dtype, offset, (void*)w.offset, to_prepared);
  };
  parallel(blocks_of(w), threads, work);
}

// Memory of one call, kept by the thread that calls: no allocation while a model decodes.
struct Scratch {
  std::unique_ptr<unsigned char[]> memory;
  size_t size = 0;

  unsigned char* get(size_t bytes) {
    if (bytes > size) {
      memory.reset(new unsigned char[bytes + 64]);
      size = bytes;
    }
    return memory.get() + (64 - (uintptr_t)memory.get() % 64) % 64;
  }
};
thread_local Scratch scratch;

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Below this many table bytes another hand-over to the pool costs more than it saves.
constexpr size_t kTablesWorthSharing = 128 * 1024;
// Rows of activations whose tables are alive at once: they must stay in the second-level cache.
constexpr int kRowsAtOnce = 16;
// On a matrix unit. Words decoded at once: 256 inputs of 64 rows are 32 KiB, which stay in the
// first-level cache while they are multiplied. Blocks of an item: with two, the activations are read
// half as often from further out. Rows of activations: beyond them the sums leave the caches, and
// decoding again costs less.
constexpr int kSlabWords = 8;
constexpr int kItemBlocks = 2;
constexpr int kTileBatch = 256;

}  // namespace

void complete(Weight& w, int group_size, const Isa& isa) {
  w.words = (w.in + 31) / 32;
  w.group_words = group_size >= w.in ? w.words : group_size / 32;
  w.groups = (w.words + w.group_words - 1) / w.group_words;
  w.chunks_per_group = (w.group_words + kChunkWords - 1) / kChunkWords;
  w.tiles = isa.tiles;
  w.total_tiles = (w.out + kTileRows - 1) / kTileRows;
}

void prepare(const Weight& w, const Isa& isa, const uint32_t* planes, const void* scale,
             const void* offset, int threads) {
  move_all(w, isa, (uint32_t*)planes, (void*)scale, (void*)offset, threads, true);
}

void restore(const Weight& w, const Isa& isa, uint32_t* planes, void* scale, void* offset,
             int threads) {
  move_all(w, isa, planes, scale, offset, threads, false);
}

void linear(const Weight& w, const Isa& isa, Numerics numerics, const void* x, Dtype x_dtype,
            size_t x_stride, int m, const float* bias, void* y, int threads) {
  const int rows_at_once = m < kRowsAtOnce ? m : kRowsAtOnce;
  const size_t x_bytes = padded((size_t)w.words * 32 * 4);
  const size_t table_bytes = padded((size_t)w.words * isa.table_bytes[numerics]);
  const size_t scale_bytes = padded((size_t)w.groups * w.chunks_per_group * 4);
  const size_t sum_bytes = padded((size_t)w.groups * 4);
  const size_t row_bytes = x_bytes + table_bytes + scale_bytes + sum_bytes;
  const int blocks = blocks_of(w), block_rows = w.tiles * kTileRows;
  const size_t out_bytes = (size_t)kRowsAtOnce * kMaxBlockRows * 4;
  const int team = threads < kMaxThreads ? threads : kMaxThreads;
  unsigned char* memory =
      scratch.get(row_bytes * rows_at_once + out_bytes * (team > 0 ? team : 1));
  unsigned char* outs = memory + row_bytes * rows_at_once;
  const int x_size = size_of(x_dtype);

  for (int start = 0; start < m; start += rows_at_once) {
    const int rows = m - start < rows_at_once ? m - start : rows_at_once;
    Table tables[kRowsAtOnce];
    float* inputs[kRowsAtOnce];
    for (int r = 0; r < rows; r++) {
      unsigned char* p = memory + row_bytes * r;
      inputs[r] = (float*)p;
      tables[r] = {p + x_bytes, (const float*)(p + x_bytes + table_bytes),
                   (const float*)(p + x_bytes + table_bytes + scale_bytes)};
    }
    // One item is one part of one row: whole groups.
    const bool share = team > 1 && table_bytes * rows >= kTablesWorthSharing;
    const int parts = share ? (w.groups < 8 ? w.groups : 8) : 1;
    auto build = [&](int item, int) {
      const int r = item / parts, part = item % parts;
      const int begin = (int)((long long)w.groups * part / parts);
      const int end = (int)((long long)w.groups * (part + 1) / parts);
      const int from = begin * w.group_words * 32;
      const int to = end == w.groups ? w.words * 32 : end * w.group_words * 32;
      const int valid = to < w.in ? to : w.in;
      isa.load((const unsigned char*)x + ((size_t)(start + r) * x_stride + from) * x_size, x_dtype,
               valid - from, inputs[r] + from);
      for (int i = valid; i < to; i++) inputs[r][i] = 0;
      isa.build(inputs[r], w, begin, end, numerics, (unsigned char*)tables[r].entries,
                (float*)tables[r].scale, (float*)tables[r].sum);
    };
    parallel(rows * parts, share ? team : 1, build);
    auto multiply = [&](int block, int thread) {
      float* out = (float*)(outs + out_bytes * thread);
      isa.multiply(w, block, tables, rows, numerics, out);
      const int row = block * block_rows;
      const int count = w.out - row < block_rows ? w.out - row : block_rows;
      for (int r = 0; r < rows; r++)
        isa.store(out + (size_t)r * kMaxBlockRows, bias ? bias + row : nullptr, count, x_dtype,
                  (unsigned char*)y + ((size_t)(start + r) * w.out + row) * x_size);
    };
    parallel(blocks, team, multiply);
  }
}

void linear_by_tiles(const Weight& w, const Isa& isa, const MatrixUnit& unit, bool split,
                     const void* x, Dtype x_dtype, size_t x_stride, int m, const float* bias,
                     void* y, int threads) {
  const int terms = split ? 2 : 1, x_size = size_of(x_dtype);
  const int team = threads < 1 ? 1 : threads < kMaxThreads ? threads : kMaxThreads;
  const int blocks = blocks_of(w), block_rows = w.tiles * kTileRows;
  // More blocks in an item read the activations less often; fewer share the work better.
  int item_blocks = blocks / (4 * team);
  item_blocks = item_blocks < 1 ? 1 : item_blocks > kItemBlocks ? kItemBlocks : item_blocks;
  const int items = (blocks + item_blocks - 1) / item_blocks, item_tiles = item_blocks * w.tiles;
  const int rows_at_once = m < kTileBatch ? m : kTileBatch;
  const int b_tiles_most = (rows_at_once + 15) / 16;
  const size_t columns = (size_t)w.words * 32;
  const size_t b_step = columns * 16;  // one tile of 16 activations

  const size_t b_bytes = b_step * b_tiles_most * 2;
  const size_t row_bytes = columns * 16 * (4 + 2);
  const size_t a_bytes = (size_t)item_tiles * kSlabWords * 1024;
  const size_t c_bytes = (size_t)item_tiles * b_tiles_most * 1024;
  const size_t work_bytes = a_bytes * terms + c_bytes;
  const size_t thread_bytes = work_bytes > row_bytes ? work_bytes : row_bytes;
  unsigned char* memory = scratch.get(b_bytes * terms + thread_bytes * team);
  uint16_t* b[2] = {(uint16_t*)memory, (uint16_t*)(memory + b_bytes)};
  unsigned char* own = memory + b_bytes * terms;

  for (int start = 0; start < m; start += rows_at_once) {
    const int rows = m - start < rows_at_once ? m - start : rows_at_once;
    const int b_tiles = (rows + 15) / 16;
    auto pack = [&](int tile, int thread) {
      float* numbers = (float*)(own + thread_bytes * thread);
      uint16_t* rounded = (uint16_t*)(numbers + columns * 16);
      for (int r = 0; r < 16; r++) {
        float* row = numbers + columns * r;
        const int from = tile * 16 + r;
        const int valid = from < rows ? w.in : 0;
        if (valid)
          isa.load((const unsigned char*)x + (size_t)(start + from) * x_stride * x_size, x_dtype,
                   valid, row);
        memset(row + valid, 0, (columns - valid) * 4);
      }
      for (int term = 0; term < terms; term++) {
        isa.store(numbers, nullptr, (int)columns * 16, BF16, rounded);
        unit.pack(rounded, columns, w.words, b[term] + b_step * tile);
        if (term + 1 < terms)
          for (size_t i = 0; i < columns * 16; i++) {
            const uint32_t bits = (uint32_t)rounded[i] << 16;
            float f;
            memcpy(&f, &bits, 4);
            numbers[i] -= f;
          }
      }
    };
    parallel(b_tiles, team, pack);
    auto multiply = [&](int item, int thread) {
      uint16_t* a[2] = {(uint16_t*)(own + thread_bytes * thread),
                        (uint16_t*)(own + thread_bytes * thread + a_bytes)};
      float* c = (float*)(own + thread_bytes * thread + a_bytes * terms);
      const int first = item * item_blocks;
      const int last = first + item_blocks < blocks ? first + item_blocks : blocks;
      const int tiles = (last < blocks ? last * w.tiles : w.total_tiles) - first * w.tiles;
      memset(c, 0, (size_t)tiles * b_tiles * 1024);
      unit.begin();
      for (int from = 0; from < w.words; from += kSlabWords) {
        const int to = from + kSlabWords < w.words ? from + kSlabWords : w.words;
        const size_t a_step = (size_t)(to - from) * 512;
        for (int block = first; block < last; block++) {
          const size_t at = (size_t)(block - first) * w.tiles * a_step;
          isa.decode_tiles(w, block, from, to, a[0] + at, split ? a[1] + at : nullptr);
        }
        const size_t k = (size_t)from * 512;
        unit.multiply(c, a[0], a_step, tiles, b[0] + k, b_step, b_tiles, to - from);
        if (split) {
          unit.multiply(c, a[0], a_step, tiles, b[1] + k, b_step, b_tiles, to - from);
          unit.multiply(c, a[1], a_step, tiles, b[0] + k, b_step, b_tiles, to - from);
        }
      }
      unit.end();
      for (int block = first; block < last; block++) {
        const int row = block * block_rows;
        const int count = w.out - row < block_rows ? w.out - row : block_rows;
        for (int j = 0; j < b_tiles; j++) {
          alignas(64) float out[16][kMaxBlockRows];
          for (int t = 0; t < tiles_of(w, block); t++) {
            const size_t tile = (size_t)((block - first) * w.tiles + t) * b_tiles + j;
            unit.transpose(c + tile * 256, &out[0][t * kTileRows], kMaxBlockRows);
          }
          for (int r = 0; r < 16 && j * 16 + r < rows; r++)
            isa.store(out[r], bias ? bias + row : nullptr, count, x_dtype,
                      (unsigned char*)y + ((size_t)(start + j * 16 + r) * w.out + row) * x_size);
        }
      }
    };
    parallel(items, team, multiply);
  }
}

void decode(const Weight& w, const Isa& isa, int begin, int end, Dtype dtype, void* dst,
            int threads) {
  const size_t stride = (size_t)w.words * 32;
  const size_t block_bytes = stride * w.tiles * kTileRows * size_of(dtype);
  auto work = [&](int item, int) {
    isa.decode(w, begin + item, dtype, (unsigned char*)dst + block_bytes * item, stride);
  };
  parallel(end - begin, threads, work);
}

uint64_t read_stream(const void* data, size_t bytes, int threads) {
  constexpr size_t kPart = 1 << 20;
  const uint64_t* words = (const uint64_t*)data;
  uint64_t sums[kMaxThreads * 8] = {};
  auto work = [&](int item, int thread) {
    const size_t from = item * kPart / 8;
    const size_t to = from + kPart / 8 < bytes / 8 ? from + kPart / 8 : bytes / 8;
    uint64_t sum[8] = {};
    size_t i = from;
    for (; i + 8 <= to; i += 8) {
      __builtin_prefetch((const char*)(words + i) + 2048, 0, 3);
      for (int k = 0; k < 8; k++) sum[k] += words[i + k];
    }
    for (; i < to; i++) sum[0] += words[i];
    for (int k = 0; k < 8; k++) sums[thread * 8] += sum[k];
  };
  parallel((int)((bytes + kPart - 1) / kPart), threads < kMaxThreads ? threads : kMaxThreads, work);
  uint64_t total = 0;
  for (int t = 0; t < kMaxThreads; t++) total += sums[t * 8];
  return total;
}

}  // namespace lutra
