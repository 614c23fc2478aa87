// Gradients of a range of chunks: reads x and grad_s and writes grad_x, 3 T N scalars. The membranes of a block are
// computed anew, row by row, into scratch memory that stays in the caches; for more than kSegment timesteps, one row in
// kSegment is kept and the others are computed once more. A row is one call: its loop has nothing else in registers.
#pragma once

#include <optional>

#include "lif/cpu/rows.h"
#include "lif/cpu/slopes.h"
#include "lif/cpu/sums.h"

namespace iirsnn {

// A row of a block: one timestep of n neurons, whole vectors; pointers to the first of them.
template <typename scalar_t>
struct BackwardRow {
  using acc_t = typename Convert<scalar_t>::acc_t;
  int n;
  Parameters<acc_t> parameters;
  acc_t v_reset, scale;
  bool detach_reset;
  bool past_caches;  // write grad_x so
  const scalar_t *x, *grad_s;
  scalar_t* grad_x;
  const scalar_t *next, *next_grad_x;  // of the row that comes next
  const acc_t* before;                 // the membrane that the timestep starts from, or null: 0
  bool fired;                          // whether it has not been reset yet
  acc_t* h;
  const acc_t* slopes;        // or null: triangle, which is computed where it is needed
  const acc_t* grad_v_after;  // of the membrane that the timestep leaves
  acc_t* grad_v;              // of the one it starts from
  acc_t* grad_reset;          // see Carry
  acc_t* sums;                // see ChannelSums; null where every piece is of one channel
  int64_t sums_stride;
  double* totals;  // of channels, or null: not wanted
};

// f(std::bool_constant<whether sums are wanted>()).
template <bool kAlways, typename Row, typename F>
IIRSNN_INLINE void with_sums(const Row& b, F f) {
  if (kAlways || b.totals) return f(std::true_type());
  if constexpr (!kAlways) f(std::false_type());
}

// f(j, parameters, sums) for each part of the pieces of a row, from neuron j on, after ahead(j); kCount are summed, if
// any. Where kLoops > 0, pieces may be of any length from a part on: the last part begins in the one before, and what
// was summed there is not again; in a loop of its own, of 2, or with all others in one, which compiles in less time.
template <int kCount, typename P, int kBytes, int kLoops = 0, typename Row, typename Ahead, typename F>
IIRSNN_INLINE void for_each_part(const Row& b, Ahead ahead, F f) {
  for_each_piece<P>(b.parameters, b.n, [&](const auto& parameters, int begin, int end) IIRSNN_INLINE_LAMBDA {
    constexpr bool kSeveral = std::decay_t<decltype(parameters)>::kSeveral, kAnyLength = kLoops > 0 && !kSeveral;
    PieceSums<P, typename Row::acc_t, kCount, kBytes, kSeveral> sums(b.sums, b.sums_stride, b.totals,
                                                                     b.parameters.channels);
    const int last = end - P::kSize;
    if constexpr (kAnyLength && kLoops == 1) {
      IIRSNN_ROLLED
      for (int j = begin; j < end; j += P::kSize) {
        const int at = std::min(j, last);
        ahead(at);
        f(at, parameters, SumsOfRest(sums, j - at));
      }
    } else {
      int j = begin;
      IIRSNN_ROLLED
      for (; j <= last; j += P::kSize) {
        ahead(j);
        f(j, parameters, sums);
      }
      if constexpr (kAnyLength) {
        if (j < end) f(last, parameters, SumsOfRest(sums, j - last));
      }
    }
    sums.finish(kSeveral ? 0 : parameters.channel());
  });
}

// h from x and the membrane before.
template <typename scalar_t, Reset kReset, bool kNormalised>
struct ChargeRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const BackwardRow<scalar_t>* row) {
    using P = typename Parts<scalar_t, kBytes>::P;
    const BackwardRow<scalar_t> b = *row;  // which stores cannot change
    const auto ahead = [&](int j) IIRSNN_INLINE_LAMBDA { prefetch<P>(b.next + j); };
    if (!b.before) {
      return for_each_part<0, P, kBytes>(b, ahead, [&](int j, const auto& parameters, auto&) IIRSNN_INLINE_LAMBDA {
        store(b.h + j, current_at<kNormalised, P>(b.x + j, parameters, j));
      });
    }
    for_each_part<0, P, kBytes>(b, ahead, [&](int j, const auto& parameters, auto&) IIRSNN_INLINE_LAMBDA {
      const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
      P v = load<P>(b.before + j);
      if (b.fired) v = discharge<kReset>(v, neuron);
      store(b.h + j, charge<kReset>(current_at<kNormalised, P>(b.x + j, parameters, j), v, neuron));
    });
  }
};

