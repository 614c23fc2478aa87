// Gradients of a range of chunks: reads x and grad_s and writes grad_x, 3 T N scalars. The membranes of a block are
// computed anew, row by row, into scratch memory that stays in the caches; for more than kSegment timesteps, one row in
// kSegment is kept and the others are computed once more.
#pragma once

#include "lif/cpu/rows.h"
#include "lif/cpu/slopes.h"
#include "lif/cpu/sums.h"

namespace iirsnn {

// Of a block: n neurons, whole vectors; pointers to the first of them at t = 0.
template <typename scalar_t>
struct BackwardBlock {
  using acc_t = typename Convert<scalar_t>::acc_t;
  int n;
  int64_t timesteps;
  const scalar_t* x;
  int64_t x_stride;
  const scalar_t* next;  // x of the block after
  const scalar_t* grad_s;
  int64_t grad_s_stride;
  scalar_t* grad_x;
  int64_t grad_x_stride;
  bool past_caches;     // write grad_x so
  const acc_t* v0;      // or null
  const acc_t* grad_v;  // or null
  acc_t* grad_v0;       // or null
  Parameters<acc_t> parameters;
  acc_t v_reset;
  bool detach_reset;
  Surrogate surrogate;
  SlopeRow<acc_t> slope_row;  // or null: triangle, which is computed where it is needed
  acc_t scale;
  acc_t* sums;                                               // see ChannelSums; or null: not wanted
  acc_t* membranes;                                          // scratch: [kSegment] rows
  acc_t *checkpoints, *slopes, *grad_membrane, *grad_reset;  // scratch: a row a segment but for the last; rows
};

// Adds the sums of a vector's neurons, from i on, to their rows.
template <int kCount, typename Block, typename V>
IIRSNN_INLINE void add_to_rows(const Block& b, int i, V* sums) {
  IIRSNN_REGISTERS
  for (int k = 0; k < kCount; ++k) {
    auto* row = b.sums + k * kRow<typename Block::acc_t> + i;
    store(row, load<V>(row) + sums[k]);
    sums[k] = V(0);
  }
}
template <typename V, typename P>
IIRSNN_INLINE void add_part(V& sum, int part, const P& value) {
  IIRSNN_REGISTERS
  for (int k = 0; k < P::kRegisters; ++k) {
    sum.r[part * P::kRegisters + k] = sum.r[part * P::kRegisters + k] + value.r[k];
  }
}

template <typename scalar_t, Reset kReset, bool kNormalised>
struct BackwardRows {
  using Block = BackwardBlock<scalar_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* block) {
    const Block b = *block;  // which stores cannot change
    with_parameters(b.parameters, [&](auto along) IIRSNN_INLINE_LAMBDA {
      if (kNormalised || b.sums) return visit<kBytes, decltype(along)::value, true>(b);
      visit<kBytes, decltype(along)::value, false>(b);
    });
  }

