// AVX-512 F, BW, DQ and VL without VBMI: Skylake-SP, Cascade Lake. `fast` is `exact` here.
#include "avx512.inc"

namespace lutra {
const Isa* const kAvx512Bw = &isa;
}
