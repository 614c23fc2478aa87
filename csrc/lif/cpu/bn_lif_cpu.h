// BatchNorm, with the statistics of its input, and LIF in one: CPU kernels over a range of chunks (lif_cpu.h).
//
//   forward:   the sums of the statistics, one pass over x; then spikes, one pass that reads x and writes s
//   backward:  the LIF backward on the normalised current, one pass that reads x and grad_s, for its sums; then another
//              that computes the same again, and from it and the sums grad_x. Where the LIF backward goes through rows,
//              the first pass leaves its gradients in grad_x and the second reads those
//
// The normalised current is computed in registers, from x, whenever it is needed. x is float32 or bfloat16; parameters
// are float32.
#pragma once

#include "lif/cpu/sums.h"
#include "lif/lif.h"

namespace iirsnn {

struct BnLif {
  LifShape shape;  // channels: C, or 1 where x has one channel
  Reset reset;
  double v_reset;
  bool detach_reset;
  Surrogate surrogate;
  double surrogate_scale;
  const void* x;
  const float* mean;    // [C], as all parameters
  const float* rstd;    // 1 / sqrt(variance + eps)
  const float* weight;  // or null: 1
  const float* bias;    // or null: 0
  const float* threshold;
  const float* leak;
  void* s;  // forward: [T, N] like x
  // backward
  const void* grad_s;       // like x
  int64_t grad_s_stride_t;  // N, or 0: the same gradient at every timestep
  void* grad_x;             // [T, N] like x
  double* sums;             // [chunks, kBnLifSums, C]
  const float* grad_mean;   // [C], the mean of the current's gradient
  const float* slope;       // [C], the mean of its product with x - mean, times rstd^2
};

constexpr int kBnLifSums = kSums<true>;

// x and its square, summed over neurons and time, in double, where the square is exact: sums [chunks, kMoments, C].
constexpr int kMoments = 2;
void moments_cpu(const LifShape& shape, const void* x, double* sums, int64_t first_chunk, int64_t last_chunk);
// Of all chunks, in order, into those of the first; after all are done.
void moments_finish_cpu(const LifShape& shape, double* sums);
void bn_lif_forward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk);
void bn_lif_backward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk);
void bn_lif_backward_finish_cpu(const BnLif& args);  // its sums, as those of moments_finish_cpu
// Reads grad_mean and slope, and what the first pass left in grad_x.
void bn_lif_grad_x_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk);

}  // namespace iirsnn
