// AVX-512 with VBMI, VNNI and GFNI: Ice Lake, Sapphire Rapids, Zen 4 and later.
#define LUTRA_VNNI 1
#include "avx512.inc"

namespace lutra {
const Isa* const kAvx512Vnni = &isa;
}
