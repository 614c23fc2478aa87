#include "lif/cpu/through_time.h"

namespace iirsnn {

template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::sums>(const LifBackward&);
template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::grad_x>(const LifBackward&);

}  // namespace iirsnn
