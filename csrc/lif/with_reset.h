// A reset that is known when a call is made, for kernels that are compiled for each.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "lif/lif_step.h"

namespace iirsnn {

// f(std::integral_constant<Reset, ...>()); without kEvery there is the soft one alone.
template <bool kEvery = true, typename F>
auto with_reset(Reset reset, const F& f) {
  if (reset == Reset::soft) return f(std::integral_constant<Reset, Reset::soft>());
  if constexpr (kEvery) {
    if (reset == Reset::hard) return f(std::integral_constant<Reset, Reset::hard>());
    if (reset == Reset::none) return f(std::integral_constant<Reset, Reset::none>());
    if (reset == Reset::soft_delayed) return f(std::integral_constant<Reset, Reset::soft_delayed>());
  }
  throw std::invalid_argument("no kernel for reset " + std::to_string(int(reset)));
}

}  // namespace iirsnn
