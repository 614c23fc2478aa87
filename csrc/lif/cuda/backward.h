// What the backward kernels share.
#pragma once

#include "lif/cuda/packets.h"

namespace iirsnn::cuda {

template <typename acc_t>
struct BackwardOptions {
  acc_t v_reset, scale;
  Surrogate surrogate;
  bool detach_reset;
};

// Neurons that go through their timesteps together. A packet holds up to eight: their membranes of a whole segment
// would take more registers than the packets themselves.
constexpr int kPart = 2;

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

// Packets of up to kSegment timesteps, from t0 on. With a stride of 0 all are one.
template <typename scalar_t, int kSize>
__device__ __forceinline__ void load_segment(Packet<scalar_t, kSize> (&packets)[kSegment], const scalar_t* from,
                                             int64_t stride_t, int64_t t0, int64_t timesteps) {
  packets[0] = load<kSize>(from + t0 * stride_t);
#pragma unroll
  for (int j = 1; j < kSegment; ++j) {
    packets[j] = packets[0];
    if (stride_t != 0 && t0 + j < timesteps) packets[j] = load<kSize>(from + (t0 + j) * stride_t);
  }
}

}  // namespace iirsnn::cuda