// grad_x and what is carried on, from grad_s and h.
template <typename scalar_t, Reset kReset, bool kNormalised>
struct StepRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const BackwardRow<scalar_t>* row) {
    const BackwardRow<scalar_t> b = *row;  // which stores cannot change
    with_sums<kNormalised>(b, [&](auto summed) IIRSNN_INLINE_LAMBDA {
      constexpr bool kSummed = decltype(summed)::value;
      if (b.slopes) return steps<kBytes, kSummed, false>(b);
      steps<kBytes, kSummed, true>(b);
    });
  }

 private:
  template <int kBytes, bool kSummed, bool kTriangle>
  static IIRSNN_INLINE void steps(const BackwardRow<scalar_t>& b) {
    using P = typename Parts<scalar_t, kBytes>::P;
    using acc_t = typename Convert<scalar_t>::acc_t;
    const P zero = P(acc_t(0)), scale = P(b.scale);
    const auto ahead = [&](int j) IIRSNN_INLINE_LAMBDA {
      prefetch<P>(b.next + j);
      if (!b.past_caches) prefetch<P>(b.next_grad_x + j);
    };
    constexpr int kCount = kSummed ? kSums<kNormalised> : 0;
    for_each_part<kCount, P, kBytes>(b, ahead, [&](int j, const auto& parameters, auto& sums) IIRSNN_INLINE_LAMBDA {
      const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
      P v = zero;
      if ((kSummed || kReset == Reset::soft_delayed) && b.before) {
        v = load<P>(b.before + j);
        if (b.fired) v = discharge<kReset>(v, neuron);
      }
      Carry<P> state{load<P>(b.grad_v_after + j), zero};
      if (kReset == Reset::soft_delayed && !b.detach_reset) state.grad_reset = load<P>(b.grad_reset + j);
      const P h = load<P>(b.h + j);
      P slope;
      if constexpr (kTriangle) {
        slope = spike_slope<Surrogate::triangle>(h, neuron, scale);
      } else {
        slope = load<P>(b.slopes + j);
      }
      const StepGrad<P> grad = backward_step<kReset>(load<P>(b.grad_s + j), h, v, slope, neuron, b.detach_reset, state);
      store(b.grad_x + j, grad.x, b.past_caches);
      store(b.grad_v + j, state.grad_v);
      if (kReset == Reset::soft_delayed && !b.detach_reset) store(b.grad_reset + j, state.grad_reset);
      if constexpr (kSummed) {
        sums.add(kThresholdSum, j, grad.threshold);
        if (b.before) sums.add(kLeakSum, j, grad.leak);
      }
      if constexpr (kNormalised) {
        sums.add(kGradSum, j, grad.x);
        sums.add(kDotSum, j, grad.x * (load<P>(b.x + j) - parameters.of(kMean, j)));
      }
    });
  }
};

// What the spike of v0 owes, after the last step; with the slopes of v0, which is `before`.
template <typename scalar_t>
struct FirstSpikeRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const BackwardRow<scalar_t>* row) {
    using P = typename Parts<scalar_t, kBytes>::P;
    const BackwardRow<scalar_t> b = *row;
    with_sums<false>(b, [&](auto summed) IIRSNN_INLINE_LAMBDA {
      constexpr int kCount = decltype(summed)::value ? 1 : 0;
      const auto ahead = [](int) {};
      for_each_part<kCount, P, kBytes>(b, ahead, [&](int j, const auto& parameters, auto& sums) IIRSNN_INLINE_LAMBDA {
        const Neuron<P> neuron = parameters.neuron(j, b.v_reset);
        Carry<P> state{load<P>(b.grad_v + j), load<P>(b.grad_reset + j)};
        const P threshold = backward_v0_delayed(load<P>(b.before + j), load<P>(b.slopes + j), neuron, state);
        store(b.grad_v + j, state.grad_v);
        if constexpr (kCount > 0) sums.add(kThresholdSum, j, threshold);
      });
    });
  }
};

