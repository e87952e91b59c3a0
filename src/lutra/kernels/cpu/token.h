// What lies between the linear layers of a block when one token per sequence is decoded: the norm with
// the residual sum before it, the gated activation, and attention that writes the new key and value.
// The memory is the caller's. Numbers are float or bfloat16; sums are float.
#pragma once

#include "kernels.h"

namespace lutra {

// Attention of one new token per sequence. Tensors are contiguous:
//   qkv     [batch][(heads + 2 kv_heads) * dim]
//   keys    [batch][kv_heads][capacity][dim], values the same; row `position` is written
//   cosine  [1 or batch][dim] (`rotary_stride` 0 or dim), sine the same; null: no rotary embedding
//   norms   [dim], of the queries' and keys' RMS norms; null: none
//   start   [batch], rows before it are padding
//   y       [batch][heads * dim]
struct TokenAttention {
  const void* qkv;
  const void* cosine;
  const void* sine;
  const void* query_norm;
  const void* key_norm;
  void* keys;
  void* values;
  const int32_t* start;
  void* y;
  int batch, heads, kv_heads, dim, rotary_stride;
  int64_t capacity, position;
  float scale, epsilon;
  Dtype dtype;
};

constexpr int kTokenLanes = 8;  // `features` is a multiple of it, `dim` of twice it
constexpr int kTokenMostDim = 512;

struct TokenOps {
  // sum = x + delta (null: x itself is the sum, and `sum` is not written), rounded to the dtype, and
  // y = weight * the sum over its root mean square, for rows of `features` numbers.
  void (*add_norm)(const void* x, const void* delta, const void* weight, void* sum, void* y,
                   int rows, int features, float epsilon, Dtype dtype);
  // y[r][i] = silu(x[r][i]) * x[r][features + i]
  void (*silu)(const void* x, void* y, int rows, int features, Dtype dtype);
  // The queries of one key head of one sequence. `scratch` has room for token_scratch floats.
  void (*attend)(const TokenAttention& a, int sequence, int kv_head, float* scratch);
};

extern const TokenOps* const kTokenAvx2;  // null where this build does not have it
extern const TokenOps* const kTokenPortable;

// Floats of scratch for `attend`.
size_t token_scratch(const TokenAttention& a);

// All heads, shared among threads where that is worth it.
void token_attention(const TokenOps& ops, const TokenAttention& a, int threads);

}  // namespace lutra
