// FlattenQuant layers: from whole tensors to the kernels of flat.h. Nothing is checked: the caller, the
// Python binding, has done so.
#include "flat.h"

#include <cstring>

#include "memory.h"
#include "pool.h"

namespace lutra {
namespace {

constexpr int kTile = kFlatColumns * 16;  // bytes of a tile, or numbers of a packed one

int size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

size_t tile_bytes(const FlatWeight& w) { return (size_t)kTile * w.bits / 8; }

int least(int a, int b) { return a < b ? a : b; }

// A lambda as the pool's work.
template <class F>
void parallel(int items, int threads, F& f) {
  run_parallel(
      items, threads, [](void* c, int item, int thread) { (*(F*)c)(item, thread); }, &f);
}

// Memory of one call, kept by the thread that calls; on huge pages, as tiles are read all over it.
struct Scratch {
  unsigned char* memory = nullptr;
  size_t size = 0;

  ~Scratch() { release(); }

  void release() {
    if (memory) free_weight(memory);
    memory = nullptr, size = 0;
  }

  unsigned char* get(size_t bytes) {
    if (bytes > size) {
      release();
      memory = (unsigned char*)allocate_weight(bytes);
      size = bytes;
    }
    return memory;
  }
};
thread_local Scratch scratch;

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Rows of activations that are quantized and multiplied together, outputs of an item, and columns
// multiplied at once, on a matrix unit. The activations of so many columns stay in the second-level
// cache for all outputs of an item, as do the sums, and two tiles of weights in the first.
constexpr int kBatch = 512;
constexpr int kItemTiles = 16;
constexpr int kSlab = 24;
// Below this many numbers another hand-over to the pool costs more than it saves.
constexpr int kWorthSharing = 16 * 1024;

// A piece of work with a layer: what all of its steps know.
struct Call {
  const FlatLevel& level;
  const FlatWeight& w;
  const FlatInput& input;
  const unsigned char* x;
  Dtype dtype;
  size_t x_stride;
  const float* bias;
  unsigned char* y;
  int threads;
  // The rows at hand, and their activations in tiles of `height`.
  int rows, height;
  int8_t* a;
  float* steps;
  int32_t* sums;

  const Isa& base() const { return **level.isa->base; }

  // Bytes of activations from tile to tile.
  size_t a_step() const { return (size_t)height * w.columns; }

  // Rows of x, `own` with room for one as float for each thread.
  void quantize(float* own) {
    const int tiles = (rows + height - 1) / height;
    const int team = (long long)rows * input.in < kWorthSharing ? 1 : threads;
    auto work = [&](int item, int thread) {
      const int tile = item / height, r = item % height;
      int8_t* dst = a + a_step() * tile + (size_t)r * kFlatColumns;
      if (item >= rows) {
        for (int c = 0; c < w.columns; c += kFlatColumns, dst += (size_t)height * kFlatColumns)
          memset(dst, 0, kFlatColumns);
        return;
      }
      const unsigned char* from = x + (size_t)item * x_stride * size_of(dtype);
      float* room = own + padded((size_t)input.in * 4) / 4 * thread;
      const float* row = (const float*)from;
      if (dtype != F32) {
        base().load(from, dtype, input.in, room);
        row = room;
      }
      level.isa->quantize(input, row, room, dst, height, steps + item, sums + item);
    };
    parallel(tiles * height, team, work);
  }

  // n outputs from `output` on of one row, their sums in runs of 16.
  void write(int row, int output, int n, const int32_t* c, size_t c_step, float* numbers) const {
    const int32_t excess = (int32_t)((uint32_t)sums[row] << (w.bits - 1));
    level.isa->finish(c, c_step, excess, steps[row], w.scale + output, n, numbers);
    base().store(numbers, bias ? bias + output : nullptr, n, dtype,
                 y + ((size_t)row * w.out + output) * size_of(dtype));
  }

  // Each item multiplies some tiles of outputs with some tiles of rows.
  void multiply() const {
    const int tiles = (w.out + 15) / 16, groups = (tiles + level.isa->tiles - 1) / level.isa->tiles;
    const int row_tiles = (rows + height - 1) / height;
    int splits = groups < 4 * threads ? (4 * threads + groups - 1) / groups : 1;
    splits = least(splits, (row_tiles + 7) / 8);
    auto work = [&](int item, int) {
      const int first = item / splits * level.isa->tiles, part = item % splits;
      const int count = least(level.isa->tiles, tiles - first);
      const int begin = (int)((long long)row_tiles * part / splits);
      const int end = (int)((long long)row_tiles * (part + 1) / splits);
      alignas(64) int32_t c[kFlatMaxRows * kFlatMaxTiles * 16];
      alignas(64) float numbers[kFlatMaxTiles * 16];
      for (int t = begin; t < end; t++)
        for (int r = 0; r < height && t * height + r < rows; r += level.isa->rows) {
          const int row = t * height + r;
          const int n = least(least(level.isa->rows, height - r), rows - row);
          level.isa->multiply(w, first, count, a + a_step() * t + (size_t)r * kFlatColumns, height,
                              n, c);
          for (int i = 0; i < n; i++)
            write(row + i, first * 16, least(count * 16, w.out - first * 16),
                  c + i * kFlatMaxTiles * 16, 16, numbers);
        }
    };
    parallel(groups * splits, threads, work);
  }