// Pointers to the first neuron of a block, at t = 0.
template <typename scalar_t>
struct BackwardBlock {
  using acc_t = typename Convert<scalar_t>::acc_t;
  int64_t timesteps;
  const scalar_t *x, *grad_s;
  scalar_t* grad_x;
  int64_t x_stride, grad_s_stride, grad_x_stride;
  const scalar_t* next;  // x of the block after
  int passes;            // that the block is of: 1, or several of one timestep that rows of sums are for
  int64_t pass;          // neurons of one
  int64_t step;          // from the block to the one that comes next
  const acc_t* v0;       // or null
  const acc_t* grad_v;   // or null
  acc_t* grad_v0;        // or null
};

// What a pass backward is for. A current that is normalised takes two: sums, and from them the gradient.
enum class Pass { all, sums, grad_x };

// See through_time.h; of the instruction set in force, null where these go through rows.
template <typename scalar_t>
using ThroughTimeLoop = void (*)(const BackwardBlock<scalar_t>*, const BackwardRow<scalar_t>*);
template <typename scalar_t, Pass kPass>
ThroughTimeLoop<scalar_t> through_time(const LifBackward& args);

// Timesteps up to which the gradients of parameters take two passes at once past each row.
constexpr int kPassesAtOnce = 2;

// Whole channels for loops that may compute a neuron twice, as they only read what they are given; but streams past the
// caches want vectors that start where cache lines do.
template <typename scalar_t, Pass kPass>
Walk walk_of(const LifBackward& args) {
  const LifShape& shape = args.shape;
  const bool fast = through_time<kernel_t<scalar_t>, kPass>(args);
  const bool streams = shape.timesteps == 1 && large(shape);
  // long channels take blocks of pieces else, which cost less than vectors that lie in two cache lines, more with sums
  const bool summed = kPass == Pass::sums || (kPass == Pass::all && args.grad_threshold);
  const bool pays = summed || shape.inner <= kBlock || shape.inner % 16 == 0;
  return fast && whole_channels(shape) && !streams && pays ? Walk::channels : walk_of(shape);
}

// The loops over rows, of the instruction set in force.
template <typename scalar_t>
struct RowLoops {
  using Loop = void (*)(const BackwardRow<scalar_t>*);
  Loop charge, step, first_spike;
  SlopeRow<typename Convert<scalar_t>::acc_t> slopes;  // null: triangle, which `step` computes itself
  SlopeRow<typename Convert<scalar_t>::acc_t> first_slopes;
};
template <typename scalar_t, bool kNormalised>
RowLoops<scalar_t> row_loops(const LifBackward& args) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  RowLoops<scalar_t> loops{};
  with_reset(args.reset, [&](auto reset) {
    constexpr Reset kReset = decltype(reset)::value;
    loops.charge = version<ChargeRow<scalar_t, kReset, kNormalised>>();
    loops.step = version<StepRow<scalar_t, kReset, kNormalised>>();
  });
  const bool owed = args.reset == Reset::soft_delayed && args.v0 && !args.detach_reset;
  loops.first_spike = owed ? version<FirstSpikeRow<scalar_t>>() : nullptr;
  loops.first_slopes = slope_row<acc_t>(args.surrogate);
  loops.slopes = args.surrogate == Surrogate::triangle ? nullptr : loops.first_slopes;
  return loops;
}

// Scratch memory of a thread, in rows of a block; a cache line more, or they would share sets of the L1 cache. There is
// none before a row is asked for: most calls need none.
template <typename acc_t>
class BackwardScratch {
 public:
  enum Row { kSlopes, kGradV, kGradReset, kZeros, kV0, kGradVAfter, kGradV0, kRows };
  explicit BackwardScratch(const LifShape& shape)
      : stride_(std::min(block_neurons(shape), row_neurons(shape)) + kCacheLine / int64_t(sizeof(acc_t))),
        segments_((shape.timesteps - 1) / kSegment),
        rows_(kRows + segments_ + std::min<int64_t>(shape.timesteps, kSegment)) {}
  acc_t* operator[](Row k) { return row(k); }
  acc_t* checkpoint(int64_t segment) { return row(kRows + segment); }
  acc_t* membranes(int t) { return row(kRows + segments_ + t); }

 private:
  acc_t* row(int64_t k) {
    if (!memory_) {
      memory_.emplace(rows_ * stride_);
      std::fill_n(row(kZeros), stride_, acc_t(0));
    }
    return memory_->get() + k * stride_;
  }
  const int64_t stride_, segments_, rows_;
  std::optional<Buffer<acc_t>> memory_;
};

