// Shared by the flat kernels (8- and 4-bit integer products): one-line wrappers around PTX, besides those of
// `hopper.cuh`. NVRTC needs no include path: `nvrtc.py` puts included files in place itself.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef signed char s8;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16-bit floats: Y_BF16 chooses bf16 or half.
DEVICE u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE u16 float_to_bf16(float f) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }

// A bias of kind 1 half, 2 bf16, 3 float; 0 is none. Adding 0 to a product changes at most the sign of a 0.
DEVICE float bias_of(const void* bias, int kind, int i) {
  if (kind == 0) return 0.f;
  if (kind == 3) return ((const float*)bias)[i];
  const u16 v = ((const u16*)bias)[i];
  return kind == 2 ? bf16_to_float(v) : half_to_float(v);
}

// Programmatic dependent launch: nothing that an earlier kernel wrote may be read before the wait.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#include "hopper.cuh"

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
template <int REGISTERS> DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS> DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
