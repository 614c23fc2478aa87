#include "lif/cpu/backward.h"

namespace iirsnn {

IIRSNN_BACKWARD_BLOCKS(double, all);

}  // namespace iirsnn
