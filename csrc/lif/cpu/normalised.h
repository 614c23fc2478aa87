// What the kernels of BatchNorm and LIF in one read of a channel.
#pragma once

#include <limits>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/channels.h"

namespace iirsnn {

class NormalisedChannels {
 public:
  explicit NormalisedChannels(const BnLif& args) : derived_(derived(args)) {}

  Channels<float> of(const BnLif& args) const {
    const int64_t channels = args.shape.channels;
    const float* gain = derived_.data();
    return {args.shape, {args.threshold, args.leak, gain + 2 * channels, gain, gain + channels, args.mean}};
  }

 private:
  // A NaN that `rounded` leaves one: its lower half is 0, as in every product with a bfloat16 that is NaN.
  static float quiet(float value) { return value == value ? value : std::numeric_limits<float>::quiet_NaN(); }
  static std::vector<float> derived(const BnLif& args) {  // gain, shift, 1 / threshold
    const int64_t channels = args.shape.channels;
    std::vector<float> table(3 * channels);
    for (int64_t c = 0; c < channels; ++c) {
      const float gain = args.weight ? args.rstd[c] * args.weight[c] : args.rstd[c];
      table[c] = quiet(gain);
      table[channels + c] = quiet((args.bias ? args.bias[c] : 0.0f) - args.mean[c] * gain);
      table[2 * channels + c] = 1.0f / args.threshold[c];
    }
    return table;
  }
  const std::vector<float> derived_;
};

}  // namespace iirsnn
