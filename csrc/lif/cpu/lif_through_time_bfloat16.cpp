#include "lif/cpu/through_time.h"

namespace iirsnn {

template ThroughTimeLoop<BFloat16> through_time<BFloat16, Pass::all>(const LifBackward&);

}  // namespace iirsnn
