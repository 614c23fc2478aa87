#include "lif/cpu/through_time.h"

namespace iirsnn {

template ThroughTimeLoop<float> through_time<float, Pass::all>(const LifBackward&);
template ThroughTimeLoop<double> through_time<double, Pass::all>(const LifBackward&);

}  // namespace iirsnn
