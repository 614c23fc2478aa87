#include "lif/cpu/through_time.h"

namespace iirsnn {

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

template ThroughTimeLoop<float> through_time<float, Pass::all>(const LifBackward&);
template ThroughTimeLoop<double> through_time<double, Pass::all>(const LifBackward&);
template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::all>(const LifBackward&);
template ThroughTimeLoop<float> through_time<float, Pass::sums>(const LifBackward&);
template ThroughTimeLoop<float> through_time<float, Pass::grad_x>(const LifBackward&);
template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::sums>(const LifBackward&);
template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::grad_x>(const LifBackward&);

}  // namespace iirsnn
