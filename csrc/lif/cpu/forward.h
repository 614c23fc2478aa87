// Spikes of a range of chunks: reads x and writes s, 2 T N scalars. Neurons go through up to kAtOnce timesteps,
// membranes in registers, before the next ones start.
#pragma once

#include "lif/cpu/rows.h"

namespace iirsnn {

// Rows often lie a power of two apart: lines of more than these, of x and of s, would share sets of the caches.
constexpr int64_t kAtOnce = 5;

// Of a block: n neurons, whole vectors; pointers to the first of them at its first timestep.
template <typename scalar_t, typename parameter_t = typename Convert<scalar_t>::acc_t>
struct ForwardBlock {
  using acc_t = typename Convert<scalar_t>::acc_t;
  int n;
  int64_t timesteps;
  const scalar_t* x;
  int64_t x_stride;
  scalar_t* s;
  int64_t s_stride;
  bool past_caches;  // write s so
  const acc_t* v0;   // or null
  acc_t* v;          // or null
  Parameters<parameter_t> parameters;
  acc_t v_reset;
};

template <typename scalar_t, Reset kReset, bool kNormalised>
struct ForwardRows {
  using Block = ForwardBlock<scalar_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* block) {
    const Block b = *block;  // which stores cannot change
    using V = typename Parts<scalar_t, kBytes>::Held;
    for_each_piece<V>(b.parameters, b.n, [&](const auto& parameters, int begin, int end) IIRSNN_INLINE_LAMBDA {
      if (b.timesteps == 1 && !b.v0 && !b.v) {  // in the loop below it takes a third more
        for (int i = begin; i < end; i += V::kSize) {
          if (b.past_caches) prefetch<V>(b.x + i + kAhead);  // which streaming stores hold up (Cascade Lake: 0.95)
          const V h = current_at<kNormalised, V>(b.x + i, parameters, i);
          Memory<V>::store_spike(b.s + i, spike(h, parameters.of(kThreshold, i)), b.past_caches);
        }
      } else {
        for (int i = begin; i < end; i += V::kSize) neurons<V>(b, i, parameters);
      }
    });
  }

 private:
  static constexpr int kAhead = 512 / sizeof(scalar_t);

  template <typename V, typename PartParameters>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const PartParameters& parameters) {
    const scalar_t* x = b.x + i;
    scalar_t* s = b.s + i;
    const Neuron<V> neuron = parameters.neuron(i, b.v_reset);
    V h = current_at<kNormalised, V>(x, parameters, i);
    if (b.v0) h = charge<kReset>(h, load<V>(b.v0 + i), neuron);
    Memory<V>::store_spike(s, spike(h, neuron.threshold), b.past_caches);
    for (int64_t t = 1; t < b.timesteps; ++t) {
      x += b.x_stride;
      s += b.s_stride;
      h = charge<kReset>(current_at<kNormalised, V>(x, parameters, i), discharge<kReset>(h, neuron), neuron);
      Memory<V>::store_spike(s, spike(h, neuron.threshold), b.past_caches);
    }
    if (b.v) store(b.v + i, discharge<kReset>(h, neuron));
  }
};

// One timestep of bfloat16 numbers from v = 0: as whole numbers in their order, without widening. The threshold of a
// channel is ordered_below() it.
struct OrderedRows {
  template <int kBytes>
  static IIRSNN_INLINE void run(const ForwardBlock<BFloat16, int16_t>* block) {
    const ForwardBlock<BFloat16, int16_t> b = *block;
    using Bits = Register<int16_t, kBytes>;
    const Bits size = Bits{} + int16_t(0x7fff), infinity = Bits{} + int16_t(0x7f80), one = Bits{} + int16_t(0x3f80);
    using V = Lanes<int16_t, kBytes, kBytes>;
    for_each_piece<V>(b.parameters, b.n, [&](const auto& parameters, int begin, int end) IIRSNN_INLINE_LAMBDA {
      for (int i = begin; i < std::min(end, b.n); i += V::kSize) {
        const Bits x = load_loose<Bits>(b.x + i), ordered = x ^ ((x >> 15) & size);
        const Bits s = (x & size) > infinity ? x : (ordered > parameters.of(kThreshold, i).r[0]) & one;  // a NaN stays
        if (__builtin_expect(b.past_caches, false)) {
          stream(b.s + i, s);
        } else {
          store_loose(b.s + i, s);
        }
      }
    });
  }
};