 private:
  template <int kBytes, bool kAlong, bool kSummed>
  static IIRSNN_INLINE void visit(const Block& b) {
    using V = typename Parts<scalar_t, kBytes>::V;
    V sums[kSums<kNormalised>];
    for (V& sum : sums) sum = V(acc_t(0));
    const Parameters<acc_t> parameters = b.parameters;  // a copy for calls: b stays known to the compiler
    const int64_t last = (b.timesteps - 1) / kSegment;
    const acc_t* carry = b.grad_v;
    // up through the segments for their checkpoints, down again for the gradients
    for (int64_t visit = 0; visit <= 2 * last; ++visit) {
      const int64_t segment = visit <= last ? visit : 2 * last - visit, start = segment * kSegment;
      const int length = int(std::min<int64_t>(kSegment, b.timesteps - start));
      const acc_t* const first = segment > 0 ? b.checkpoints + (segment - 1) * kRow<acc_t> : b.v0;
      const acc_t* before = first;
      for (int t = 0; t < length; ++t) {
        const scalar_t* x = b.x + (start + t) * b.x_stride;
        const scalar_t* next = t + 1 < length ? x + b.x_stride : b.grad_s + (start + t) * b.grad_s_stride;
        acc_t* h =
            visit < last && t + 1 == length ? b.checkpoints + segment * kRow<acc_t> : b.membranes + t * kRow<acc_t>;
        if (before) {
          charge_row<kBytes, kAlong, true>(b, x, before, start + t > 0, h, next);
        } else {
          charge_row<kBytes, kAlong, false>(b, x, before, false, h, next);
        }
        before = h;
      }
      if (visit < last) continue;
      for (int t = length - 1; t >= 0; --t) {
        const int64_t at = start + t;
        const acc_t* h = b.membranes + t * kRow<acc_t>;
        before = t > 0 ? h - kRow<acc_t> : first;
        acc_t* carried = at > 0 ? b.grad_membrane : b.grad_v0;
        if (b.slope_row) b.slope_row(h, &parameters, b.scale, b.slopes, b.n);
        step_row<kBytes, kAlong, kSummed>(b, at, h, before, carry, carried, sums);
        carry = carried;
      }
    }
    if constexpr (kReset == Reset::soft_delayed) {
      if (b.v0 && !b.detach_reset) {
        slope_row<acc_t>(b.surrogate)(b.v0, &parameters, b.scale, b.slopes, b.n);
        v0_row<kBytes, kAlong, kSummed>(b, sums);
      }
    }
    if constexpr (kSummed && !kAlong) {
      for (int k = 0; k < kSums<kNormalised>; ++k) store(b.sums + k * kRow<acc_t>, sums[k]);
    }
  }

  // before: the membrane before the timestep, ahead of its reset if `fired`; 0 where not kCharged.
  template <int kBytes, bool kAlong, bool kCharged>
  static IIRSNN_INLINE void charge_row(const Block& b, const scalar_t* x, const acc_t* before, bool fired, acc_t* h,
                                       const scalar_t* next) {
    using V = typename Parts<scalar_t, kBytes>::V;
    using P = typename Parts<scalar_t, kBytes>::P;
    const PartParameters<P, kAlong, acc_t> parameters(b.parameters);
    for (int i = 0; i < b.n; i += V::kSize) {
      prefetch<V>(next + i);
      IIRSNN_REGISTERS
      for (int part = 0; part < Parts<scalar_t, kBytes>::kCount; ++part) {
        const int j = i + part * P::kSize;
        P current = current_at<kNormalised, P>(x + j, parameters, j);
        if constexpr (kCharged) {
          const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
          P v = load<P>(before + j);
          if (fired) v = discharge<kReset>(v, neuron);
          current = charge<kReset>(current, v, neuron);
        }
        store(h + j, current);
      }
    }
  }

