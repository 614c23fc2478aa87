#include "lif/cpu/backward.h"

namespace iirsnn {

IIRSNN_BACKWARD_BLOCKS(double, false);

}  // namespace iirsnn
