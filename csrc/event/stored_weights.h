// Weights as a file or a caller keeps them.
#pragma once

#include <cstdint>
#include <cstring>

#include "event/kernels.h"

namespace iirsnn::event {

// float32, bfloat16 or int8 numbers, aligned to a byte.
struct StoredWeights {
  const void* data;
  Precision stored = Precision::fp32;

  StoredWeights(const float* data) : data(data) {}
  StoredWeights(const void* data, Precision stored) : data(data), stored(stored) {}

  float operator[](int64_t i) const {
    if (stored == Precision::int8) return static_cast<const int8_t*>(data)[i];
    uint32_t bits = 0;
    if (stored == Precision::fp32) {
      std::memcpy(&bits, static_cast<const char*>(data) + 4 * i, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, static_cast<const char*>(data) + 2 * i, 2);
      bits = uint32_t(half) << 16;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

}  // namespace iirsnn::event
