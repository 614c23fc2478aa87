// Surrogate derivatives f(z) = ds/dz at z = h / threshold - 1. Plain C++, the same bits on host and device.
#pragma once

#include "simd/scalar.h"

namespace iirsnn {

enum class Surrogate : int { triangle = 0, atan = 1, sigmoid = 2, fast_sigmoid = 3, boxcar = 4 };

// exp(y) for y <= 0: y = n ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial in r and 2^n put into the exponent.
// Our own because libm's does not vectorise and differs between host and device. Relative error below 2 ulp;
// an exponent below the normal numbers is clamped there. NaN stays NaN.
template <typename acc_t>
struct ExpTraits;
template <>
struct ExpTraits<float> {
  static constexpr float kLowest = -87.0f, kRound = 12582912.0f;  // kRound = 1.5 * 2^23
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr double kLast = 1.0 / 5040;  // 1 / kDegree!
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
};
template <>
struct ExpTraits<double> {
  static constexpr double kLowest = -708.0, kRound = 6755399441055744.0;  // kRound = 1.5 * 2^52
  static constexpr double kLn2High = 0.693145751953125, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLast = 1.0 / 6227020800;
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
};

template <typename acc_t>
IIRSNN_INLINE acc_t exp_negative(acc_t y) {
  using Traits = ExpTraits<typename Number<acc_t>::type>;
  using bits_t = typename Number<acc_t>::bits_t;
  const acc_t kLog2e = acc_t(1.44269504088896340736), kRound = acc_t(Traits::kRound);
  y = select(y < acc_t(Traits::kLowest), acc_t(Traits::kLowest), y);
  const acc_t shifted = add(mul(y, kLog2e), kRound);
  const acc_t n = sub(shifted, kRound);
  const acc_t r = sub(sub(y, mul(n, acc_t(Traits::kLn2High))), mul(n, acc_t(Traits::kLn2Low)));
  acc_t p = acc_t(0);
  double coefficient = Traits::kLast;  // 1 / k!, folded by the compiler
#if defined(__CUDA_ARCH__)
#pragma unroll
#elif !defined(__CUDACC__)
#pragma GCC unroll 16
#endif
  for (int k = Traits::kDegree; k >= 0; --k) {
    p = k == Traits::kDegree ? acc_t(coefficient) : add(mul(p, r), acc_t(coefficient));
    coefficient *= k;
  }
  const bits_t exponent = bit_cast<bits_t>(shifted) - bit_cast<bits_t>(kRound) + bits_t(Traits::kBias);
  return mul(p, bit_cast<acc_t>(exponent << Traits::kMantissa));
}

template <typename acc_t>
struct Ratio {
  acc_t numerator, denominator;
};

// The surrogates that divide, as what they divide: on a GPU they share one division.
template <Surrogate kSurrogate, typename acc_t>
IIRSNN_INLINE Ratio<acc_t> surrogate_ratio(acc_t z, acc_t a) {
  const acc_t one = acc_t(1);
  if constexpr (kSurrogate == Surrogate::atan) {
    const acc_t y = mul(mul(a, acc_t(1.57079632679489661923)), z);
    return {mul(a, acc_t(0.5)), add(one, mul(y, y))};
  } else if constexpr (kSurrogate == Surrogate::sigmoid) {
    const acc_t e = exp_negative(-mul(a, magnitude(z)));  // sig (1 - sig) = e / (1 + e)^2, even in z
    const acc_t d = add(one, e);
    return {mul(a, e), mul(d, d)};
  } else {
    static_assert(kSurrogate == Surrogate::fast_sigmoid, "triangle and boxcar do not divide");
    const acc_t d = add(one, mul(a, magnitude(z)));
    return {one, mul(d, d)};
  }
}

// z: distance to the threshold in thresholds; a: the surrogate's scale, > 0. Comparisons let NaN through.
template <Surrogate kSurrogate, typename acc_t>
IIRSNN_INLINE acc_t surrogate(acc_t z, acc_t a) {
  if constexpr (kSurrogate == Surrogate::triangle) {
    return mul(a, positive(sub(acc_t(1), magnitude(z))));
  } else if constexpr (kSurrogate == Surrogate::boxcar) {
    return select(magnitude(z) <= a, div(acc_t(0.5), a), acc_t(0));
  } else {
    const Ratio<acc_t> ratio = surrogate_ratio<kSurrogate>(z, a);
    return div(ratio.numerator, ratio.denominator);
  }
}

}  // namespace iirsnn
