// ds/dh of a block's membranes, by the surrogate.
#pragma once

#include "lif/cpu/channels.h"

namespace iirsnn {

// slopes[i] from membranes[i] of n neurons, whole vectors.
template <typename acc_t>
using SlopeRow = void (*)(const acc_t* membranes, const Parameters<acc_t>* parameters, acc_t scale, acc_t* slopes,
                          int n);
template <typename acc_t>
SlopeRow<acc_t> slope_row(Surrogate surrogate);  // of the instruction set in force

}  // namespace iirsnn
