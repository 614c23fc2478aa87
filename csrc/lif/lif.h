// What a LIF kernel is given, on any device: raw pointers and sizes. lif_torch.cpp fills these in after its checks.
//
// The kernel walks the N neurons of a timestep in memory order. Neuron n of timestep t is at
// x[t * x_stride_t + n]; everything that goes out is dense, at [t * N + n]. Its channel is (n / inner) % channels.
// "acc" is float, or double when x is double.
#pragma once

#include <cstdint>

#include "lif/lif_step.h"

namespace iirsnn {

enum class DType : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

struct LifShape {
  DType dtype;
  int64_t timesteps;   // T >= 1
  int64_t neurons;     // N >= 1, one timestep
  int64_t x_stride_t;  // elements; 0: the same current at every timestep
  int64_t channels;    // 1, or C
  int64_t inner;       // neurons in a row, in memory, that share a channel
};

struct LifForward {
  LifShape shape;
  Reset reset;
  double v_reset;
  const void* x;
  const void* threshold;  // [channels] acc
  const void* leak;       // [channels] acc
  const void* v0;         // [N] acc, or null: 0
  void* s;                // [T, N] like x; null when bits is given
  uint8_t* bits;          // [T, 8 * ceil(N / 64)], or null; neuron 8k + j of a timestep is bit j of its byte k
  void* v;                // [N] acc, or null: not wanted
};

struct LifBackward {
  LifShape shape;
  Reset reset;
  double v_reset;
  bool detach_reset;
  Surrogate surrogate;
  double surrogate_scale;
  const void* grad_s;       // like x
  int64_t grad_s_stride_t;  // N, or 0: the same gradient at every timestep
  const void* grad_v;       // [N] acc, or null: 0
  const void* x;
  const void* threshold;
  const void* leak;
  const void* v0;        // or null
  void* grad_x;          // [T, N] like x
  void* grad_threshold;  // [channels] acc, or null: parameter gradients not wanted (both or neither)
  void* grad_leak;       // [channels] acc, or null
  void* grad_v0;         // [N] acc, null when v0 is
  void* workspace;       // *_workspace() bytes
  uint32_t* counters;    // CUDA, with parameter gradients: lif_backward_counters_cuda() of them, 0 and left at 0
};

IIRSNN_INLINE constexpr int64_t packed_bytes(int64_t neurons) { return (neurons + 63) / 64 * 8; }

}  // namespace iirsnn
