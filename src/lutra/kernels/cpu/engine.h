// From whole tensors to kernels: layout, tables, threads. Every function checks nothing: its caller,
// the Python binding, has done so.
#pragma once

#include "kernels.h"

namespace lutra {

// Fills the derived fields of `w` (words, groups, tiles ...) for the level `isa`.
void complete(Weight& w, int group_size, const Isa& isa);

// Canonical tensors, planes [bits][out][words], scale [bits or 1][out][groups], offset
// [out][groups], to the layout of kernels.h (`w` points to the destination), and back.
void prepare(const Weight& w, const Isa& isa, const uint32_t* planes, const void* scale,
             const void* offset, int threads);
void restore(const Weight& w, const Isa& isa, uint32_t* planes, void* scale, void* offset,
             int threads);

// y[m][out] = x[m][in] @ w^T + bias by lookup tables. Strides in elements; bias float or null.
void linear(const Weight& w, const Isa& isa, Numerics numerics, const void* x, Dtype x_dtype,
            size_t x_stride, int m, const float* bias, void* y, int threads);

// The same on a matrix unit, for larger m: weights are decoded to bfloat16, activations rounded to
// it, sums are float. `split` keeps what the roundings left as second bfloat16 terms and adds their
// products, which makes it three times the work and as good as float. Needs isa.decode_tiles.
void linear_by_tiles(const Weight& w, const Isa& isa, const MatrixUnit& unit, bool split,
                     const void* x, Dtype x_dtype, size_t x_stride, int m, const float* bias,
                     void* y, int threads);

// Dense rows of blocks [begin, end) to dst, float or bfloat16, `words * 32` elements per row.
void decode(const Weight& w, const Isa& isa, int begin, int end, Dtype dtype, void* dst,
            int threads);

// Sum of 64-bit words by `threads` threads: how fast memory can be read.
uint64_t read_stream(const void* data, size_t bytes, int threads);

}  // namespace lutra
