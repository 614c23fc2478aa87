// The average pool of spikes: its node of autograd's graph keeps nothing of the input but its size, and says what it
// is.
#pragma once

#include <ATen/ops/avg_pool2d_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/upsample_nearest2d.h>

#include <algorithm>
#include <string>
#include <vector>

#include "lif/torch/gradient.h"

namespace iirsnn::sparse {

struct Pool {
  std::vector<int64_t> size, kernel, stride, padding;  // size: of x
  bool channels_last, ceil, counted;
  int64_t divisor;  // 0: the values in the window

  template <typename Pool, typename Visit>
  static void each(Pool& pool, const Visit& visit) {
    for (auto* sizes : {&pool.size, &pool.kernel, &pool.stride, &pool.padding}) visit(*sizes);
    for (auto* flag : {&pool.channels_last, &pool.ceil, &pool.counted}) visit(*flag);
    visit(pool.divisor);
  }

  std::optional<int64_t> divisor_or_none() const { return divisor ? std::optional(divisor) : std::nullopt; }
  bool padded() const { return padding[0] || padding[1]; }
  // Values that each result is the average of, where that is known and a power of two; else 0.
  int64_t averaged() const {
    const int64_t window = kernel[0] * kernel[1];
    const bool ragged = ceil || divisor || (padded() && !counted);
    return ragged || (window & (window - 1)) ? 0 : window;
  }
};

struct AveragePool : Gradient<AveragePool, 0, Pool> {
  static constexpr const char* kName = "SpikeAveragePool";

  // Read by iirsnn/nn/origin.py.
  std::string name() const override {
    const int64_t averaged = options.averaged();
    return averaged ? "SpikeAverageOf" + std::to_string(averaged) : kName;
  }

  static variable_list gradients(const variable_list& grads, const Tensor*, const Pool& pool, int64_t) {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return {Tensor()};
    const bool tiles = pool.kernel == pool.stride && !pool.padded() && !pool.ceil && !pool.divisor &&
                       grad.size(2) * pool.kernel[0] == pool.size[2] && grad.size(3) * pool.kernel[1] == pool.size[3];
    if (tiles && grad.is_cpu()) {  // the same, and faster
      return {at::upsample_nearest2d(grad.div(pool.kernel[0] * pool.kernel[1]), {pool.size[2], pool.size[3]})};
    }
    const auto format = pool.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    const Tensor x = at::empty(pool.size, grad.options().memory_format(format));  // its size and layout are read
    return {at::avg_pool2d_backward(grad, x, pool.kernel, pool.stride, pool.padding, pool.ceil, pool.counted,
                                    pool.divisor_or_none())};
  }
};

}  // namespace iirsnn::sparse
