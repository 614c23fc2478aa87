// Sums in double of numbers that come many at once.
#pragma once

#include "simd/lanes.h"

namespace iirsnn {

template <int kBytes>
using Sums = Lanes<double, kBytes, 64>;  // eight

// Floats as doubles, which GCC converts in halves through memory.
template <int kBytes>
IIRSNN_INLINE Register<double, kBytes> doubles_of(const Register<float, kBytes / 2>& floats) {
#if defined(__x86_64__) && !defined(__clang__)
  if constexpr (kBytes > 16) {
    Register<double, kBytes> doubles;
    asm("vcvtps2pd %1, %0" : "=v"(doubles) : "v"(floats));
    return doubles;
  }
#endif
  return __builtin_convertvector(floats, Register<double, kBytes>);
}
template <int kHalf, int kBytes>
IIRSNN_INLINE Register<double, kBytes> doubles_of(const Register<float, kBytes>& floats) {
  constexpr int kCount = kBytes / int(sizeof(double));
  constexpr auto kLanes = std::make_integer_sequence<int, kCount>();
  return doubles_of<kBytes>(part_of<kHalf * kCount, Register<float, kBytes / 2>>(floats, kLanes));
}

// 64 bytes of floats are folded to eight, lane i and lane i + 8.
template <int kBytes>
IIRSNN_INLINE void add_folded(Sums<kBytes>& sums, const Register<float, kBytes>* r) {
  if constexpr (kBytes == 64) {
    using Half = Register<float, 32>;
    constexpr auto kLanes = std::make_integer_sequence<int, 8>();
    const Half folded = part_of<0, Half>(r[0], kLanes) + part_of<8, Half>(r[0], kLanes);
    sums.r[0] = sums.r[0] + doubles_of<kBytes>(folded);
  } else {
    constexpr int kFolded = 32 / kBytes;
    IIRSNN_EACH_REGISTER(kFolded, {
      const auto folded = r[k] + r[k + kFolded];
      sums.r[2 * k] = sums.r[2 * k] + doubles_of<0, kBytes>(folded);
      sums.r[2 * k + 1] = sums.r[2 * k + 1] + doubles_of<1, kBytes>(folded);
    })
  }
}

// One order on every instruction set: 64 bytes of numbers after the other.
template <int kBytes, int kTotal>
IIRSNN_INLINE void add_up(Sums<kBytes>& sums, const Lanes<float, kBytes, kTotal>& numbers) {
  IIRSNN_EACH_REGISTER(kTotal / 64, add_folded<kBytes>(sums, numbers.r + k * (64 / kBytes)))
}
template <int kBytes, int kTotal>
IIRSNN_INLINE void add_up(Sums<kBytes>& sums, const Lanes<double, kBytes, kTotal>& numbers) {
  constexpr int kCount = Sums<kBytes>::kRegisters;
  IIRSNN_EACH_REGISTER(kTotal / kBytes, sums.r[k % kCount] = sums.r[k % kCount] + numbers.r[k])
}

}  // namespace iirsnn
