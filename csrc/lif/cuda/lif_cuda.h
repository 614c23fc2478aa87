// Launchers in lif_cuda.cu. They launch on the current device and `stream` (a cudaStream_t), allocate nothing, never
// synchronise, and throw std::runtime_error when a launch fails. dtype: all of DType.
#pragma once

#include "lif/lif.h"

namespace iirsnn {

void lif_forward_cuda(const LifForward& args, void* stream);  // with args.bits: packed, NaN is written as 0
void lif_backward_cuda(const LifBackward& args, void* stream);
// Bytes: sums for parameter gradients, and one membrane per segment but the first and the last of T > 16. All pointers
// of args but workspace must be set.
int64_t lif_backward_workspace_cuda(const LifBackward& args);
// bits [timesteps, packed_bytes(neurons)] -> s [timesteps, neurons] of dtype, 0 or 1
void unpack_spikes_cuda(const uint8_t* bits, void* s, DType dtype, int64_t timesteps, int64_t neurons, void* stream);

}  // namespace iirsnn