// The whole number of the largest bfloat16 that is not above: of all for a NaN.
inline int16_t ordered_below(float value) {
  if (value != value) return 0x7fff;
  if (value == 0) return 0;
  const uint32_t bits = bit_cast<uint32_t>(value), below = value < 0 ? bits + 0xffffu : bits;
  return value < 0 ? int16_t((below >> 16) ^ 0x7fffu) : int16_t(below >> 16);
}

template <typename scalar_t, typename parameter_t, bool kNormalised>
auto forward_kernel(Reset reset) {
  if constexpr (std::is_same_v<parameter_t, int16_t>) {
    return version<OrderedRows>();
  } else {
    return with_reset(reset,
                      [](auto reset) { return version<ForwardRows<scalar_t, decltype(reset)::value, kNormalised>>(); });
  }
}

// Calls f(range, rows of spikes, their stride) where kPacked, after each block; there s is null.
template <typename scalar_t, bool kNormalised, typename parameter_t, typename F>
void forward_blocks(const LifForward& args, Channels<parameter_t>& channels, int64_t first_chunk, int64_t last_chunk,
                    F packed) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using x_t = kernel_t<scalar_t>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps, stride = row_stride<x_t>(shape), acc_stride = row_stride<acc_t>(shape);
  const auto kernel = forward_kernel<x_t, parameter_t, kNormalised>(args.reset);
  const bool copies = some_staged<scalar_t>(shape, channels.walk(), last_chunk);
  const Buffer<x_t> x_rows(copies ? steps * stride : 0), s_rows(copies || args.bits ? steps * stride : 0);
  const Buffer<acc_t> membranes(copies || steps > kAtOnce ? 3 * acc_stride : 0);
  acc_t* const held = membranes.get() + 2 * acc_stride;
  ForwardBlock<x_t, parameter_t> block{};
  block.v_reset = acc_t(args.v_reset);
  // from the last chunk to the first: what a pass before has read last is still in the cache
  for (int64_t chunk = last_chunk - 1; chunk >= first_chunk; --chunk) {
    for_each_block(shape, chunk, channels.walk(), kBlock, 1, [&](const Range& range) {
      const int n = range.n;
      const bool copied = staged<scalar_t>(n);
      const auto* x = static_cast<const scalar_t*>(args.x) + range.begin;
      auto* s = args.bits ? nullptr : static_cast<scalar_t*>(args.s) + range.begin;
      const auto* v0 = args.v0 ? static_cast<const acc_t*>(args.v0) + range.begin : nullptr;
      auto* v = args.v ? static_cast<acc_t*>(args.v) + range.begin : nullptr;
      block.n = whole_vectors<scalar_t>(n);
      block.parameters = channels.of(range);
      block.v0 = v0;
      block.v = v;
      block.s = s_rows.get();
      block.s_stride = stride;
      block.past_caches = false;
      if (copied) {
        stage(x, shape.x_stride_t, steps, n, x_rows.get(), stride);
        block.x = x_rows.get();
        block.x_stride = stride;
        if (v0) {
          stage(v0, 0, 1, n, membranes.get(), acc_stride);
          block.v0 = membranes.get();
        }
        if (v) block.v = membranes.get() + acc_stride;
      } else if constexpr (!std::is_same_v<scalar_t, Half>) {
        block.x = x;
        block.x_stride = shape.x_stride_t;
        if (s) {
          block.s = s;
          block.s_stride = shape.neurons;
          block.past_caches = past_caches<scalar_t>(shape, args.s);
        }
      }
      const acc_t* const first_v = block.v0;
      acc_t* const last_v = block.v;
      for (int64_t t = 0; t < steps; t += kAtOnce) {
        block.timesteps = std::min(kAtOnce, steps - t);
        block.v0 = t > 0 ? held : first_v;
        block.v = t + kAtOnce < steps ? held : last_v;
        kernel(&block);
        block.x += kAtOnce * block.x_stride;
        block.s += kAtOnce * block.s_stride;
      }
      if (!s) packed(range, s_rows.get(), stride);
      if (copied && s) unstage(s_rows.get(), stride, steps, n, s, shape.neurons);
      if (copied && v) unstage(last_v, acc_stride, 1, n, v, 0);
    });
  }
  settle();
}

}  // namespace iirsnn
