// Sizes of layers and windows.
#pragma once

// Before any header: one that is missing for such a processor would hide it.
#if defined(__SIZEOF_POINTER__) && __SIZEOF_POINTER__ != 8
#error "iirsnn: expected a 64-bit processor: sizes are 64-bit numbers"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "iirsnn: expected a little-endian processor: numbers and bits lie in memory as they do in a file"
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

#include "simd/memory.h"

namespace iirsnn::event {

struct Shape {
  int64_t channels, height, width;

  bool operator==(const Shape& other) const {
    return channels == other.channels && height == other.height && width == other.width;
  }
};

struct Pair {
  int64_t y, x;
};

struct Window {
  Pair kernel{1, 1}, stride{1, 1}, dilation{1, 1};
  Pair before{0, 0}, after{0, 0};  // zero padding at the top left and the bottom right
};

inline void check(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument(message);
}
inline void check(bool right, const char* message) {  // makes no string of it where all is right
  if (!right) throw std::invalid_argument(message);
}

}  // namespace iirsnn::event
