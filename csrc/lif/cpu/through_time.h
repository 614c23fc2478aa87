// Gradients of few timesteps: a cache line of neurons goes up through all of them and down again, membranes in
// registers, before the next line starts. Of one timestep by any surrogate; of more for what trains most: soft,
// detached reset, triangle; from v = 0.
#pragma once

#include "lif/cpu/backward.h"

namespace iirsnn {

// Of the numbers that go through time together. A cache line: half of one, two registers of bfloat16, takes a sixth
// longer. Of SSE2, whose registers hold half of what other sets' hold, as little as can be loaded, and summed: a line
// does not fit, and compiles twice as long.
template <typename scalar_t, int kBytes, bool kSummed,
          int kWider = sizeof(typename Convert<scalar_t>::acc_t) / sizeof(scalar_t)>
constexpr int kPartBytes = kBytes * kRegisterCount<kBytes> >= 512 ? std::max(kBytes, int(kCacheLine) * kWider)
                           : kSummed                              ? 64
                                                                  : kBytes * kWider;

template <typename scalar_t, int kTimesteps, Surrogate kSurrogate, Pass kPass>
struct ThroughTime {
  template <int kBytes>
  static IIRSNN_INLINE void run(const BackwardBlock<scalar_t>* block, const BackwardRow<scalar_t>* row) {
    const BackwardBlock<scalar_t> b = *block;  // which stores cannot change
    const BackwardRow<scalar_t> r = *row;
    if constexpr (kPass == Pass::grad_x) return neurons<kBytes, 0>(b, r);
    with_sums<kPass == Pass::sums>(r, [&](auto summed) IIRSNN_INLINE_LAMBDA {
      neurons<kBytes, decltype(summed)::value ? kSums<kPass == Pass::sums> : 0>(b, r);
    });
  }

 private:
  template <int kBytes, int kCount>
  static IIRSNN_INLINE void neurons(const BackwardBlock<scalar_t>& b, const BackwardRow<scalar_t>& r) {
    using acc_t = typename Convert<scalar_t>::acc_t;
    using P = Lanes<acc_t, kBytes, kPartBytes<scalar_t, kBytes, (kCount > 0)>>;
    constexpr Reset kReset = kTimesteps == 1 ? Reset::none : Reset::soft;
    constexpr bool kNormalised = kPass != Pass::all;
    const P zero = P(acc_t(0)), scale = P(r.scale);
    constexpr int kLoops = std::is_same_v<scalar_t, BFloat16> ? 0 : kCount > 0 && kBytes > 16 ? 2 : 1;
    const auto ahead = [](int) {};
    for_each_part<kCount, P, kBytes, kLoops>(
        r, ahead, [&](int j, const auto& parameters, auto&& sums) IIRSNN_INLINE_LAMBDA {
          constexpr bool kColumns = std::decay_t<decltype(parameters)>::kSeveral;
          constexpr bool kPasses = kColumns && kPass == Pass::all && kCount > 0 && kTimesteps <= kPassesAtOnce;
          const int64_t next = !kColumns || j < r.n - kAhead ? kAhead : kAhead - r.n + b.step;
          const Neuron<P> neuron = parameters.neuron(j, r.v_reset);
          P totals[kCount > 0 ? kCount : 1];
          const auto through = [&](int64_t i) IIRSNN_INLINE_LAMBDA {
            P h[kTimesteps];
            IIRSNN_REGISTERS
            for (int t = 0; t < kTimesteps; ++t) {
              const scalar_t* x = b.x + t * b.x_stride + i;
              prefetch<P>(x + next);
              h[t] = current_at<kNormalised, P>(x, parameters, j);
              if (t > 0) h[t] = charge<kReset>(h[t], discharge<kReset>(h[t - 1], neuron), neuron);
            }
            Carry<P> carry{zero, zero};
            const auto add = [&](int k, int t, const P& term) IIRSNN_INLINE_LAMBDA {
              totals[k] = t == kTimesteps - 1 && !kPasses ? term : totals[k] + term;
            };
            IIRSNN_REGISTERS
            for (int t = kTimesteps - 1; t >= 0; --t) {
              const scalar_t* grad_s = b.grad_s + t * b.grad_s_stride + i;
              prefetch<P>(grad_s + next);
              const P v = kCount > 0 && t > 0 ? discharge<kReset>(h[t - 1], neuron) : zero;
              const StepGrad<P> grad =
                  backward_step<kReset, kSurrogate>(load<P>(grad_s), h[t], v, neuron, scale, true, carry);
              if constexpr (kCount > 0) {
                add(kThresholdSum, t, grad.threshold);
                if (t > 0) add(kLeakSum, t, grad.leak);
              }
              scalar_t* grad_x = b.grad_x + t * b.grad_x_stride + i;
              if (kTimesteps == 1 && kPass != Pass::sums && !r.past_caches) prefetch<P>(grad_x + next);
              if constexpr (kPass == Pass::all) {
                store(grad_x, grad.x, kTimesteps == 1 && r.past_caches);
              } else {
                const P centred = load<P>(b.x + t * b.x_stride + i) - parameters.of(kMean, j);
                if constexpr (kPass == Pass::sums) {
                  add(kGradSum, t, grad.x);
                  add(kDotSum, t, grad.x * centred);
                } else {
                  store(grad_x, input_gradient(grad.x, centred, parameters, j), kTimesteps == 1 && r.past_caches);
                }
              }
            }
          };
          if constexpr (kPasses) {
            IIRSNN_REGISTERS
            for (P& total : totals) total = zero;
            IIRSNN_ROLLED
            for (int pass = 0; pass < b.passes; ++pass) through(j + pass * b.pass);
          } else {
            through(j);
          }
          if constexpr (kCount > 0) {
            IIRSNN_REGISTERS
            for (int k = 0; k < kCount; ++k) {
              if (k != kLeakSum || kTimesteps > 1) sums.add(k, j, totals[k]);
            }
          }
        });
  }

