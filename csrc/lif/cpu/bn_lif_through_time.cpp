#include "lif/cpu/through_time.h"

namespace iirsnn {

template ThroughTimeLoop<float> through_time<float, Pass::sums>(const LifBackward&);
template ThroughTimeLoop<float> through_time<float, Pass::grad_x>(const LifBackward&);

}  // namespace iirsnn
