// Runs every CPU kernel on pseudo-random numbers and prints a line a case: its name and a hash of the bits that came
// out. Builds of any compiler, for any instruction set, print the same, by any number of THREADS.
#include "driver.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "simd/capability.h"

namespace iirsnn::native {

void print(const std::string& name, const Hash& hash) {
  std::printf("%s %016" PRIx64 "\n", name.c_str(), hash.value());
}

int threads() {
  static const char* const text = std::getenv("THREADS");
  static const int count = text ? std::max(std::atoi(text), 1) : 1;
  return count;
}

}  // namespace iirsnn::native

int main() {
  using namespace iirsnn::native;
  try {
    std::fprintf(stderr, "%s\n", iirsnn::cpu_capability());
    lif_cases();
    batch_norm_cases();
    event_cases();
    spike_cases();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
}
