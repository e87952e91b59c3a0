// The AVX-VNNI level of flat.h.
#define LUTRA_AVXVNNI 1
#define LUTRA_PAIRS_OF_FOUR true
#include "flat_ymm.inc"

namespace lutra {
namespace {

const FlatIsa isa = {"avxvnni", &kAvx2, 3, 4, quantize, multiply, finish};

}  // namespace

const FlatIsa* const kFlatAvxVnni = &isa;

}  // namespace lutra