// row: all that holds for the whole block.
template <typename scalar_t, typename acc_t = typename Convert<scalar_t>::acc_t>
void backward_block(const BackwardBlock<scalar_t>& b, const RowLoops<scalar_t>& loops, BackwardScratch<acc_t>& scratch,
                    BackwardRow<scalar_t>& row) {
  using Rows = BackwardScratch<acc_t>;
  acc_t* const slopes = scratch[Rows::kSlopes];
  row.slopes = loops.slopes ? slopes : nullptr;
  const int64_t last = (b.timesteps - 1) / kSegment;
  row.grad_v_after = b.grad_v ? b.grad_v : scratch[Rows::kZeros];
  row.grad_reset = scratch[Rows::kGradReset];
  std::fill_n(row.grad_reset, row.detach_reset ? 0 : row.n, acc_t(0));
  // up through the segments for their checkpoints, down again for the gradients
  for (int64_t visit = 0; visit <= 2 * last; ++visit) {
    const int64_t segment = visit <= last ? visit : 2 * last - visit, start = segment * kSegment;
    const int length = int(std::min<int64_t>(kSegment, b.timesteps - start));
    const acc_t* const first = segment > 0 ? scratch.checkpoint(segment - 1) : b.v0;
    row.before = first;
    for (int t = 0; t < length; ++t) {
      row.x = b.x + (start + t) * b.x_stride;
      row.next = t + 1 < length ? row.x + b.x_stride : b.grad_s + (start + t) * b.grad_s_stride;
      row.fired = start + t > 0;
      row.h = visit < last && t + 1 == length ? scratch.checkpoint(segment) : scratch.membranes(t);
      loops.charge(&row);
      row.before = row.h;
    }
    if (visit < last) continue;
    for (int t = length - 1; t >= 0; --t) {
      const int64_t at = start + t;
      row.x = b.x + at * b.x_stride;
      row.grad_s = b.grad_s + at * b.grad_s_stride;
      row.grad_x = b.grad_x + at * b.grad_x_stride;
      row.next = at > 0 ? row.grad_s - b.grad_s_stride : b.next;
      row.next_grad_x = at > 0 ? row.grad_x - b.grad_x_stride : row.grad_x;
      row.h = scratch.membranes(t);
      row.before = t > 0 ? scratch.membranes(t - 1) : first;
      row.fired = at > 0;
      row.grad_v = at > 0 || !b.grad_v0 ? scratch[Rows::kGradV] : b.grad_v0;
      if (loops.slopes) loops.slopes(row.h, &row.parameters, row.scale, slopes, row.n);
      loops.step(&row);
      row.grad_v_after = row.grad_v;
    }
  }
  if (loops.first_spike) {
    loops.first_slopes(b.v0, &row.parameters, row.scale, slopes, row.n);
    row.slopes = slopes;
    loops.first_spike(&row);
  }
}

