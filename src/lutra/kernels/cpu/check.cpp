// Checks every level that this machine runs against sums in double precision, without Python: for
// processors that are only emulated, and for compilers. See check.sh.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "engine.h"
#include "features.h"
#include "flat.h"

using namespace lutra;

namespace {

uint64_t seed = 88172645463325252u;

uint32_t random_bits() {
  seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
  return (uint32_t)(seed >> 16);
}

float uniform(float from, float to) {
  return from + (to - from) * (float)(random_bits() & 0xffffff) / 16777216.0f;
}

float rounded(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits &= 0xffff0000;
  memcpy(&f, &bits, 4);
  return f;
}

// One shape on one level; returns the number of failures. Scales are bfloat16, offsets float.
int check(const Isa& isa, int out, int in, int bits, int group, bool uniform_levels, int m) {
  Weight w = {};
  w.out = out, w.in = in, w.bits = bits, w.uniform = uniform_levels && bits > 1;
  w.scale_dtype = BF16, w.offset_dtype = F32;
  complete(w, group, isa);
  const int stored = w.uniform ? 1 : bits;
  std::vector<uint32_t> planes((size_t)bits * out * w.words);
  std::vector<uint16_t> scale((size_t)stored * out * w.groups);
  std::vector<float> offset((size_t)out * w.groups), x((size_t)m * in), y((size_t)m * out);
  for (uint32_t& p : planes) p = random_bits();
  for (uint16_t& s : scale) {
    const float f = rounded(uniform(0.1f, 1.0f));
    uint32_t b;
    memcpy(&b, &f, 4);
    s = (uint16_t)(b >> 16);
  }
  for (float& z : offset) z = uniform(-0.5f, 0.5f);
  for (float& v : x) v = uniform(-2.0f, 2.0f);

  const size_t rows = (size_t)w.total_tiles * kTileRows;
  std::vector<uint32_t> p(rows * w.words * bits);
  std::vector<uint16_t> s(rows * w.groups * stored);
  std::vector<float> z(rows * w.groups);
  w.planes = p.data(), w.scale = s.data(), w.offset = z.data();
  prepare(w, isa, planes.data(), scale.data(), offset.data(), 2);
  std::vector<uint32_t> planes_back(planes.size());
  std::vector<uint16_t> scale_back(scale.size());
  std::vector<float> offset_back(offset.size());
  restore(w, isa, planes_back.data(), scale_back.data(), offset_back.data(), 2);
  int failures = planes_back != planes || scale_back != scale || offset_back != offset;
  if (failures) printf("%s: restored weight differs\n", isa.name);

  std::vector<double> dense((size_t)out * in);
  for (int o = 0; o < out; o++)
    for (int i = 0; i < in; i++) {
      const int g = i / 32 / w.group_words;
      double value = offset[(size_t)o * w.groups + g];
      for (int q = 0; q < bits; q++) {
        const uint32_t b =
            (uint32_t)scale[((size_t)(w.uniform ? 0 : q) * out + o) * w.groups + g] << 16;
        float alpha;
        memcpy(&alpha, &b, 4);
        const double a = w.uniform ? alpha / (double)(1 << q) : alpha;
        value += planes[((size_t)q * out + o) * w.words + i / 32] >> (i % 32) & 1 ? a : -a;
      }
      dense[(size_t)o * in + i] = value;
    }
  const auto error_of = [&] {
    double difference = 0, expected = 0;
    for (int r = 0; r < m; r++)
      for (int o = 0; o < out; o++) {
        double sum = 0, power = 0;
        for (int i = 0; i < in; i++) {
          const double term = dense[(size_t)o * in + i] * x[(size_t)r * in + i];
          sum += term, power += term * term;
        }
        difference += (sum - y[(size_t)r * out + o]) * (sum - y[(size_t)r * out + o]);
        expected += power;
      }
    return std::sqrt(difference / expected);
  };
  const auto expect = [&](const char* what, double bound) {
    const double error = error_of();
    if (!(error <= bound)) {
      printf("%s %s: %dx%d, %d bits, group %d, uniform %d, %d rows: error %.2e > %.0e\n", isa.name,
             what, out, in, bits, group, w.uniform, m, error, bound);
      failures++;
    }
  };
  linear(w, isa, kExact, x.data(), F32, in, m, nullptr, y.data(), 2);
  expect("exact", 8e-5);
  linear(w, isa, kFast, x.data(), F32, in, m, nullptr, y.data(), 2);
  expect("fast", 1.6e-2);
  const MatrixUnit* unit = available_matrix_unit();
  if (unit && isa.decode_tiles) {
    linear_by_tiles(w, isa, *unit, true, x.data(), F32, in, m, nullptr, y.data(), 2);
    expect("tiles", 2e-5);
  }
  const size_t stride = (size_t)w.words * 32;
  std::vector<float> decoded((rows + kMaxBlockRows) * stride);
  decode(w, isa, 0, (w.total_tiles + w.tiles - 1) / w.tiles, F32, decoded.data(), 2);
  double worst = 0;
  for (int o = 0; o < out; o++)
    for (int i = 0; i < in; i++)
      worst = std::fmax(worst, std::fabs(decoded[o * stride + i] - dense[(size_t)o * in + i]));
  if (!(worst < 1e-5)) {
    printf("%s decode: worst error %.2e\n", isa.name, worst);
    failures++;
  }
  return failures;
}

// One flattened layer of static step, with high columns and none; integers, so nothing may differ.
int check_flat(const FlatLevel& level, int out, int in, int bits, int m) {
  const int high = in > 100 ? kFlatColumns : 0;
  const int columns = high + (in + kFlatColumns - 1) / kFlatColumns * kFlatColumns;
  const int words = (in * bits + 31) / 32, others = columns - in, most = (1 << (bits - 1)) - 1;
  std::vector<int> weight((size_t)out * in);
  std::vector<uint32_t> digits((size_t)out * words);
  for (int o = 0; o < out; o++)
    for (int i = 0; i < in; i++) {
      const int w = (int)(random_bits() % (2 * most + 1)) - most;
      weight[(size_t)o * in + i] = w;
      digits[(size_t)o * words + i * bits / 32] |= ((uint32_t)w & ((1u << bits) - 1))
                                                   << (i * bits % 32);
    }
  // With high columns, every seventh channel has two digits.
  std::vector<float> limit(in, 127.0f), scale(out), x((size_t)m * in), y((size_t)m * out);
  std::vector<uint32_t> mask(in, 0x7fffffff);
  std::vector<int32_t> wide, source(others, -1), piece(others, 0), origin(columns, -1);
  for (int i = 0; i < in; i++) {
    origin[high + i] = i;
    if (high && i % 7 == 0 && wide.size() < kFlatColumns) {
      const size_t at = wide.size();
      origin[at] = source[at] = i, piece[at] = kFlatHigh;
      limit[i] = 127 * 255 + 127, mask[i] = 0;
      wide.push_back(i);
    }
  }
  for (float& s : scale) s = uniform(0.001f, 0.01f);
  const float step = 0.01f;
  for (size_t i = 0; i < x.size(); i++) x[i] = uniform(-0.02f, 0.02f) * limit[i % in];

  std::vector<uint8_t> data(((size_t)out + 15) / 16 * 16 * columns * bits / 8);
  const FlatWeight w = {data.data(), scale.data(), out, bits, columns, high};
  const FlatInput input = {in, columns, high, limit.data(), nullptr, &step, 127.0f, mask.data(),
                           wide.data(), (int)wide.size(), wide.data(), (int)wide.size(),
                           source.data(), piece.data(), columns - high - in};
  flat_prepare(w, digits.data(), words, origin.data(), 2);
  std::vector<uint32_t> back(digits.size());
  flat_restore(w, back.data(), words, in, 2);
  int failures = back != digits;
  flat_linear(level, w, input, x.data(), F32, in, m, nullptr, y.data(), 8, 2);
  for (int r = 0; r < m; r++)
    for (int o = 0; o < out; o++) {
      int64_t sum = 0;
      for (int i = 0; i < in; i++) {
        const float q = std::nearbyint(x[(size_t)r * in + i] / step);
        sum += (int64_t)std::fmax(std::fmin(q, limit[i]), -limit[i]) * weight[(size_t)o * in + i];
      }
      const volatile float factor = step * scale[o];
      failures += y[(size_t)r * out + o] != (float)sum * factor;
    }
  if (failures)
    printf("flat %s: %dx%d, %d bits, %d rows: %d differ\n", level.name, out, in, bits, m, failures);
  return failures != 0;
}

}  // namespace

int main() {
  const Isa* levels[kIsaCount];
  const int count = available_levels(levels);
  int failures = 0, checks = 0;
  for (int l = 0; l < count; l++) {
    for (int bits = 1; bits <= kMaxBits; bits++)
      for (int group : {32, 96, 128, 256, 1 << 20})
        for (int shape = 0; shape < 3; shape++) {
          const int out = shape == 0 ? 1 : shape == 1 ? 37 : 70, in = shape == 2 ? 300 : 416;
          failures += check(*levels[l], out, in, bits, group, bits % 2 == 0, shape == 1 ? 5 : 2);
          checks++;
        }
    printf("%s checked\n", levels[l]->name);
  }
  FlatLevel flat[kFlatLevelCount];
  const int flat_count = available_flat_levels(flat);
  for (int l = 0; l < flat_count; l++) {
    for (int bits : {4, 8})
      for (int in : {1, 64, 70, 333})
        for (int m : {1, 3, 7, 16, 37}) {
          failures += check_flat(flat[l], in == 64 ? 16 : 37, in, bits, m);
          checks++;
        }
    printf("flat %s checked\n", flat[l].name);
  }
  printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
