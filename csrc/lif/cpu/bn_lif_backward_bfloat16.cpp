#include "lif/cpu/backward.h"

namespace iirsnn {

IIRSNN_BACKWARD_BLOCKS(BFloat16, true);

}  // namespace iirsnn
