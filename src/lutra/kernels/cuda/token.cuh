// What lies between the linear layers of a decoder block when one token per sequence is decoded:
// norms with the residual sum before them, the activation of the MLP, and attention with rotary
// embedding and the write to the key-value cache. One launch each, where torch takes about thirty.
//
// Values are rounded to the type of the activations where the modules of transformers round them, so
// that keys, values and norms are those of its own forward pass, bit for bit.

DEVICE float rounded(float f) { return x_to_float(float_to_x(f)); }

union Eight { uint4 words; u16 values[8]; };

// Sum over a block; `shared`, a float per warp, is for this call alone.
DEVICE float block_sum(float v, float* shared) {
  for (int s = 16; s; s >>= 1) v += __shfl_xor_sync(~0u, v, s);
  const int warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  if ((threadIdx.x & 31) == 0) shared[warp] = v;
  __syncthreads();
  float sum = 0.f;
  for (int w = 0; w < warps; w++) sum += shared[w];
  return sum;
}

// Blocks of a cluster write to each other's shared memory (from Hopper on; before, a cluster is a block).
DEVICE void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
DEVICE void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Address of the same shared variable in another block of the cluster.
DEVICE u32 address_in(const void* mine, int block) {
  u32 address = shared_address(mine);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(block));
#endif
  return address;
}
DEVICE void send(u32 address, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#endif
}
DEVICE void send(u32 address, float a, float b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" :: "r"(address), "f"(a), "f"(b) : "memory");
#else
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(address), "f"(a), "f"(b) : "memory");
#endif
}
