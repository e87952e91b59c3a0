// Dense rows of a prepared weight, in the type of the activations, for a library matrix product.
//
// One warp expands one slice (16 rows x 128 inputs). Each value is summed in fp32 and rounded once.
// Grid: blocks of 256 threads, as many as cover (tile_end - tile_begin) * slices warps.

#include "slice_levels.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  u16* dense;              // [(tile_end - tile_begin) * 16][in_features]
  int in_features;
  int tile_begin, tile_end, items, groups, items_per_group;
};

DEVICE u32 pack(float lo, float hi) {
  return (u32)float_to_x(lo) | (u32)float_to_x(hi) << 16;
}

extern "C" __global__ void __launch_bounds__(256) dequantize(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x & 31, t = lane & 3, g = lane >> 2;
  const int slices = p.items * 2;
  const long long index = (long long)blockIdx.x * 8 + (threadIdx.x >> 5);
  const int tile = (int)(index / slices), slice = (int)(index % slices);
  if (tile >= p.tile_end - p.tile_begin) return;
  wait_for_previous_kernel();
  const int input = slice * 128 + t * 32;
  if (input >= p.in_features) return;
  const SliceLevels levels(p.planes, p.scales, p.tile_begin + tile, slice, slices, p.groups, p.items_per_group, input);
  const bool whole = input + 32 <= p.in_features && (p.in_features & 7) == 0;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u16* out = p.dense + (long long)(tile * 16 + half * 8 + g) * p.in_features + input;
#pragma unroll
    for (int part = 0; part < 4; part++) {
      float v[8];
#pragma unroll
      for (int b = 0; b < 8; b++) {
        const float2 level = levels.pair(part * 8 + b);
        v[b] = half ? level.y : level.x;
      }
      if (whole) {
        ((uint4*)out)[part] = make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
      } else {
#pragma unroll
        for (int b = 0; b < 8; b++)
          if (input + part * 8 + b < p.in_features) out[part * 8 + b] = float_to_x(v[b]);
      }
    }
  }
}
