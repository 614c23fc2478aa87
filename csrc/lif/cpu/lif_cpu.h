// CPU kernels over a range of chunks. A chunk is a run of neurons whose bounds depend on the shape alone, never on the
// number of threads: threads take chunks, and every chunk writes its own partial sums.
#pragma once

#include "lif/lif.h"

namespace iirsnn {

int64_t lif_chunks_cpu(const LifShape& shape);
int64_t lif_backward_workspace_cpu(const LifBackward& args);  // bytes; 0 without parameter gradients

// True when packed output met a NaN, which a bit cannot hold.
bool lif_forward_cpu(const LifForward& args, int64_t first_chunk, int64_t last_chunk);
void lif_backward_cpu(const LifBackward& args, int64_t first_chunk, int64_t last_chunk);
// Sums the chunks' partial sums, in order; after all chunks are done.
void lif_backward_finish_cpu(const LifBackward& args);
// Timesteps [first, last) of bits [T, packed_bytes(N)] -> s [T, N], 0 or 1.
void unpack_spikes_cpu(const uint8_t* bits, void* s, DType dtype, int64_t neurons, int64_t first, int64_t last);

}  // namespace iirsnn