  // carry, carried: the gradient of the membrane after and before the timestep, or null: 0, and not wanted.
  template <int kBytes, bool kAlong, bool kSummed, typename V>
  static IIRSNN_INLINE void step_row(const Block& b, int64_t t, const acc_t* h, const acc_t* before, const acc_t* carry,
                                     acc_t* carried, V* totals) {
    using P = typename Parts<scalar_t, kBytes>::P;
    const PartParameters<P, kAlong, acc_t> parameters(b.parameters);
    const scalar_t *x = b.x + t * b.x_stride, *grad_s = b.grad_s + t * b.grad_s_stride;
    const scalar_t* next = t > 0 ? grad_s - b.grad_s_stride : b.next;
    scalar_t* grad_x = b.grad_x + t * b.grad_x_stride;
    const scalar_t* next_grad_x = t > 0 ? grad_x - b.grad_x_stride : grad_x;
    const bool triangle = b.slope_row == nullptr;
    const P zero = P(acc_t(0)), scale = P(b.scale);
    V sums[kSums<kNormalised>];  // in registers
    for (int k = 0; kSummed && k < kSums<kNormalised>; ++k) sums[k] = totals[k];
    for (int i = 0; i < b.n; i += V::kSize) {
      prefetch<V>(next + i);
      if (!b.past_caches) prefetch<V>(next_grad_x + i);
      IIRSNN_REGISTERS
      for (int part = 0; part < Parts<scalar_t, kBytes>::kCount; ++part) {
        const int j = i + part * P::kSize;
        const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
        P v = zero;
        if ((kSummed || kReset == Reset::soft_delayed) && before) {
          v = load<P>(before + j);
          if (t > 0) v = discharge<kReset>(v, neuron);
        }
        Carry<P> state{carry ? load<P>(carry + j) : zero, zero};
        if constexpr (kReset == Reset::soft_delayed) {
          if (!b.detach_reset && t + 1 < b.timesteps) state.grad_reset = load<P>(b.grad_reset + j);
        }
        const P membrane = load<P>(h + j);
        P slope;
        if (triangle) {
          slope = spike_slope<Surrogate::triangle>(membrane, neuron, scale);
        } else {
          slope = load<P>(b.slopes + j);
        }
        const StepGrad<P> grad =
            backward_step<kReset>(load<P>(grad_s + j), membrane, v, slope, neuron, b.detach_reset, state);
        store(grad_x + j, grad.x, b.past_caches);
        if (carried) store(carried + j, state.grad_v);
        if constexpr (kReset == Reset::soft_delayed) {
          if (!b.detach_reset) store(b.grad_reset + j, state.grad_reset);
        }
        if constexpr (!kSummed) continue;
        add_part(sums[kThresholdSum], part, grad.threshold);
        if (before) add_part(sums[kLeakSum], part, grad.leak);
        if constexpr (kNormalised) {
          add_part(sums[kGradSum], part, grad.x);
          add_part(sums[kDotSum], part, grad.x * (load<P>(x + j) - parameters.of(kMean, j)));
        }
      }
      if constexpr (kSummed && kAlong) add_to_rows<kSums<kNormalised>>(b, i, sums);
    }
    for (int k = 0; kSummed && k < kSums<kNormalised>; ++k) totals[k] = sums[k];
  }

  // What the spike of v0 owes, after the last step; its slopes are in b.slopes.
  template <int kBytes, bool kAlong, bool kSummed, typename V>
  static IIRSNN_INLINE void v0_row(const Block& b, V* sums) {
    using P = typename Parts<scalar_t, kBytes>::P;
    const PartParameters<P, kAlong, acc_t> parameters(b.parameters);
    for (int i = 0; i < b.n; i += V::kSize) {
      IIRSNN_REGISTERS
      for (int part = 0; part < Parts<scalar_t, kBytes>::kCount; ++part) {
        const int j = i + part * P::kSize;
        const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
        Carry<P> state{load<P>(b.grad_v0 + j), load<P>(b.grad_reset + j)};
        const P threshold = backward_v0_delayed(load<P>(b.v0 + j), load<P>(b.slopes + j), neuron, state);
        store(b.grad_v0 + j, state.grad_v);
        if constexpr (kSummed) add_part(sums[kThresholdSum], part, threshold);
      }
      if constexpr (kSummed && kAlong) add_to_rows<kSums<kNormalised>>(b, i, sums);
    }
  }
};

