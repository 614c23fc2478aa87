#include "simd/capability.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "simd/versions.h"

#if defined(IIRSNN_AVX2)
#include <cpuid.h>
#endif

namespace iirsnn {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};

#if defined(IIRSNN_AVX512)
constexpr Capability kCompiled = kAvx512;
#elif defined(IIRSNN_AVX2)
constexpr Capability kCompiled = kAvx2;
#else
constexpr Capability kCompiled = kPortable;
#endif

#if defined(IIRSNN_AVX2)
bool has_f16c() {  // __builtin_cpu_supports of clang does not know it
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

Capability processor_capability() {
#if defined(IIRSNN_AVX2)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && has_f16c();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) return avx512 ? kAvx512 : kAvx2;
#endif
  return kPortable;
}

Capability best_capability() { return std::min(processor_capability(), kCompiled); }

Capability parse(const std::string& name, const char* from) {
  const Capability best = best_capability();
  for (int level = kPortable; level <= best; ++level) {
    if (name == kNames[level]) return Capability(level);
  }
  const char* const limit = best < processor_capability() ? " as compiled" : " on this processor";
  throw std::invalid_argument(std::string(from) + ": expected portable, avx2 or avx512, at most " + kNames[best] +
                              limit + ", got '" + name + "'");
}

std::atomic<Capability>& chosen() {
  static std::atomic<Capability> chosen = [] {
    const char* asked = std::getenv("IIRSNN_CPU_CAPABILITY");
    return asked && *asked ? parse(asked, "IIRSNN_CPU_CAPABILITY") : best_capability();
  }();
  return chosen;
}

}  // namespace

Capability capability() { return chosen().load(std::memory_order_relaxed); }
const char* cpu_capability() { return kNames[capability()]; }
const char* compiled_capability() { return kNames[kCompiled]; }
void set_cpu_capability(const char* name) { chosen() = parse(name, "cpu capability"); }

}  // namespace iirsnn
