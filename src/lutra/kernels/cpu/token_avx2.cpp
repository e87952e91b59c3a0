#include "token.inc"

namespace lutra {
const TokenOps* const kTokenAvx2 = &ops;
}
