// Python binding. Tensors come as addresses and sizes: no linkage to libtorch, whose ABI changes with
// every release. lutra/kernels/cpu/linear.py checks shapes, dtypes and strides before it calls; what
// is checked here again costs nothing and keeps a wrong call from reading outside its tensors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "features.h"
#include "flat.h"
#include "memory.h"
#include "token.h"

namespace nb = nanobind;
using namespace lutra;

namespace {

const Isa* levels[kIsaCount];
int level_count = 0;
const Isa* current = nullptr;
const MatrixUnit* matrix_unit = nullptr;

std::vector<std::string> level_names() {
  std::vector<std::string> names;
  for (int i = 0; i < level_count; i++) names.emplace_back(levels[i]->name);
  return names;
}

void set_level(const std::string& name) {
  for (int i = 0; i < level_count; i++)
    if (name == levels[i]->name) {
      current = levels[i];
      return;
    }
  std::string known;
  for (const std::string& n : level_names()) known += (known.empty() ? "" : ", ") + n;
  throw std::invalid_argument("this machine and build have no level '" + name + "'; they have " +
                              known);
}

Dtype dtype_of(int code) {
  if (code < F32 || code > BF16) throw std::invalid_argument("unknown dtype code");
  return (Dtype)code;
}

template <class T>
T* pointer(size_t address) {
  return (T*)address;
}

struct Layer {
  Weight w = {};

  // Sizes, and where the prepared tensors lie.
  Layer(size_t planes, size_t scale, size_t offset, int scale_dtype, int offset_dtype, int out,
        int in, int bits, int group_size, bool uniform) {
    if (out < 1 || in < 1 || bits < 1 || bits > kMaxBits || group_size < 1 ||
        (group_size % 32 != 0 && group_size < in))
      throw std::invalid_argument("impossible shape of a bit-plane weight");
    w.planes = pointer<const uint32_t>(planes);
    w.scale = pointer<const void>(scale);
    w.offset = pointer<const void>(offset);
    w.scale_dtype = dtype_of(scale_dtype);
    w.offset_dtype = dtype_of(offset_dtype);
    w.out = out, w.in = in, w.bits = bits, w.uniform = uniform && bits > 1;
    complete(w, group_size, *current);
  }
};

FlatLevel flat_levels[kFlatLevelCount];
int flat_level_count = 0;
const FlatLevel* flat_current = nullptr;

// A flattened layer: addresses, sizes, and what its plan says. The plan is one tensor of 32-bit numbers:
// a header, then the tables of FlatInput; kernels/cpu/flat.py writes it.
struct FlatLayer {
  enum Header : int { kIn, kColumns, kHigh, kWides, kLows, kUsual, kSmooth, kStatic, kSize };

  FlatWeight w = {};
  FlatInput input = {};