  static constexpr int kAhead = 1024 / sizeof(scalar_t);
};

// Declared in backward.h.
template <typename scalar_t, Pass kPass>
ThroughTimeLoop<scalar_t> through_time(const LifBackward& args) {
  constexpr Surrogate kTriangle = Surrogate::triangle;
  if (args.v0 || args.grad_v) return nullptr;
  if (args.shape.timesteps == 1) {
    switch (args.surrogate) {
      case kTriangle:
        return version<ThroughTime<scalar_t, 1, kTriangle, kPass>>();
      case Surrogate::atan:
        return version<ThroughTime<scalar_t, 1, Surrogate::atan, kPass>>();
      case Surrogate::sigmoid:
        return version<ThroughTime<scalar_t, 1, Surrogate::sigmoid, kPass>>();
      case Surrogate::fast_sigmoid:
        return version<ThroughTime<scalar_t, 1, Surrogate::fast_sigmoid, kPass>>();
      default:
        return version<ThroughTime<scalar_t, 1, Surrogate::boxcar, kPass>>();
    }
  }
  if (args.reset != Reset::soft || !args.detach_reset || args.surrogate != kTriangle) return nullptr;
  if constexpr (!std::is_same_v<scalar_t, double>) {
    switch (args.shape.timesteps) {
      case 2:
        return version<ThroughTime<scalar_t, 2, kTriangle, kPass>>();
      case 3:
        return version<ThroughTime<scalar_t, 3, kTriangle, kPass>>();
      case 4:
        return version<ThroughTime<scalar_t, 4, kTriangle, kPass>>();
      case 5:
        return version<ThroughTime<scalar_t, 5, kTriangle, kPass>>();
    }
  }
  return nullptr;  // rows are faster: membranes of more timesteps do not fit into registers
}

}  // namespace iirsnn