// T = 1 from v = 0, without grad_v: no membrane, no reset, no carry, no leak, and one pass.
template <typename scalar_t, Surrogate kSurrogate, bool kNormalised>
struct SingleBackwardRow {
  using Block = BackwardBlock<scalar_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* block) {
    const Block b = *block;  // which stores cannot change
    with_parameters(b.parameters, [&](auto along) IIRSNN_INLINE_LAMBDA {
      if (kNormalised || b.sums) return row<kBytes, decltype(along)::value, true>(b);
      row<kBytes, decltype(along)::value, false>(b);
    });
  }

 private:
  template <int kBytes, bool kAlong, bool kSummed>
  static IIRSNN_INLINE void row(const Block& b) {
    using V = typename Parts<scalar_t, kBytes>::V;
    using P = typename Parts<scalar_t, kBytes>::P;
    const PartParameters<P, kAlong, acc_t> parameters(b.parameters);
    constexpr int kCount = kSums<kNormalised>;
    const P zero = P(acc_t(0)), scale = P(b.scale);
    V sums[kCount];
    for (V& sum : sums) sum = V(acc_t(0));
    for (int i = 0; i < b.n; i += V::kSize) {
      IIRSNN_REGISTERS
      for (int part = 0; part < Parts<scalar_t, kBytes>::kCount; ++part) {
        const int j = i + part * P::kSize;
        const Neuron<P> neuron{zero, parameters.of(kInverse, j), zero, zero};
        Carry<P> carry{zero, zero};
        const P h = current_at<kNormalised, P>(b.x + j, parameters, j);
        const StepGrad<P> grad =
            backward_step<Reset::none, kSurrogate>(load<P>(b.grad_s + j), h, zero, neuron, scale, true, carry);
        store(b.grad_x + j, grad.x, b.past_caches);
        if constexpr (!kSummed) continue;
        add_part(sums[kThresholdSum], part, grad.threshold);
        if constexpr (kNormalised) {
          add_part(sums[kGradSum], part, grad.x);
          add_part(sums[kDotSum], part, grad.x * (load<P>(b.x + j) - parameters.of(kMean, j)));
        }
      }
      if constexpr (kSummed && kAlong) add_to_rows<kCount>(b, i, sums);
    }
    for (int k = 0; kSummed && !kAlong && k < kCount; ++k) store(b.sums + k * kRow<acc_t>, sums[k]);
  }
};

template <typename scalar_t, bool kNormalised>
auto single_backward_row(Surrogate surrogate) {
  switch (surrogate) {
    case Surrogate::triangle:
      return version<SingleBackwardRow<scalar_t, Surrogate::triangle, kNormalised>>();
    case Surrogate::atan:
      return version<SingleBackwardRow<scalar_t, Surrogate::atan, kNormalised>>();
    case Surrogate::sigmoid:
      return version<SingleBackwardRow<scalar_t, Surrogate::sigmoid, kNormalised>>();
    case Surrogate::fast_sigmoid:
      return version<SingleBackwardRow<scalar_t, Surrogate::fast_sigmoid, kNormalised>>();
    default:
      return version<SingleBackwardRow<scalar_t, Surrogate::boxcar, kNormalised>>();
  }
}

