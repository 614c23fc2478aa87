// The chunks of a kernel on a CPU, over torch's threads.
#pragma once

#include <ATen/Parallel.h>

#include "lif/cpu/lif_cpu.h"

namespace iirsnn {

// f(first, last) of all chunks, of one without what at::parallel_for does around it.
template <typename F>
void for_chunks(const LifShape& shape, const F& f) {
  const int64_t chunks = lif_chunks_cpu(shape);
  if (chunks == 1) return f(0, 1);
  at::parallel_for(0, chunks, 1, f);
}

}  // namespace iirsnn
