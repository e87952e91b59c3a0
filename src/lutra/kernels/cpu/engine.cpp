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

// Between per-row numbers [plane][out][groups] and [group][plane][tile][16] of one block.
template <class T>
void move_numbers(const Weight& w, int block, int planes, T* canonical, T* prepared,
                  bool to_prepared) {
  const int rows = tiles_of(w, block) * kTileRows, first = block * w.tiles * kTileRows;
  const int valid = w.out - first < rows ? w.out - first : rows;
  T* base = prepared + (size_t)first * w.groups * planes;
  for (int q = 0; q < planes; q++)
    for (int r = 0; r < rows; r++) {
      T* c = canonical + ((size_t)q * w.out + first + r) * w.groups;
      T* p = base + (size_t)q * rows + r;
      const size_t step = (size_t)planes * rows;
      if (r >= valid) {
        for (int g = 0; to_prepared && g < w.groups; g++) p[g * step] = 0;
      } else if (to_prepared) {
        for (int g = 0; g < w.groups; g++) p[g * step] = c[g];
      } else {
        for (int g = 0; g < w.groups; g++) c[g] = p[g * step];
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

// The 16 x 4 bytes of a cell to [4 bytes][16 rows], or back.
void transpose_bytes(uint32_t* cell, bool back) {
  unsigned char bytes[64], turned[64];
  memcpy(bytes, cell, 64);
  for (int b = 0; b < 4; b++)
    for (int r = 0; r < kTileRows; r++)
      if (back)
        turned[r * 4 + b] = bytes[b * kTileRows + r];
      else
        turned[b * kTileRows + r] = bytes[r * 4 + b];
  memcpy(cell, turned, 64);
}

// Between words [plane][out][words] and the cells of one block.
void move_planes(const Weight& w, const Isa& isa, int block, uint32_t* canonical, uint32_t* prepared,
                 bool to_prepared) {
  const int tiles = tiles_of(w, block);
  uint32_t* cell = prepared + (size_t)block * w.tiles * kTileRows * w.words * w.bits;
  for (int g = 0; g < w.groups; g++)
    for (int q = 0; q < w.bits; q++)
      for (int i = 0; i < words_of(w, g); i++)
        for (int t = 0; t < tiles; t++, cell += kTileRows) {
          const int row = (block * w.tiles + t) * kTileRows;
          const int rows = w.out - row < kTileRows ? w.out - row : kTileRows;
          uint32_t* c = canonical + ((size_t)q * w.out + row) * w.words + g * w.group_words + i;
          uint32_t turned[kTileRows] = {};
          if (to_prepared) {
            for (int r = 0; r < rows; r++) turned[r] = c[(size_t)r * w.words];
            if (isa.byte_cells) transpose_bytes(turned, false);
            memcpy(cell, turned, 64);
          } else {
            memcpy(turned, cell, 64);
            if (isa.byte_cells) transpose_bytes(turned, true);
            for (int r = 0; r < rows; r++) c[(size_t)r * w.words] = turned[r];
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