// sums: [chunks, kSums, C], or null: not wanted.
template <typename scalar_t, bool kNormalised>
void backward_blocks(const LifBackward& args, Channels<typename Convert<scalar_t>::acc_t>& channels, double* sums,
                     int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using x_t = kernel_t<scalar_t>;
  constexpr int kStride = kRow<x_t>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps;
  const bool single = steps == 1 && !args.v0 && !args.grad_v;
  const auto kernel =
      single ? single_backward_row<x_t, kNormalised>(args.surrogate) : with_reset(args.reset, [](auto reset) {
        return version<BackwardRows<x_t, decltype(reset)::value, kNormalised>>();
      });
  const bool some_staged = std::is_same_v<scalar_t, Half> || last_chunk == chunks_of(shape);
  const Scratch<x_t> copies(some_staged ? 3 * steps * kStride : 0);
  const int64_t segments = (steps - 1) / kSegment, rows = std::min<int64_t>(steps, kSegment) + segments;
  const Scratch<acc_t> scratch((rows + 6) * kRow<acc_t>);
  const auto row = [&](int64_t k) { return scratch.data() + k * kRow<acc_t>; };
  ChannelSums<acc_t> channel_sums(shape, kSums<kNormalised>);
  BackwardBlock<x_t> block{};
  block.timesteps = steps;
  block.v_reset = acc_t(args.v_reset);
  block.detach_reset = args.detach_reset;
  block.surrogate = args.surrogate;
  block.slope_row = args.surrogate == Surrogate::triangle ? nullptr : slope_row<acc_t>(args.surrogate);
  block.scale = acc_t(args.surrogate_scale);
  block.membranes = row(0);
  block.checkpoints = row(rows - segments);
  block.slopes = row(rows);
  block.grad_membrane = row(rows + 1);
  block.grad_reset = row(rows + 2);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t totals = kSums<kNormalised> * shape.channels;
    if (sums) std::fill_n(sums + chunk * totals, totals, 0.0);
    for_each_block(shape, chunk, [&](const Range& range) {
      const int n = range.n;
      const bool copied = staged<scalar_t>(n);
      const auto at = [&](auto* type, const void* tensor) {
        return tensor ? static_cast<decltype(type)>(const_cast<void*>(tensor)) + range.begin : nullptr;
      };
      constexpr scalar_t* kScalar = nullptr;
      constexpr acc_t* kAcc = nullptr;
      scalar_t *x = at(kScalar, args.x), *grad_s = at(kScalar, args.grad_s), *grad_x = at(kScalar, args.grad_x);
      acc_t *v0 = at(kAcc, args.v0), *grad_v = at(kAcc, args.grad_v), *grad_v0 = at(kAcc, args.grad_v0);
      block.n = whole_vectors<scalar_t>(n);
      block.parameters = channels.of(range);
      block.sums = sums ? channel_sums.rows(range) : nullptr;
      block.v0 = v0;
      block.grad_v = grad_v;
      block.grad_v0 = grad_v0;
      if (copied) {
        block.x = block.next = copies.data();
        block.grad_s = copies.data() + steps * kStride;
        block.grad_x = copies.data() + 2 * steps * kStride;
        block.x_stride = block.grad_s_stride = block.grad_x_stride = kStride;
        block.past_caches = false;
        stage(x, shape.x_stride_t, steps, n, copies.data());
        stage(grad_s, args.grad_s_stride_t, steps, n, copies.data() + steps * kStride);
        if (v0) stage(v0, 0, 1, n, row(rows + 3));
        if (grad_v) stage(grad_v, 0, 1, n, row(rows + 4));
        block.v0 = v0 ? row(rows + 3) : nullptr;
        block.grad_v = grad_v ? row(rows + 4) : nullptr;
        block.grad_v0 = grad_v0 ? row(rows + 5) : nullptr;
      } else if constexpr (!std::is_same_v<scalar_t, Half>) {
        block.x = x;
        block.x_stride = shape.x_stride_t;
        block.next = range.last || range.begin + 2 * n > shape.neurons ? x : x + n;
        block.grad_s = grad_s;
        block.grad_s_stride = args.grad_s_stride_t;
        block.grad_x = grad_x;
        block.grad_x_stride = shape.neurons;
        block.past_caches = past_caches<scalar_t>(shape, args.grad_x);
      }
      kernel(&block);
      if (sums) channel_sums.add(range, sums + chunk * totals);
      if (copied) unstage(block.grad_x, steps, n, grad_x, shape.neurons);
      if (copied && grad_v0) unstage(block.grad_v0, 1, n, grad_v0, 0);
    });
  }
  settle();
}

// Compiled in files of their own, which takes two processors half the time.
#define IIRSNN_BACKWARD_BLOCKS(scalar_t, normalised)                                                           \
  template void backward_blocks<scalar_t, normalised>(const LifBackward&, Channels<Convert<scalar_t>::acc_t>&, \
                                                      double*, int64_t, int64_t)
extern IIRSNN_BACKWARD_BLOCKS(double, false);
extern IIRSNN_BACKWARD_BLOCKS(BFloat16, false);
extern IIRSNN_BACKWARD_BLOCKS(BFloat16, true);

}  // namespace iirsnn
