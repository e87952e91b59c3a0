// Shared by the flat kernels (8- and 4-bit integer products).

#include "basics.cuh"
#include "hopper.cuh"

typedef signed char s8;

// BF16: bf16, else half.
template <bool BF16> DEVICE float to_float(u16 h) { return BF16 ? bf16_to_float(h) : half_to_float(h); }
template <bool BF16> DEVICE u16 rounded(float f) { return BF16 ? float_to_bf16(f) : float_to_half(f); }
template <bool BF16> DEVICE u32 rounded_pair(float low, float high) {
  u32 pair;
  if (BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// What a sum of products stands for. From 4-bit weights in the upper halves of bytes it is 16 times as large.
template <int BITS> DEVICE float dequantized(int sum, float step, float scale, float bias) {
  if (BITS == 4) sum >>= 4;
  return __fadd_rn(__fmul_rn((float)sum, __fmul_rn(step, scale)), bias);
}

// A bias of kind 1 half, 2 bf16, 3 float; 0 is none. Adding 0 to a product changes at most the sign of a 0.
DEVICE float bias_of(const void* bias, int kind, int i) {
  if (kind == 0) return 0.f;
  if (kind == 3) return ((const float*)bias)[i];
  const u16 v = ((const u16*)bias)[i];
  return kind == 2 ? bf16_to_float(v) : half_to_float(v);
}

DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

// More of the bulk copy engine.
DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
DEVICE void store_box(const TensorMap& map, int column, int row, u32 shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(&map), "r"(column), "r"(row), "r"(shared) : "memory");
}
DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
DEVICE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
DEVICE void shared_to_copy_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

DEVICE uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
// Four 8x8 tiles of 16-bit values, each stored transposed; lane 8 i + j gives the address of row j of tile i.
DEVICE void store_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
