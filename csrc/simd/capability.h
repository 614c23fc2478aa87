// Which instruction set the CPU kernels use. All of them give the same bits.
#pragma once

namespace iirsnn {

enum Capability { kPortable, kAvx2, kAvx512 };

// The best of what was compiled that this processor runs, or what IIRSNN_CPU_CAPABILITY or set_cpu_capability asked
// for. The variable is read by the first call, which throws std::invalid_argument where it asks for more than there is:
// make that call outside any parallel region (Python makes it, by build_info, when it loads the extension). Where the
// processor has less than the least that was compiled it throws std::runtime_error.
Capability capability();

const char* cpu_capability();               // "portable", "avx2" or "avx512"
const char* lowest_capability();            // the lowest that was compiled
const char* compiled_capability();          // the highest that was compiled
void set_cpu_capability(const char* name);  // throws std::invalid_argument likewise

}  // namespace iirsnn
