// BatchNorm, with the statistics of its input, and LIF in one, on CUDA: two launches forward, two backward. The running
// statistics are written by the first.
//
// Moved per neuron and timestep, in elements of x:
//   forward   1 read for the statistics; 1 read, 1 written for the spikes
//   backward  2 read for the sums; 2 read, 1 written for grad_x
//             T > 8: the first pass reads the timesteps before the last segment of 8 once more and leaves a membrane
//             (float) per segment but the first, which the second pass starts from.
// The normalised current is computed in registers, from x, whenever it is needed, and rounded to the dtype of x, as it
// would be if it were written. An input or gradient that is the same at every timestep (stride 0) is read once a
// segment.
//
// The launchers launch on the current device and `stream` (a cudaStream_t), allocate nothing, never synchronise, and
// throw std::runtime_error when a launch fails. dtype: float32, float16, bfloat16.
#pragma once

#include "lif/lif.h"

namespace iirsnn {

struct BnLifCuda {
  LifShape shape;  // channels: C, also where threshold and leak have one element
  Reset reset;
  double v_reset;
  bool detach_reset;
  Surrogate surrogate;
  double surrogate_scale;
  const void* x;
  const float* mean;       // [C]
  const float* rstd;       // [C], 1 / sqrt(variance + eps)
  const float* weight;     // [C], or null: 1
  const float* bias;       // [C], or null: 0
  const float* threshold;  // [1] or [C]
  const float* leak;       // [1] or [C]
  bool one_threshold, one_leak;
  void* s;  // forward: [T, N] like x
  // backward
  const void* grad_s;       // like x
  int64_t grad_s_stride_t;  // N, or 0: the same gradient at every timestep
  double* sums;             // [kBnLifCudaSums, C] over neurons and time: the gradients of threshold and leak, that of
                            // the current, and that times x - mean
  float* grad_weight;       // [C] each
  float* grad_bias;
  float* grad_threshold;  // like threshold
  float* grad_leak;       // like leak
  float* grad_mean;       // [C], the mean of the current's gradient
  float* slope;           // [C], the mean of its product with x - mean, times rstd^2
  void* grad_x;           // [T, N] like x
  void* workspace;        // bn_lif_workspace_cuda() bytes, the same for both passes
  uint32_t* counters;     // bn_lif_counters_cuda(), all 0; so are they left
};

// What a BatchNorm keeps of its calls, which one more is counted in. mean: null where nothing is kept.
struct BnLifRunning {
  float *mean, *var;  // [C] each, the variance unbiased
  int64_t* calls;
  double momentum;  // NaN: they are means over all calls
};

struct BnLifMoments {
  LifShape shape;
  double eps;
  const void* x;
  double* sums;  // [2, C]: of x and of its square
  float* mean;   // [C] each
  float* var;    // biased
  float* rstd;
  void* workspace;  // bn_lif_moments_workspace_cuda() bytes
  uint32_t* counters;
  BnLifRunning running;
};

// Of what several processes have added up.
struct BnLifTotals {
  int64_t channels;
  double eps;
  const double* totals;  // [3, C]: sums of x and of its square, and how many they are of
  float* mean;           // [C] each
  float* rstd;
  BnLifRunning running;
};

constexpr int kBnLifCudaSums = 4;

int64_t bn_lif_counters_cuda(const LifShape& shape);  // at most
int64_t bn_lif_moments_workspace_cuda(const LifShape& shape);
void bn_lif_moments_cuda(const BnLifMoments& args, void* stream);
void bn_lif_totals_cuda(const BnLifTotals& args, void* stream);
void bn_lif_fire_cuda(const BnLifCuda& args, void* stream);
int64_t bn_lif_workspace_cuda(const LifShape& shape);
// Writes sums and what follows from them.
void bn_lif_sums_cuda(const BnLifCuda& args, void* stream);
// Reads grad_mean and slope.
void bn_lif_grad_x_cuda(const BnLifCuda& args, void* stream);

}  // namespace iirsnn
