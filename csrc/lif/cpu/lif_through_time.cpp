#include "lif/cpu/through_time.h"

namespace iirsnn {

template <typename scalar_t>
ThroughTimeLoop<scalar_t> through_time(int64_t timesteps) {
  switch (timesteps) {
    case 2:
      return version<ThroughTime<scalar_t, 2>>();
    case 3:
      return version<ThroughTime<scalar_t, 3>>();
    case 4:
      return version<ThroughTime<scalar_t, 4>>();
    case 5:
      return version<ThroughTime<scalar_t, 5>>();
    default:
      return nullptr;  // rows are faster: membranes of more timesteps do not fit into registers
  }
}

template ThroughTimeLoop<float> through_time(int64_t timesteps);
template ThroughTimeLoop<BFloat16> through_time(int64_t timesteps);

}  // namespace iirsnn
