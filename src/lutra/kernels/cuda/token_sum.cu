// Sum of a few kilobytes over GPUs of one host, each of which holds a part of the model.
//
// Every rank stores its values into the memory of every other one, each 16 bytes with 8 bytes of flags
// among them, and waits for theirs; a store of 8 bytes arrives as a whole, so a flag that has come says
// that its data has. That takes one way over the link and no barrier. The flag is the number of the
// call, counted on the device, so recorded launches can be replayed; two sets of buffers take turns,
// since a rank that is ahead can be so by one call at most. Values are added in the order of ranks, so
// all ranks get the same bits.
//
//   received  [2 turns][ranks][capacity] packets {values 0 1, flag, values 2 3, flag}
//   calls     a counter per block, zero at first
//
// Grid: ceil(packets / 256). Block: 256 threads.

#include "token.cuh"

struct SumArguments {
  const u16* x;
  u16* y;
  uint4* received[8];   // of every rank; that of this one is its own memory
  u32* calls;
  int rank, ranks, packets, capacity;
};

extern "C" __global__ void __launch_bounds__(256) token_sum(const __grid_constant__ SumArguments p) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const u32 call = p.calls[blockIdx.x] + 1;
  const long long turn = (long long)(call & 1) * p.ranks;
  if (i < p.packets) {
    const uint2 own = ((const uint2*)p.x)[i];
    for (int r = 0; r < p.ranks; r++)
      if (r != p.rank)
        asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};"
                     :: "l"(p.received[r] + (turn + p.rank) * p.capacity + i), "r"(own.x), "r"(call), "r"(own.y)
                     : "memory");
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    for (int r = 0; r < p.ranks; r++) {
      uint2 values = own;
      if (r != p.rank) {
        const uint4* packet = p.received[p.rank] + (turn + r) * p.capacity + i;
        u32 first, second;
        long long tries = 0;
        do {
          asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(values.x), "=r"(first), "=r"(values.y), "=r"(second) : "l"(packet) : "memory");
          if (++tries == 1ll << 28) asm volatile("trap;");   // minutes: the other rank is gone
        } while (first != call || second != call);
      }
      sum[0] += x_to_float((u16)values.x);
      sum[1] += x_to_float((u16)(values.x >> 16));
      sum[2] += x_to_float((u16)values.y);
      sum[3] += x_to_float((u16)(values.y >> 16));
    }
    uint2 out;
    out.x = (u32)float_to_x(sum[0]) | (u32)float_to_x(sum[1]) << 16;
    out.y = (u32)float_to_x(sum[2]) | (u32)float_to_x(sum[3]) << 16;
    ((uint2*)p.y)[i] = out;
  }
  __syncthreads();
  if (threadIdx.x == 0) p.calls[blockIdx.x] = call;
}
