#include "lif/cpu/backward.h"

namespace iirsnn {

IIRSNN_BACKWARD_BLOCKS(BFloat16, all);

}  // namespace iirsnn
