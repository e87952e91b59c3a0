#pragma once

#include "kernels.h"

namespace lutra {

// The levels that this build has and this machine can run, best first; returns their number.
int available_levels(const Isa* levels[kIsaCount]);

// The matrix unit of this machine, or null.
const MatrixUnit* available_matrix_unit();

}  // namespace lutra
