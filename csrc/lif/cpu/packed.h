// Spikes as bits.
#pragma once

#include <cstdint>

namespace iirsnn {

// n spikes, 0, 1 or NaN -> bits, 8 bytes for 64 of them, the last ones 0; true where one was NaN.
template <typename scalar_t>
bool pack_row(const scalar_t* s, int n, uint8_t* bits);

}  // namespace iirsnn
