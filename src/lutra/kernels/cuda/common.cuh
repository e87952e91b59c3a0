// Shared by the kernels of this folder: the layout of a prepared weight and one-line wrappers around
// PTX.
//
// A prepared weight is made of slices of 16 rows (a "tile") by 128 inputs; two slices are an item.
//
//   planes  [tiles][slices][BITS][32 lanes][2] words    lane = 4 g + t
//             word 0: row g,     inputs 32 t .. 32 t + 31 of the slice
//             word 1: row g + 8, the same inputs
//           bit b of a word is input b of its 32; 1 is +1, 0 is -1
//   scales  [tiles][groups][8 g][SLOTS][2]              the last index is row g, row g + 8
//           slots 0 .. SLOTS-2 are alphas (all planes, or only plane 0 if UNIFORM), the last the offset
//
// Words 0 and 1 are, unchanged, the A operand of a binary tensor-core product (m16n8k128) and, one bit
// field at a time, those of the fp16 ones. Rows past the matrix and inputs past a row have alpha = 0,
// offset = 0. A group is GROUP inputs; GROUP = 256 stands for any multiple of 256 (and one per row):
// then item i reads group i / items_per_group.
//
// Compile-time parameters (-D): BITS 1..8, GROUP 32|64|128|256, UNIFORM 0|1, SCALE_FLOAT 0|1 (float or
// half scales), X_BF16 0|1 (bf16 or half activations).

#include "basics.cuh"

constexpr int SLOTS = (UNIFORM ? 1 : BITS) + 1;
constexpr int ITEM_INPUTS = 256, TILE_ROWS = 16;
constexpr int ITEM_GROUPS = ITEM_INPUTS / GROUP;             // groups that one item reads
constexpr int SPLITS = GROUP < 128 ? 128 / GROUP : 1;        // groups in a slice of 128
constexpr int SCALE_SIZE = SCALE_FLOAT ? 4 : 2;
constexpr int SLICE_BYTES = BITS * 256;                      // planes of one slice
constexpr int PLANE_BYTES = 2 * SLICE_BYTES;                 // planes of one item
constexpr int SCALE_BYTES = ITEM_GROUPS * 8 * SLOTS * 2 * SCALE_SIZE;

// Activations and outputs: half or bf16.
DEVICE float x_to_float(u16 v) { return X_BF16 ? bf16_to_float(v) : half_to_float(v); }
DEVICE u16 float_to_x(float f) { return X_BF16 ? float_to_bf16(f) : float_to_half(f); }

// The pair (row g, row g + 8) of one slot of the scales.
DEVICE float2 scale_pair(const char* scales, int index) {
  if (SCALE_FLOAT) return ((const float2*)scales)[index];
  const u32 pair = ((const u32*)scales)[index];
  return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16)));
}

DEVICE u64 evict_first_policy() {  // weights are read once; keep activations in L2
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void copy16_async(u32 shared, const void* global, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
               :: "r"(shared), "l"(global), "l"(policy) : "memory");
}
