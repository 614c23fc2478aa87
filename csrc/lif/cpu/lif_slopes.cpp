#include "lif/cpu/rows.h"
#include "lif/cpu/slopes.h"

namespace iirsnn {
namespace {

template <typename acc_t, Surrogate kSurrogate>
struct Slopes {
  template <int kBytes>
  static IIRSNN_INLINE void run(const acc_t* membranes, const Parameters<acc_t>* parameters, acc_t scale, acc_t* slopes,
                                int n) {
    using V = Lanes<acc_t, kBytes, kBytes>;
    const V a = V(scale);
    for_each_piece<V>(*parameters, n, [&](const auto& p, int begin, int end) IIRSNN_INLINE_LAMBDA {
      for (int i = begin; i < end; i += V::kSize) {
        store(slopes + i, spike_slope<kSurrogate>(load<V>(membranes + i), p.neuron(i, acc_t(0)), a));
      }
    });
  }
};

}  // namespace

template <typename acc_t>
SlopeRow<acc_t> slope_row(Surrogate surrogate) {
  switch (surrogate) {
    case Surrogate::triangle:
      return version<Slopes<acc_t, Surrogate::triangle>>();
    case Surrogate::atan:
      return version<Slopes<acc_t, Surrogate::atan>>();
    case Surrogate::sigmoid:
      return version<Slopes<acc_t, Surrogate::sigmoid>>();
    case Surrogate::fast_sigmoid:
      return version<Slopes<acc_t, Surrogate::fast_sigmoid>>();
    default:
      return version<Slopes<acc_t, Surrogate::boxcar>>();
  }
}

template SlopeRow<float> slope_row(Surrogate);
template SlopeRow<double> slope_row(Surrogate);

}  // namespace iirsnn
