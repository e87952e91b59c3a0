#pragma once

#include "kernels.h"

namespace lutra {

// The levels that this build has and this machine can run, best first; returns their number.
int available_levels(const Isa* levels[kIsaCount]);

}  // namespace lutra