  FlatLayer(size_t data, size_t bytes, size_t scale, size_t plan, size_t words, int out, int bits) {
    const auto wrong = [](const char* what) {
      throw std::invalid_argument(std::string("impossible flattened layer: ") + what);
    };
    const int32_t* at = pointer<const int32_t>(plan);
    if (words < kSize) wrong("its plan is too short");
    const int in = at[kIn], columns = at[kColumns], high = at[kHigh];
    const int wides = at[kWides], lows = at[kLows];
    if (out < 1 || (bits != 4 && bits != 8)) wrong("outputs or bits");
    if (in < 1 || high < 0 || columns % kFlatColumns || high % kFlatColumns ||
        (long long)high + in > columns || wides < 0 || lows < 0 || wides > in || lows > in)
      wrong("columns");
    const size_t depth = columns / kFlatColumns, tiles = ((size_t)out + 15) / 16;
    if (bytes != depth * tiles * kFlatColumns * 16 * bits / 8) wrong("bytes of its weight");
    const size_t others = (size_t)columns - in;  // high and extra columns
    if (words != kSize + (size_t)in * (at[kSmooth] ? 3 : 2) + wides + lows + 2 * others +
                     (at[kStatic] ? 1 : 0))
      wrong("length of its plan");
    w = {pointer<const uint8_t>(data), pointer<const float>(scale), out, bits, columns, high};
    input.in = in, input.columns = columns, input.high = high;
    input.wides = wides, input.lows = lows, input.extras = columns - high - in;
    input.usual = ((const float*)at)[kUsual];
    const int32_t* next = at + kSize;
    const auto take = [&](size_t n) {
      next += n;
      return next - n;
    };
    input.limit = (const float*)take(in);
    input.mask = (const uint32_t*)take(in);
    input.wide = take(wides);
    input.low = take(lows);
    input.source = take(others);
    input.piece = take(others);
    if (at[kSmooth]) input.smooth = (const float*)take(in);
    if (at[kStatic]) input.step = (const float*)take(1);
    const auto check = [&](const int32_t* channels, size_t n, int from) {
      for (size_t i = 0; i < n; i++)
        if (channels[i] < from || channels[i] >= in) wrong("a channel of its plan");
    };
    check(input.wide, wides, 0);
    check(input.low, lows, 0);
    check(input.source, others, -1);
    // What passes through 32-bit integers must fit them.
    constexpr float kLargest = 1 << 30;
    constexpr int32_t kPieces = (1 << 30) / kFlatDigit;
    bool fits = true;
    for (int i = 0; i < in; i++) fits &= input.limit[i] >= 1 && input.limit[i] <= kLargest;
    for (size_t i = 0; i < others; i++)
      fits &= input.piece[i] >= -kPieces && input.piece[i] <= kPieces;
    if (!fits) wrong("a limit or a piece of its plan");
  }
};

// AVX2 serves all levels of x86 above the portable one.
const TokenOps& token_ops() {
  const bool portable = current == kPortable || !kTokenAvx2;
  return portable ? *kTokenPortable : *kTokenAvx2;
}

Dtype token_dtype(int code) {
  const Dtype dtype = dtype_of(code);
  if (dtype == F16) throw std::invalid_argument("float32 or bfloat16 only");
  return dtype;
}

void check_rows(int m, int threads) {
  if (m < 0 || threads < 1) throw std::invalid_argument("negative rows or no thread");
}

}  // namespace

