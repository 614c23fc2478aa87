// What the kernels of BatchNorm and LIF in one read of a channel.
#pragma once

#include <limits>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/channels.h"

namespace iirsnn {

class NormalisedChannels {
 public:
  explicit NormalisedChannels(const BnLif& args) : derived_(derived(args)) {}

  Channels<float> forward(const BnLif& args) const {
    return {args.shape,
            {args.threshold, args.shape.timesteps > 1 ? args.leak : nullptr, nullptr, gain(), shift(args)},
            walk_of(args.shape)};
  }
  Channels<float> backward(const BnLif& args, Walk walk) const {
    const bool charged = args.shape.timesteps > 1;
    return {args.shape,
            {charged ? args.threshold : nullptr, charged ? args.leak : nullptr, shift(args) + args.shape.channels,
             gain(), shift(args), args.mean, args.grad_mean, args.slope},
            walk};
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
  const float* gain() const { return derived_.data(); }
  const float* shift(const BnLif& args) const { return gain() + args.shape.channels; }

  const std::vector<float> derived_;
};

}  // namespace iirsnn
