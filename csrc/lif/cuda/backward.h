// One timestep of a thread's neurons, backward.
#pragma once

#include "lif/cuda/sums.h"

namespace iirsnn::cuda {

template <typename acc_t>
struct BackwardOptions {
  acc_t v_reset, scale;
  Surrogate surrogate;
  bool detach_reset;
};

// ds/dh of a thread's neurons. The branches are the same for every thread of the grid.
template <int kSize, typename acc_t>
__device__ __forceinline__ void spike_slopes(acc_t (&slopes)[kSize], const acc_t (&h)[kSize],
                                             const Neuron<acc_t> (&neurons)[kSize], Surrogate kind, acc_t scale) {
  acc_t z[kSize], denominators[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) z[k] = sub(mul(h[k], neurons[k].inverse_threshold), acc_t(1));
  const auto whole = [&](auto surrogate_kind) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) slopes[k] = surrogate<surrogate_kind>(z[k], scale);
  };
  const auto ratio = [&](auto surrogate_kind) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const auto parts = surrogate_ratio<surrogate_kind>(z[k], scale);
      slopes[k] = parts.numerator, denominators[k] = parts.denominator;
    }
  };
  if (kind == Surrogate::triangle) {
    whole(constant<Surrogate::triangle>{});
  } else if (kind == Surrogate::boxcar) {
    whole(constant<Surrogate::boxcar>{});
  } else {
    if (kind == Surrogate::atan)
      ratio(constant<Surrogate::atan>{});
    else if (kind == Surrogate::sigmoid)
      ratio(constant<Surrogate::sigmoid>{});
    else
      ratio(constant<Surrogate::fast_sigmoid>{});
#pragma unroll
    for (int k = 0; k < kSize; ++k) slopes[k] = div(slopes[k], denominators[k]);
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) slopes[k] = mul(slopes[k], neurons[k].inverse_threshold);
}

// One timestep of a thread's neurons: grad_s becomes grad_x.
template <Reset kReset, typename scalar_t, int kSize, typename acc_t>
__device__ __forceinline__ void backward_neurons(Packet<scalar_t, kSize>& grad, const acc_t (&h)[kSize],
                                                 const acc_t (&v)[kSize], const Neuron<acc_t> (&neurons)[kSize],
                                                 const BackwardOptions<acc_t>& options, Carry<acc_t> (&carry)[kSize],
                                                 Partial<acc_t> (&sums)[kSize]) {
  acc_t slopes[kSize];
  spike_slopes(slopes, h, neurons, options.surrogate, options.scale);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const StepGrad<acc_t> step = backward_step<kReset>(acc_t(widen(grad.get(k))), h[k], v[k], slopes[k], neurons[k],
                                                       options.detach_reset, carry[k]);
    sums[k] = sums[k] + Partial<acc_t>{step.threshold, step.leak};
    grad.set(k, narrow<scalar_t>(step.x));
  }
}

}  // namespace iirsnn::cuda
