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

Capability best_capability() {
  const Capability processor = processor_capability();
  if (processor < kLowestCompiled) {
    throw std::runtime_error(std::string("iirsnn: expected kernels for ") + kNames[processor] +
                             ", which this processor has, got some for " + kNames[kLowestCompiled] +
                             " alone; compile anew (IIRSNN_CAPABILITIES=usable)");
  }
  return std::min(processor, kHighestCompiled);
}

Capability parse(const std::string& name, const char* from) {
  const Capability best = best_capability();
  for (int level = kLowestCompiled; level <= best; ++level) {
    if (name == kNames[level]) return Capability(level);
  }
  const std::string most = kNames[best];
  const std::string range = kLowestCompiled == kHighestCompiled ? most + " alone as compiled"
                            : best < processor_capability()     ? "at most " + most + " as compiled"
                                                                : "at most " + most + " on this processor";
  throw std::invalid_argument(std::string(from) + ": expected portable, avx2 or avx512, " + range + ", got '" + name +
                              "'");
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
const char* lowest_capability() { return kNames[kLowestCompiled]; }
const char* compiled_capability() { return kNames[kHighestCompiled]; }
void set_cpu_capability(const char* name) { chosen() = parse(name, "cpu capability"); }

}  // namespace iirsnn