  // The same on the matrix unit; `own` holds `thread_bytes` for each thread.
  void multiply_tiles(unsigned char* own, size_t thread_bytes, int item_tiles) const {
    const FlatMatrix& unit = *level.matrix;
    const int tiles = (w.out + 15) / 16, row_tiles = (rows + 15) / 16;
    const int depth = w.columns / kFlatColumns, high = w.high / kFlatColumns;
    auto work = [&](int item, int thread) {
      uint8_t* unpacked = own + thread_bytes * thread;
      int32_t* c = (int32_t*)(unpacked + 2 * kSlab * kTile);
      const int first = item * item_tiles, count = least(item_tiles, tiles - first);
      const size_t c_step = (size_t)count * 256;  // from tile to tile of rows
      unit.begin();
      for (int from = 0, to; from < depth; from = to) {
        to = least(from + kSlab, from < high ? high : depth);
        for (int t = 0; t < count; t += 2) {
          const int pair = least(2, count - t);
          const uint8_t* b = w.data + ((size_t)(first + t) * depth + from) * tile_bytes(w);
          size_t b_step = (size_t)depth * tile_bytes(w);
          if (w.bits == 4) {
            for (int i = 0; i < pair; i++)
              unit.unpack(b + i * b_step, to - from, unpacked + i * kSlab * kTile);
            b = unpacked, b_step = kSlab * kTile;
          }
          unit.multiply(c + t * 256, c_step, a + (size_t)from * kTile, a_step(), row_tiles, b, b_step,
                        pair, to - from, from > 0);
        }
        if (to == high) unit.raise(c, row_tiles * c_step);
      }
      unit.end();
      alignas(64) float numbers[kItemTiles * 16];
      for (int row = 0; row < rows; row++)
        write(row, first * 16, least(count * 16, w.out - first * 16),
              c + row / 16 * c_step + row % 16 * 16, 256, numbers);
    };
    parallel((tiles + item_tiles - 1) / item_tiles, threads, work);
  }
};

int team_of(int threads) { return threads < 1 ? 1 : least(threads, kMaxThreads); }

// A stored digit.
int digit(const uint32_t* row, int bits, int column) {
  if (bits == 8) return (int8_t)(row[column / 4] >> (column % 4 * 8));
  return (int8_t)(row[column / 8] >> (column % 8 * 4) << 4) >> 4;
}

// 64 stored digits from column `first` on, a multiple of 64, as unsigned bytes.
void neighbours(const uint32_t* row, int bits, int first, uint8_t* dst) {
  const uint8_t* from = (const uint8_t*)row + (size_t)first * bits / 8;
  if (bits == 8)
    for (int i = 0; i < kFlatColumns; i++) dst[i] = from[i] ^ 128;
  else
    for (int i = 0; i < kFlatColumns / 2; i++) {
      dst[2 * i] = (from[i] & 15) ^ 8;
      dst[2 * i + 1] = (from[i] >> 4) ^ 8;
    }
}

}  // namespace

void flat_prepare(const FlatWeight& w, const uint32_t* digits, int words, const int32_t* origin,
                  int threads) {
  const int tiles = (w.out + 15) / 16, depth = w.columns / kFlatColumns;
  const int zero = 1 << (w.bits - 1);
  const auto whole = [&](const int32_t* columns) {  // 64 neighbours, and from a word on
    bool same = columns[0] >= 0 && columns[0] % kFlatColumns == 0;
    for (int i = 1; i < kFlatColumns; i++) same &= columns[i] == columns[0] + i;
    return same;
  };
  auto work = [&](int tile, int) {
    uint8_t* dst = (uint8_t*)w.data + (size_t)tile * depth * tile_bytes(w);
    const int outputs = least(16, w.out - tile * 16);
    for (int k = 0; k < depth; k++, dst += tile_bytes(w)) {
      const int32_t* columns = origin + k * kFlatColumns;
      const bool neighbouring = whole(columns);
      for (int n = 0; n < 16; n++) {
        const uint32_t* from = digits + (size_t)(tile * 16 + n) * words;
        uint8_t row[kFlatColumns];
        if (n >= outputs)
          memset(row, zero, sizeof row);
        else if (neighbouring)
          neighbours(from, w.bits, columns[0], row);
        else
          for (int i = 0; i < kFlatColumns; i++)
            row[i] = (uint8_t)(zero + (columns[i] < 0 ? 0 : digit(from, w.bits, columns[i])));
        uint32_t quads[16];
        memcpy(quads, row, sizeof quads);
        uint32_t* to = (uint32_t*)dst + n;
        if (w.bits == 8)
          for (int quad = 0; quad < 16; quad++) to[quad * 16] = quads[quad];
        else
          for (int pair = 0; pair < 8; pair++)
            to[pair * 16] = quads[2 * pair] | quads[2 * pair + 1] << 4;
      }
    }
  };
  parallel(tiles, team_of(threads), work);
}

void flat_restore(const FlatWeight& w, uint32_t* digits, int words, int stored, int threads) {
  const int depth = w.columns / kFlatColumns, per_word = 32 / w.bits;
  const uint32_t zero = 1u << (w.bits - 1), keep = (1u << w.bits) - 1;
  auto work = [&](int output, int) {
    uint32_t* row = digits + (size_t)output * words;
    memset(row, 0, (size_t)words * 4);
    const uint8_t* tiles = w.data + (size_t)(output / 16) * depth * tile_bytes(w);
    for (int i = 0; i < stored; i++) {
      const int column = w.high + i, within = column % kFlatColumns, quad = within / 4;
      const uint8_t* tile = tiles + (size_t)(column / kFlatColumns) * tile_bytes(w);
      const int n = output % 16 * 4 + within % 4;
      const uint32_t number = w.bits == 8 ? tile[quad * 64 + n]
                                          : (tile[quad / 2 * 64 + n] >> (quad % 2 * 4)) & 15u;
      row[i / per_word] |= ((number - zero) & keep) << (i % per_word * w.bits);
    }
  };
  parallel(w.out, team_of(threads), work);
}

void flat_linear(const FlatLevel& level, const FlatWeight& w, const FlatInput& input, const void* x,
                 Dtype x_dtype, size_t x_stride, int m, const float* bias, void* y, int tiles_from,
                 int threads) {
  if (m == 0) return;
  Call call{level, w, input, nullptr, x_dtype, x_stride, bias, nullptr, team_of(threads), 0, 0,
            nullptr, nullptr, nullptr};
  const bool by_tiles = level.matrix && m >= tiles_from;
  call.height = by_tiles ? 16 : least(m, level.isa->rows);
  const int most = least(m, kBatch), most_tiles = (most + call.height - 1) / call.height;
  // More outputs in an item read the activations less often; fewer share the work better.
  const int tiles = (w.out + 15) / 16;
  int item_tiles = tiles / (4 * call.threads) / 2 * 2;
  item_tiles = item_tiles < 2 ? 2 : least(item_tiles, kItemTiles);

  const size_t a_bytes = padded(call.a_step() * most_tiles);
  const size_t row_bytes = padded((size_t)input.in * 4), step_bytes = padded((size_t)most * 4);
  size_t thread_bytes = row_bytes;
  if (by_tiles) {
    const size_t tile_work = 2 * kSlab * kTile + (size_t)item_tiles * most_tiles * 1024;
    thread_bytes = thread_bytes > tile_work ? thread_bytes : tile_work;
  }
  unsigned char* memory = scratch.get(a_bytes + 2 * step_bytes + thread_bytes * call.threads);
  call.a = (int8_t*)memory;
  call.steps = (float*)(memory + a_bytes);
  call.sums = (int32_t*)(memory + a_bytes + step_bytes);
  unsigned char* own = memory + a_bytes + 2 * step_bytes;
  for (int start = 0; start < m; start += kBatch) {
    call.rows = least(kBatch, m - start);
    call.x = (const unsigned char*)x + (size_t)start * x_stride * size_of(x_dtype);
    call.y = (unsigned char*)y + (size_t)start * w.out * size_of(x_dtype);
    call.quantize((float*)own);
    if (by_tiles)
      call.multiply_tiles(own, thread_bytes, item_tiles);
    else
      call.multiply();
  }
}

void flat_quantize(const FlatLevel& level, const FlatInput& input, const void* x, Dtype x_dtype,
                   size_t x_stride, int m, int8_t* columns, int32_t* sums, float* steps,
                   int threads) {
  FlatWeight w = {};
  w.columns = input.columns;
  const size_t row_bytes = padded((size_t)input.in * 4);
  Call call{level, w, input, (const unsigned char*)x, x_dtype, x_stride, nullptr, nullptr,
            team_of(threads), m, 1, columns, steps, sums};
  call.quantize((float*)scratch.get(row_bytes * call.threads));
}

}  // namespace lutra
