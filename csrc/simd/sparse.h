// Loops over spikes compiled for several instruction sets, and the vectors of 512 bits that they share.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "lif/cpu/lif_cpu.h"

#if defined(__x86_64__)
#define IIRSNN_AVX2 __attribute__((target("avx2,bmi")))
#if defined(__clang__)
#define IIRSNN_AVX512 __attribute__((target("bmi,avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define IIRSNN_AVX512 __attribute__((target("bmi,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between inlined functions only
#endif

namespace iirsnn::sparse {

// 512 bits whatever the processor: the compiler splits them into what it has.
typedef float Floats __attribute__((vector_size(64), may_alias));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef int8_t Bytes16 __attribute__((vector_size(16), may_alias));

// Bit i of the result is lane i, each 0 or -1.
IIRSNN_INLINE uint64_t lanes16(Ints lanes) {
  const Bytes16 bytes = __builtin_convertvector(lanes, Bytes16);
  uint64_t halves[2];
  std::memcpy(halves, &bytes, sizeof(halves));
  uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {  // byte k keeps its bit k; the product adds all bytes up in the highest one
    bits |= (((halves[i] & 0x8040201008040201u) * 0x0101010101010101u) >> 56) << (8 * i);
  }
  return bits;
}

template <typename Loop, typename Signature>
struct Versions;
template <typename Loop, typename... Args>
struct Versions<Loop, void(Args...)> {
  static void portable(Args... args) { Loop::run(args...); }
#if defined(__x86_64__)
  IIRSNN_AVX2 static void avx2(Args... args) { Loop::run(args...); }
  IIRSNN_AVX512 static void avx512(Args... args) { Loop::run(args...); }
#endif
  static void run(Args... args) {
#if defined(__x86_64__)
    static const bool bmi = __builtin_cpu_supports("bmi");
    const std::string level = cpu_capability();
    if (level == "avx512" && bmi) return avx512(args...);
    if (level == "avx2" && bmi) return avx2(args...);
#endif
    portable(args...);
  }
};
template <typename Loop, typename... Args>
void run(Args... args) {
  Versions<Loop, decltype(Loop::run)>::run(args...);
}

}  // namespace iirsnn::sparse
