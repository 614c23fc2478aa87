// Vectors of 16 floats read from and written to what the spike layers keep.
#pragma once

#include "simd/half.h"
#include "simd/sparse.h"

namespace iirsnn::sparse {

typedef uint16_t LooseHalves __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), may_alias));

IIRSNN_INLINE Floats load16(const float* from) { return *reinterpret_cast<const LooseFloats*>(from); }
IIRSNN_INLINE Floats load16(const BFloat16* from) {
  const Halves halves = *reinterpret_cast<const LooseHalves*>(from);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}
template <typename scalar_t>
IIRSNN_INLINE Floats load_some(const scalar_t* from, int count) {  // zeros beyond `count`
  alignas(64) float values[16] = {};
  for (int i = 0; i < count; ++i) values[i] = to_acc(from[i]);
  return *reinterpret_cast<const Floats*>(values);
}
template <typename scalar_t>
IIRSNN_INLINE Floats load_up_to(const scalar_t* from, int64_t count) {
  return count >= 16 ? load16(from) : load_some(from, int(count));
}

IIRSNN_INLINE void store16(Floats v, float* to) { *reinterpret_cast<LooseFloats*>(to) = v; }
IIRSNN_INLINE void store16(Floats v, BFloat16* to) {
  const Words bits = (Words)v;
  Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (v == v) ? rounded : Words{} + 0x7fc0u;
  *reinterpret_cast<LooseHalves*>(to) = __builtin_convertvector(rounded, Halves);
}
template <typename scalar_t>
IIRSNN_INLINE void store_up_to(Floats v, scalar_t* to, int64_t count) {
  if (count >= 16) return store16(v, to);
  alignas(64) float values[16];
  *reinterpret_cast<Floats*>(values) = v;
  for (int i = 0; i < count; ++i) to[i] = Convert<scalar_t>::round(values[i]);
}

// rows[i][j] <-> rows[j][i]: four times, the upper and the lower half are interleaved.
IIRSNN_INLINE void transpose16(Floats* rows) {
  constexpr Ints kLow = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Ints kHigh = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  for (int round = 0; round < 4; ++round) {
    Floats next[16];
    for (int i = 0; i < 8; ++i) {
#if defined(__clang__)
      next[2 * i] =
          __builtin_shufflevector(rows[i], rows[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], kLow);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], kHigh);
#endif
    }
    for (int i = 0; i < 16; ++i) rows[i] = next[i];
  }
}

}  // namespace iirsnn::sparse