// sums: [chunks, kSums, C], or null: not wanted. Of a chunk those of the channels that it meets, of the first all.
template <typename scalar_t, Pass kPass>
void backward_blocks(const LifBackward& args, Channels<typename Convert<scalar_t>::acc_t>& channels, double* sums,
                     int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using x_t = kernel_t<scalar_t>;
  using Rows = BackwardScratch<acc_t>;
  constexpr int kCount = kSums<kPass != Pass::all>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps, stride = row_stride<x_t>(shape), acc_stride = row_stride<acc_t>(shape);
  const auto fast = through_time<x_t, kPass>(args);
  const RowLoops<x_t> loops = row_loops<x_t, kPass != Pass::all>(args);
  const Buffer<x_t> copies(some_staged<scalar_t>(shape, channels.walk(), last_chunk) ? 3 * steps * stride : 0);
  BackwardScratch<acc_t> scratch(shape);
  const bool in_rows = sums && shape.channels > 1 && !channels.whole();
  ChannelSums<acc_t> channel_sums(shape, in_rows ? kCount : 0, steps > 1 || args.v0, channels.walk());
  BackwardRow<x_t> row{};
  row.v_reset = acc_t(args.v_reset);
  row.scale = acc_t(args.surrogate_scale);
  row.detach_reset = args.detach_reset;
  row.sums_stride = channel_sums.stride();
  BackwardBlock<x_t> block{};
  block.timesteps = steps;
  const Columns columns(shape);
  block.pass = columns.pass;
  const bool in_place = fast && !std::is_same_v<scalar_t, Half>;
  const int64_t most = in_place ? columns.pass : block_neurons(shape);
  const bool whole = channels.whole(), summed = sums && kPass == Pass::all && channels.several();
  const int most_passes = summed && in_place && steps <= kPassesAtOnce ? 2 : 1;
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t totals = kCount * shape.channels;
    if (sums) clear_sums(shape, channels.walk(), chunk, kCount, sums);
    for_each_block(shape, chunk, channels.walk(), most, most_passes, [&](const Range& range) {
      const int n = range.n;
      const bool copied = whole ? std::is_same_v<scalar_t, Half> : staged<scalar_t>(n);
      const auto at = [&](auto* type, const void* tensor) {
        return tensor ? static_cast<decltype(type)>(const_cast<void*>(tensor)) + range.begin : nullptr;
      };
      constexpr scalar_t* kScalar = nullptr;
      constexpr acc_t* kAcc = nullptr;
      scalar_t *x = at(kScalar, args.x), *grad_s = at(kScalar, args.grad_s), *grad_x = at(kScalar, args.grad_x);
      acc_t *v0 = at(kAcc, args.v0), *grad_v = at(kAcc, args.grad_v), *grad_v0 = at(kAcc, args.grad_v0);
      row.n = whole ? n : whole_vectors<scalar_t>(n);
      row.parameters = channels.of(range);
      row.sums = in_rows ? channel_sums.rows(range) : nullptr;
      row.totals = sums ? sums + chunk * totals : nullptr;
      block.passes = range.passes;
      block.step = channels.walk() == Walk::columns ? range.passes * block.pass : n;
      block.v0 = v0;
      block.grad_v = grad_v;
      block.grad_v0 = grad_v0;
      if (copied) {
        block.x = block.next = copies.get();
        block.grad_s = copies.get() + steps * stride;
        block.grad_x = copies.get() + 2 * steps * stride;
        block.x_stride = block.grad_s_stride = block.grad_x_stride = stride;
        row.past_caches = false;
        stage(x, shape.x_stride_t, steps, n, copies.get(), stride);
        stage(grad_s, args.grad_s_stride_t, steps, n, copies.get() + steps * stride, stride);
        if (v0) stage(v0, 0, 1, n, scratch[Rows::kV0], acc_stride);
        if (grad_v) stage(grad_v, 0, 1, n, scratch[Rows::kGradVAfter], acc_stride);
        block.v0 = v0 ? scratch[Rows::kV0] : nullptr;
        block.grad_v = grad_v ? scratch[Rows::kGradVAfter] : nullptr;
        block.grad_v0 = grad_v0 ? scratch[Rows::kGradV0] : nullptr;
      } else if constexpr (!std::is_same_v<scalar_t, Half>) {
        block.x = x;
        block.x_stride = shape.x_stride_t;
        block.next = range.last || range.begin + 2 * n > shape.neurons ? x : x + n;
        block.grad_s = grad_s;
        block.grad_s_stride = args.grad_s_stride_t;
        block.grad_x = grad_x;
        block.grad_x_stride = shape.neurons;
        row.past_caches = past_caches<scalar_t>(shape, args.grad_x);
      }
      if (fast) {
        fast(&block, &row);
      } else {
        backward_block(block, loops, scratch, row);
      }
      if (in_rows) channel_sums.add(range, row.parameters, row.totals);
      if (copied && !(fast && kPass == Pass::sums)) unstage(block.grad_x, stride, steps, n, grad_x, shape.neurons);
      if (copied && grad_v0) unstage(block.grad_v0, acc_stride, 1, n, grad_v0, 0);
    });
  }
  settle();
}

// Compiled in files of their own, which takes two processors half the time.
#define IIRSNN_BACKWARD_BLOCKS(scalar_t, pass)                                                                 \
  template void backward_blocks<scalar_t, Pass::pass>(const LifBackward&, Channels<Convert<scalar_t>::acc_t>&, \
                                                      double*, int64_t, int64_t)
extern IIRSNN_BACKWARD_BLOCKS(double, all);
extern IIRSNN_BACKWARD_BLOCKS(BFloat16, all);
extern IIRSNN_BACKWARD_BLOCKS(BFloat16, sums);
extern IIRSNN_BACKWARD_BLOCKS(BFloat16, grad_x);

}  // namespace iirsnn
