// What CPU kernels with LIF in them share: chunks and blocks of neurons, the choice of a reset and of a surrogate.
#pragma once

#include <algorithm>
#include <type_traits>

#include "lif/cpu/cpu_channels.h"

namespace iirsnn {

constexpr int kSegment = 16;             // timesteps between checkpoints
constexpr int64_t kChunk = 16 * kBlock;  // neurons a thread takes at least
constexpr int64_t kMaxChunks = 256;

inline int64_t chunk_neurons(const LifShape& shape) {
  const int64_t least = std::max(16 * shape.channels, (shape.neurons + kMaxChunks - 1) / kMaxChunks);
  return std::max(kChunk, (least + kBlock - 1) / kBlock * kBlock);
}

inline int64_t chunks_of(const LifShape& shape) {
  const int64_t chunk = chunk_neurons(shape);
  return (shape.neurons + chunk - 1) / chunk;
}

// Calls f(begin, n, chunk) for the blocks of at most `block` neurons of a range of chunks.
template <typename F>
void for_each_block(const LifShape& shape, int64_t first_chunk, int64_t last_chunk, int block, F f) {
  const int64_t chunk = chunk_neurons(shape);
  const int64_t end = std::min(last_chunk * chunk, shape.neurons);
  for (int64_t begin = first_chunk * chunk; begin < end; begin += block) {
    f(begin, int(std::min<int64_t>(block, end - begin)), begin / chunk);
  }
}

// f(std::integral_constant<Reset, ...>()) for the reset: the kernels are compiled for each.
template <typename F>
auto with_reset(Reset reset, F f) {
  switch (reset) {
    case Reset::soft:
      return f(std::integral_constant<Reset, Reset::soft>());
    case Reset::hard:
      return f(std::integral_constant<Reset, Reset::hard>());
    case Reset::none:
      return f(std::integral_constant<Reset, Reset::none>());
    default:
      return f(std::integral_constant<Reset, Reset::soft_delayed>());
  }
}

// The surrogate is chosen here, for a vector: a branch that is always predicted, and a fifth of the code.
template <typename V>
IIRSNN_INLINE V slope_at(Surrogate surrogate, const V& h, const Neuron<V>& p, const V& scale) {
  switch (surrogate) {
    case Surrogate::triangle:
      return spike_slope<Surrogate::triangle>(h, p, scale);
    case Surrogate::atan:
      return spike_slope<Surrogate::atan>(h, p, scale);
    case Surrogate::sigmoid:
      return spike_slope<Surrogate::sigmoid>(h, p, scale);
    case Surrogate::fast_sigmoid:
      return spike_slope<Surrogate::fast_sigmoid>(h, p, scale);
    default:
      return spike_slope<Surrogate::boxcar>(h, p, scale);
  }
}

}  // namespace iirsnn
