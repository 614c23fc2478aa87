// Which instruction set runs, and functions compiled for each: the portable one alone with -DIIRSNN_PORTABLE_ONLY, all
// but AVX-512 with -DIIRSNN_NO_AVX512, and of these the highest alone with -DIIRSNN_HIGHEST_ALONE.
#pragma once

#include <type_traits>

#include "simd/capability.h"
#include "simd/lanes.h"

#if defined(__clang__)
#define IIRSNN_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#define IIRSNN_WIDE
#else
#define IIRSNN_VECTORIZE _Pragma("GCC ivdep")
#define IIRSNN_WIDE ",prefer-vector-width=512"
#endif

#if defined(__x86_64__) && !defined(IIRSNN_PORTABLE_ONLY)
#define IIRSNN_AVX2 __attribute__((target("avx2,f16c,bmi")))
#if !defined(IIRSNN_NO_AVX512)
#define IIRSNN_AVX512 __attribute__((target("bmi,avx512f,avx512bw,avx512vl,avx512dq" IIRSNN_WIDE)))
#endif
#endif

#if defined(__aarch64__) && !defined(__clang__)  // GCC would load whole rows ahead and spill the sums meanwhile
#define IIRSNN_PORTABLE __attribute__((optimize("no-schedule-insns")))
#else
#define IIRSNN_PORTABLE
#endif

namespace iirsnn {

#if defined(IIRSNN_AVX512)
constexpr Capability kHighestCompiled = kAvx512;
#elif defined(IIRSNN_AVX2)
constexpr Capability kHighestCompiled = kAvx2;
#else
constexpr Capability kHighestCompiled = kPortable;
#endif
#if defined(IIRSNN_HIGHEST_ALONE)
constexpr Capability kLowestCompiled = kHighestCompiled;
#else
constexpr Capability kLowestCompiled = kPortable;
#endif

// Loop::run<bytes of a register>, compiled for each instruction set; pick() is the one in force. Everything that run
// calls has to be inlined into it, lambdas included, or it is compiled for the lowest.
template <typename Loop, typename Signature>
struct Versions;
template <typename Loop, typename... Args>
struct Versions<Loop, void(Args...)> {
  IIRSNN_PORTABLE static void portable(Args... args) { Loop::template run<16>(args...); }
#if defined(IIRSNN_AVX2)
  IIRSNN_AVX2 static void avx2(Args... args) { Loop::template run<32>(args...); }
#endif
#if defined(IIRSNN_AVX512)
  IIRSNN_AVX512 static void avx512(Args... args) { Loop::template run<64>(args...); }
#endif
  static auto pick() {
    [[maybe_unused]] const Capability force = capability();
#if defined(IIRSNN_AVX512)
    if (force == kAvx512) return &avx512;
#endif
#if defined(IIRSNN_AVX2)
    if constexpr (kLowestCompiled <= kAvx2) {  // a version that nothing names is not compiled
      if (force == kAvx2) return &avx2;
    }
#endif
    if constexpr (kLowestCompiled == kPortable) return &portable;
    __builtin_unreachable();
  }
};
template <typename Loop>
auto version() {
  return Versions<Loop, decltype(Loop::template run<16>)>::pick();
}

template <typename Loop, typename... Args>
void run(Args... args) {
  version<Loop>()(args...);
}

}  // namespace iirsnn
