// What every kernel of this folder starts from: names of types and one-line wrappers around PTX. No headers are
// included, so NVRTC needs no include path: `nvrtc.py` puts included files in place itself.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16-bit floats: half, or bf16.
DEVICE float half_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE u16 float_to_half(float f) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float bf16_to_float(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 float_to_bf16(float f) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }

DEVICE float divide(float a, float b) {   // within 2 units in the last place; b is no subnormal
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  return a * r;
}

DEVICE u32 load_word(u32 shared) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(shared));
  return v;
}
// Brings a value to the first cache.
DEVICE void touch(const float* p) {
  asm volatile("{ .reg .f32 v; ld.global.f32 v, [%0]; }" :: "l"(p));
}

// Results of four rows from `row` on, of which there are `rows`; y is where the first of them lies.
DEVICE void store_four(u16* y, const u16 (&out)[4], int row, int rows) {
  if (row + 4 <= rows && ((u64)y & 7) == 0) {
    *(uint2*)y = make_uint2((u32)out[0] | (u32)out[1] << 16, (u32)out[2] | (u32)out[3] << 16);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (row + i < rows) y[i] = out[i];
  }
}

DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
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
