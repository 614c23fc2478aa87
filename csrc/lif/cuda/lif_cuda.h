// LIF forward and backward on CUDA: one launch over all timesteps.
//
// Moved per neuron, in elements of x (v0, v and their gradients only when given or asked for, one acc each):
//   forward   T = 1: 1 read, 1 written     T: T read, T written       packed: T / 8 bytes written instead
//   backward  T = 1: 2 read, 1 written     T <= 8: 2T read, T written
//             T > 8: the T - 8 or more timesteps before the last segment are read once more, and each segment but the
//             first and the last leaves one membrane (acc) in the workspace. Storing them all in forward would cost
//             every forward, also those without a backward; recomputing from t = 0 would read x T / 8 times.
// A current or gradient that is the same at every timestep (stride 0) is read once, backward once a segment of 8.
//
// A thread owns the neurons of a packet, 16 bytes where shared memory allows, and asks for all packets of a segment
// before it needs the first: forward into registers, backward into shared memory (backward.h). What hides the latency
// of memory is bytes in flight, not threads: 32 KiB or more on each multiprocessor.
//
// The launchers launch on the current device and `stream` (a cudaStream_t), allocate nothing, never synchronise, and
// throw std::runtime_error when a launch fails. dtype: all of DType.
#pragma once

#include "lif/lif.h"

namespace iirsnn {

void lif_forward_cuda(const LifForward& args, void* stream);  // with args.bits: packed, NaN is written as 0
void lif_backward_cuda(const LifBackward& args, void* stream);
// Bytes: sums for parameter gradients, and one membrane per segment but the first and the last of T > 16. All pointers
// of args but workspace and counters must be set.
int64_t lif_backward_workspace_cuda(const LifBackward& args);
int64_t lif_backward_counters_cuda(const LifBackward& args);
// bits [timesteps, packed_bytes(neurons)] -> s [timesteps, neurons] of dtype, 0 or 1
void unpack_spikes_cuda(const uint8_t* bits, void* s, DType dtype, int64_t timesteps, int64_t neurons, void* stream);

}  // namespace iirsnn
