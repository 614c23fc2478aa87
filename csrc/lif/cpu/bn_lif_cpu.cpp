#include "lif/cpu/bn_lif_cpu.h"

#include "lif/cpu/forward.h"
#include "lif/cpu/normalised.h"

namespace iirsnn {

void bn_lif_forward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  const NormalisedChannels normalised(args);
  Channels<float> channels = normalised.forward(args);
  LifForward call{args.shape, args.reset, args.v_reset, args.x};
  call.s = args.s;
  const auto packed = [](auto&&...) {};
  if (args.shape.dtype == DType::float32) {
    return forward_blocks<float, true>(call, channels, first_chunk, last_chunk, packed);
  }
  forward_blocks<BFloat16, true>(call, channels, first_chunk, last_chunk, packed);
}

}  // namespace iirsnn
