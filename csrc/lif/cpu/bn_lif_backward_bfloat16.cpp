#include "lif/cpu/backward.h"

namespace iirsnn {

IIRSNN_BACKWARD_BLOCKS(BFloat16, sums);
IIRSNN_BACKWARD_BLOCKS(BFloat16, grad_x);

}  // namespace iirsnn
