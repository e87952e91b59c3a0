// The AVX2 level of flat.h. Two tiles of 4-bit weights would need more than 16 registers.
#define LUTRA_PAIRS_OF_FOUR false
#include "flat_ymm.inc"

namespace lutra {
namespace {

const FlatIsa isa = {"avx2", &kAvx2, 2, 4, quantize, multiply, finish};

}  // namespace

const FlatIsa* const kFlatAvx2 = &isa;

}  // namespace lutra
