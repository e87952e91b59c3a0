// Dense fp32 rows of a prepared weight, for a library matrix product with fp32 activations.
//
// One warp expands one slice (16 rows x 128 inputs). Grid: blocks of 256 threads, as many as cover
// (tile_end - tile_begin) * slices warps.

#include "slice_levels.cuh"

struct Arguments {
  const char* planes;      // see common.cuh
  const char* scales;
  float* dense;            // [(tile_end - tile_begin) * 16][in_features]
  int in_features;
  int tile_begin, tile_end, items, groups, items_per_group;
};

extern "C" __global__ void __launch_bounds__(256) float_expand(const __grid_constant__ Arguments p) {
  const int lane = threadIdx.x & 31, t = lane & 3, g = lane >> 2;
  const int slices = p.items * 2;
  const long long index = (long long)blockIdx.x * 8 + (threadIdx.x >> 5);
  const int tile = (int)(index / slices), slice = (int)(index % slices);
  if (tile >= p.tile_end - p.tile_begin) return;
  wait_for_previous_kernel();
  const int input = slice * 128 + t * 32;
  if (input >= p.in_features) return;
  const SliceLevels levels(p.planes, p.scales, p.tile_begin + tile, slice, slices, p.groups, p.items_per_group, input);
  float* rows = p.dense + (long long)(tile * 16 + g) * p.in_features + input;
  const int inside = min(32, p.in_features - input);
#pragma unroll 4
  for (int b = 0; b < 32; b++) {
    const float2 level = levels.pair(b);
    if (b < inside) {
      rows[b] = level.x;
      rows[8LL * p.in_features + b] = level.y;
    }
  }
}
