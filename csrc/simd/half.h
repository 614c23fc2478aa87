// float16 and bfloat16 as bits. Integer arithmetic only, so that every instruction set vectorises it alike.
#pragma once

#include "simd/scalar.h"

namespace iirsnn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

IIRSNN_INLINE float to_acc(float x) { return x; }
IIRSNN_INLINE double to_acc(double x) { return x; }

IIRSNN_INLINE float to_acc(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

IIRSNN_INLINE float to_acc(Half x) {
  const uint32_t size = x.bits & 0x7fffu, sign = uint32_t(x.bits & 0x8000u) << 16;
  uint32_t normal = (size << 13) + (112u << 23);                  // exponent bias 15 -> 127
  normal += size >= 0x7c00u ? 112u << 23 : 0u;                    // infinity, NaN: all ones again
  const float tiny = bit_cast<float>(size + 0x3f000000u) - 0.5f;  // 0.5 has a last place of 2^-24, a subnormal's unit
  return bit_cast<float>((size < 0x0400u ? bit_cast<uint32_t>(tiny) : normal) | sign);
}

template <typename scalar_t>
struct Convert;

template <>
struct Convert<float> {
  using acc_t = float;
  static IIRSNN_INLINE float round(float x) { return x; }
  static IIRSNN_INLINE float spike(float s) { return s; }
};

template <>
struct Convert<double> {
  using acc_t = double;
  static IIRSNN_INLINE double round(double x) { return x; }
  static IIRSNN_INLINE double spike(double s) { return s; }
};

template <>
struct Convert<BFloat16> {
  using acc_t = float;
  static IIRSNN_INLINE BFloat16 round(float x) {  // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t(x == x ? rounded : 0x7fc0u)};
  }
  static IIRSNN_INLINE BFloat16 spike(float s) {  // 0, 1 and NaN need no rounding
    return {uint16_t(bit_cast<uint32_t>(s) >> 16)};
  }
};

template <>
struct Convert<Half> {
  using acc_t = float;
  static IIRSNN_INLINE Half round(float x) {  // to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
    uint32_t result = size < 0x38800000u ? tiny : normal;  // below 2^-14: subnormal
    result = size >= 0x477ff000u ? 0x7c00u : result;       // 65520 and up
    result = size > 0x7f800000u ? 0x7e00u : result;        // NaN
    return {uint16_t(result | sign)};
  }
  static IIRSNN_INLINE Half spike(float s) {
    return {uint16_t(s == s ? bit_cast<uint32_t>(s) >> 13 & 0x3c00u : 0x7e00u)};
  }
};

}  // namespace iirsnn
