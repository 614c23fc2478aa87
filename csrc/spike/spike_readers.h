// Where the nonzeros of an input are: of bits, counts and real numbers.
#pragma once

#include "simd/memory.h"
#include "simd/registers.h"
#include "spike/spike.h"

namespace iirsnn::sparse {

struct BitsReader {
  static constexpr bool kValues = false;
  const uint64_t* data;
  int64_t words;
  IIRSNN_INLINE BitsReader(const Source& source, int64_t channels)
      : data(static_cast<const uint64_t*>(source.data)), words(ceil_div(channels, kWord)) {}
  // Bit i: channel first + i of a position is not zero; count <= 64.
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const uint64_t* at = data + position * words + first / kWord;
    const int shift = first % kWord;
    uint64_t bits = *at >> shift;
    if (shift && shift + count > kWord) bits |= at[1] << (kWord - shift);
    return count < kWord ? bits & ((uint64_t(1) << count) - 1) : bits;
  }
  IIRSNN_INLINE float value(int64_t, int64_t) const { return 1.0f; }
};

struct CountsReader {
  static constexpr bool kValues = true;
  const uint8_t* data;
  const float* table;
  int64_t channels;
  IIRSNN_INLINE CountsReader(const Source& source, int64_t channels)
      : data(static_cast<const uint8_t*>(source.data)), table(source.table), channels(channels) {}
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const uint8_t* at = data + position * channels + first;
    uint64_t bits = 0;
    for (int i = 0; i < count; i += 8) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, at + i, count - i < 8 ? count - i : 8);
      constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
      const uint64_t high = (((bytes & kLow) + kLow) | bytes) & ~kLow;  // the highest bit of each byte that is not 0
      bits |= ((high >> 7) * 0x0102040810204080u >> 56) << i;
    }
    return bits;
  }
  IIRSNN_INLINE float value(int64_t position, int64_t channel) const {
    return table[data[position * channels + channel]];
  }
};

struct RealsReader {
  static constexpr bool kValues = true;
  const float* data;
  int64_t channels;
  IIRSNN_INLINE RealsReader(const Source& source, int64_t channels)
      : data(static_cast<const float*>(source.data)), channels(channels) {}
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const float* at = data + position * channels + first;
    uint64_t bits = 0;
    for (int i = 0; i < count; i += kFloats<kBytes>)
      bits |= sign_bits<kBytes>(load_up_to<kBytes>(at + i, count - i) != 0.0f) << i;
    return bits;
  }
  IIRSNN_INLINE float value(int64_t position, int64_t channel) const { return data[position * channels + channel]; }
};

}  // namespace iirsnn::sparse
