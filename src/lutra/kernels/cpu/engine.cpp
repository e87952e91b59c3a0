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