NB_MODULE(_native, m) {
  level_count = available_levels(levels);
  current = levels[0];
  matrix_unit = available_matrix_unit();
  m.doc() = "Kernels for bit planes on CPUs. Tensors are passed as addresses.";
  m.def("levels", &level_names, "Instruction-set levels that run here, best first.");
  m.def("level", [] { return std::string(current->name); }, "The level in use.");
  m.def("set_level", &set_level, nb::arg("name"),
        "Use a level; weights prepared for another one must not be used any more.");

  // Addresses of prepared planes, scale, offset; their dtypes; out, in, bits, group size, uniform.
#define LAYER_ARGUMENTS                                                                        \
  size_t planes, size_t scale, size_t offset, int scale_dtype, int offset_dtype, int out, int in, \
      int bits, int group_size, bool uniform
#define LAYER \
  Layer(planes, scale, offset, scale_dtype, offset_dtype, out, in, bits, group_size, uniform)

  m.def("prepare",
        [](LAYER_ARGUMENTS, size_t from_planes, size_t from_scale, size_t from_offset,
           int threads) {
          check_rows(0, threads);
          const Layer layer = LAYER;
          nb::gil_scoped_release release;
          prepare(layer.w, *current, pointer<const uint32_t>(from_planes),
                  pointer<const void>(from_scale), pointer<const void>(from_offset), threads);
        });
  m.def("restore",
        [](LAYER_ARGUMENTS, size_t to_planes, size_t to_scale, size_t to_offset, int threads) {
          check_rows(0, threads);
          const Layer layer = LAYER;
          nb::gil_scoped_release release;
          restore(layer.w, *current, pointer<uint32_t>(to_planes), pointer<void>(to_scale),
                  pointer<void>(to_offset), threads);
        });
  m.def("linear",
        [](LAYER_ARGUMENTS, bool fast, size_t x, int x_dtype, size_t x_stride, int rows,
           size_t bias, size_t y, int threads) {
          check_rows(rows, threads);
          const Layer layer = LAYER;
          const Dtype dtype = dtype_of(x_dtype);
          nb::gil_scoped_release release;
          linear(layer.w, *current, fast ? kFast : kExact, pointer<const void>(x), dtype, x_stride,
                 rows, pointer<const float>(bias), pointer<void>(y), threads);
        });
  m.def("has_matrix_unit", [] { return matrix_unit && current->decode_tiles; },
        "Whether `linear_by_tiles` works at this level on this machine.");
  m.def("linear_by_tiles",
        [](LAYER_ARGUMENTS, bool split, size_t x, int x_dtype, size_t x_stride, int rows,
           size_t bias, size_t y, int threads) {
          check_rows(rows, threads);
          const Layer layer = LAYER;
          const Dtype dtype = dtype_of(x_dtype);
          if (!matrix_unit || !current->decode_tiles)
            throw std::invalid_argument("no matrix unit here");
          nb::gil_scoped_release release;
          linear_by_tiles(layer.w, *current, *matrix_unit, split, pointer<const void>(x), dtype,
                          x_stride, rows, pointer<const float>(bias), pointer<void>(y), threads);
        });
  m.def("decode",
        [](LAYER_ARGUMENTS, int first_row, int rows, int dtype_code, size_t dst, int threads) {
          check_rows(rows, threads);
          const Layer layer = LAYER;
          const Dtype dtype = dtype_of(dtype_code);
          const int block = layer.w.tiles * kTileRows;
          if (dtype == F16 || first_row % block != 0 || first_row < 0 || first_row > out ||
              rows > out - first_row)
            throw std::invalid_argument("decode: rows outside the weight, or not whole blocks");
          nb::gil_scoped_release release;
          decode(layer.w, *current, first_row / block, (first_row + rows + block - 1) / block,
                 dtype, pointer<void>(dst), threads);
        });
  m.def("allocate",
        [](size_t bytes) {
          void* block = allocate_weight(bytes);
          nb::capsule owner(block, [](void* p) noexcept { free_weight(p); });
          return nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>(block, {bytes}, owner);
        },
        "Memory for a prepared weight, a uint8 tensor; on huge pages where there are any.");

  // Flattened layers: see FlatLayer.
#define FLAT_ARGUMENTS \
  size_t data, size_t bytes, size_t scale, size_t plan, size_t words, int out, int bits
#define FLAT FlatLayer(data, bytes, scale, plan, words, out, bits)

  flat_level_count = available_flat_levels(flat_levels);
  flat_current = flat_levels;
  m.def("flat_levels",
        [] {
          std::vector<std::string> names;
          for (int i = 0; i < flat_level_count; i++) names.emplace_back(flat_levels[i].name);
          return names;
        },
        "Instruction-set levels that flattened layers have here, best first.");
  m.def("flat_level", [] { return std::string(flat_current->name); }, "The level in use.");
  m.def("set_flat_level",
        [](const std::string& name) {
          for (int i = 0; i < flat_level_count; i++)
            if (name == flat_levels[i].name) {
              flat_current = &flat_levels[i];
              return;
            }
          throw std::invalid_argument("no level '" + name + "' of flattened layers here");
        },
        nb::arg("name"), "Use a level; prepared weights serve all of them.");
  m.def("flat_prepare", [](FLAT_ARGUMENTS, size_t digits, int row_words, size_t origin, int threads) {
    check_rows(0, threads);
    const FlatLayer layer = FLAT;
    const int32_t* columns = pointer<const int32_t>(origin);
    for (int c = 0; c < layer.w.columns; c++)
      if (columns[c] < -1 || columns[c] >= (long long)row_words * 32 / bits)
        throw std::invalid_argument("a lowered column has no stored one");
    nb::gil_scoped_release release;
    flat_prepare(layer.w, pointer<const uint32_t>(digits), row_words, columns, threads);
  });
  m.def("flat_restore", [](FLAT_ARGUMENTS, size_t digits, int row_words, int stored, int threads) {
    check_rows(0, threads);
    const FlatLayer layer = FLAT;
    if (stored < 0 || stored > layer.w.columns - layer.w.high ||
        stored > (long long)row_words * 32 / bits)
      throw std::invalid_argument("more stored columns than there are");
    nb::gil_scoped_release release;
    flat_restore(layer.w, pointer<uint32_t>(digits), row_words, stored, threads);
  });
  m.def("flat_linear",
        [](FLAT_ARGUMENTS, size_t x, int x_dtype, size_t x_stride, int rows, size_t bias, size_t y,
           int tiles_from, int threads) {
          check_rows(rows, threads);
          const FlatLayer layer = FLAT;
          const Dtype dtype = dtype_of(x_dtype);
          nb::gil_scoped_release release;
          flat_linear(*flat_current, layer.w, layer.input, pointer<const void>(x), dtype, x_stride,
                      rows, pointer<const float>(bias), pointer<void>(y), tiles_from, threads);
        });
  m.def("flat_quantize",
        [](FLAT_ARGUMENTS, size_t x, int x_dtype, size_t x_stride, int rows, size_t columns,
           size_t sums, size_t steps, int threads) {
          check_rows(rows, threads);
          const FlatLayer layer = FLAT;
          const Dtype dtype = dtype_of(x_dtype);
          nb::gil_scoped_release release;
          flat_quantize(*flat_current, layer.input, pointer<const void>(x), dtype, x_stride, rows,
                        pointer<int8_t>(columns), pointer<int32_t>(sums), pointer<float>(steps),
                        threads);
        });
  m.def("token_add_norm",
        [](size_t x, size_t delta, size_t weight, size_t sum, size_t y, int rows, int features,
           float epsilon, int dtype_code) {
          const Dtype dtype = token_dtype(dtype_code);
          if (rows < 0 || features < 1 || features % kTokenLanes)
            throw std::invalid_argument("impossible size of a norm");
          nb::gil_scoped_release release;
          token_ops().add_norm(pointer<const void>(x), pointer<const void>(delta),
                               pointer<const void>(weight), pointer<void>(sum), pointer<void>(y),
                               rows, features, epsilon, dtype);
        });
  m.def("token_silu", [](size_t x, size_t y, int rows, int features, int dtype_code) {
    const Dtype dtype = token_dtype(dtype_code);
    if (rows < 0 || features < 1 || features % kTokenLanes)
      throw std::invalid_argument("impossible size of an activation");
    nb::gil_scoped_release release;
    token_ops().silu(pointer<const void>(x), pointer<void>(y), rows, features, dtype);
  });
  m.def("token_attention",
        [](size_t qkv, size_t cosine, size_t sine, size_t query_norm, size_t key_norm, size_t keys,
           size_t values, size_t position, size_t start, size_t y, int batch, int heads,
           int kv_heads, int dim, int rotary_stride, int64_t capacity, float scale, float epsilon,
           int dtype_code, int threads) {
          check_rows(batch, threads);
          TokenAttention a = {};
          a.dtype = token_dtype(dtype_code);
          a.qkv = pointer<const void>(qkv), a.y = pointer<void>(y);
          a.cosine = pointer<const void>(cosine), a.sine = pointer<const void>(sine);
          a.query_norm = pointer<const void>(query_norm);
          a.key_norm = pointer<const void>(key_norm);
          a.keys = pointer<void>(keys), a.values = pointer<void>(values);
          a.start = pointer<const int32_t>(start), a.position = *pointer<const int64_t>(position);
          a.batch = batch, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim;
          a.rotary_stride = rotary_stride, a.capacity = capacity;
          a.scale = scale, a.epsilon = epsilon;
          if (kv_heads < 1 || heads < kv_heads || heads % kv_heads || dim < 1 ||
              dim % (2 * kTokenLanes) || dim > kTokenMostDim || a.position < 0 ||
              a.position >= capacity)
            throw std::invalid_argument("impossible shape of an attention, or its cache is full");
          for (int i = 0; i < batch; i++)
            if (a.start[i] < 0 || a.start[i] > a.position)
              throw std::invalid_argument("a sequence starts behind its end");
          nb::gil_scoped_release release;
          token_attention(token_ops(), a, threads);
        });
  m.def("read_stream",
        [](size_t data, size_t bytes, int threads) {
          check_rows(0, threads);
          nb::gil_scoped_release release;
          return read_stream(pointer<const void>(data), bytes, threads);
        });
}
