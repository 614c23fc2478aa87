// Gradients of few timesteps: a cache line of neurons goes up through all of them and down again, membranes in
// registers, before the next line starts. For what trains most: soft, detached reset, triangle, from v = 0.
#pragma once

#include "lif/cpu/backward.h"

namespace iirsnn {

template <typename scalar_t, int kTimesteps>
struct ThroughTime {
  template <int kBytes>
  static IIRSNN_INLINE void run(const BackwardBlock<scalar_t>* block, const BackwardRow<scalar_t>* row) {
    using Part = Parts<scalar_t, kBytes>;
    using acc_t = typename Part::acc_t;
    using P = Lanes<acc_t, kBytes, std::max(kBytes, int(kCacheLine * sizeof(acc_t) / sizeof(scalar_t)))>;
    const BackwardBlock<scalar_t> b = *block;
    const BackwardRow<scalar_t> r = *row;
    with_sums<false>(r, [&](auto summed) IIRSNN_INLINE_LAMBDA {
      constexpr bool kSummed = decltype(summed)::value;
      int begin = 0;
      for (const Piece<acc_t>* piece = r.parameters.pieces; begin < r.n; begin = piece++->end) {
        const PartParameters<P, false, acc_t> parameters(r.parameters, *piece);
        neurons<kSummed, kBytes, P>(b, r, parameters.neuron(0, r.v_reset), begin, piece->end);
      }
    });
  }

 private:
  template <bool kSummed, int kBytes, typename P, typename acc_t = typename Number<P>::type>
  static IIRSNN_INLINE void neurons(const BackwardBlock<scalar_t>& b, const BackwardRow<scalar_t>& r,
                                    const Neuron<P>& neuron, int begin, int end) {
    using V = Lanes<acc_t, kBytes>;
    constexpr int kCount = kSummed ? kSums<false> : 0;
    const P zero = P(acc_t(0)), scale = P(r.scale);
    V sums[kSummed ? kCount : 1];
    load_sums<kCount>(r, begin, sums);
    for (int i = begin; i < end; i += V::kSize) {
      IIRSNN_REGISTERS
      for (int part = 0; part < V::kSize / P::kSize; ++part) {
        const int j = i + part * P::kSize;
        P h[kTimesteps];
        IIRSNN_REGISTERS
        for (int t = 0; t < kTimesteps; ++t) {
          const scalar_t* x = b.x + t * b.x_stride + j;
          prefetch<P>(x + kAhead);
          h[t] = load<P>(x);
          if (t > 0) h[t] = charge<Reset::soft>(h[t], discharge<Reset::soft>(h[t - 1], neuron), neuron);
        }
        Carry<P> carry{zero, zero};
        IIRSNN_REGISTERS
        for (int t = kTimesteps - 1; t >= 0; --t) {
          const scalar_t* grad_s = b.grad_s + t * b.grad_s_stride + j;
          prefetch<P>(grad_s + kAhead);
          const P v = kSummed && t > 0 ? discharge<Reset::soft>(h[t - 1], neuron) : zero;
          const StepGrad<P> grad =
              backward_step<Reset::soft, Surrogate::triangle>(load<P>(grad_s), h[t], v, neuron, scale, true, carry);
          store(b.grad_x + t * b.grad_x_stride + j, grad.x);
          if constexpr (kSummed) {
            add_part(sums[kThresholdSum], part, grad.threshold);
            if (t > 0) add_part(sums[kLeakSum], part, grad.leak);
          }
        }
      }
    }
    store_sums<kCount>(r, begin, sums);
  }

  static constexpr int kAhead = 1024 / sizeof(scalar_t);
};

}  // namespace iirsnn
