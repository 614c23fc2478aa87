// Sizes of layers and windows.
#pragma once

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

}  // namespace iirsnn::event
