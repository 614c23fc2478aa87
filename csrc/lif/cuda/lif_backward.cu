// LIF backward: what it moves stands in lif_cuda.h.
#include "lif/cuda/backward.h"
#include "lif/cuda/lif_cuda.h"
#include "lif/cuda/walk.h"

namespace iirsnn::cuda {
namespace {

constexpr int kAtOnce = 2;  // packets of x, and of grad_s, at T = 1
constexpr int kTurns = 16;  // of blocks, without sums: more gain nothing

template <typename acc_t>
struct Inputs {
  const acc_t *threshold, *leak, *v0, *grad_v;  // leak is null where it plays no part
};

template <typename acc_t>
struct SumsOut {
  acc_t *grad_threshold, *grad_leak;
  double* partials;
  uint32_t* counters;
};

template <int kSize, bool kColumns, typename acc_t>
__device__ __forceinline__ void load_parameters(Neuron<acc_t> (&neurons)[Place<kSize, kColumns>::kChannels],
                                                const acc_t* __restrict__ threshold, const acc_t* __restrict__ leak,
                                                acc_t v_reset, const Walk& walk, const Place<kSize, kColumns>& place) {
#pragma unroll
  for (int c = 0; c < Place<kSize, kColumns>::kChannels; ++c) {
    neurons[c] = {acc_t(1), acc_t(1), acc_t(0), v_reset};
    if (place.channel + c >= walk.channels) continue;
    const acc_t value = threshold[place.channel + c];
    neurons[c] = {value, div(acc_t(1), value), leak ? leak[place.channel + c] : acc_t(0), v_reset};
  }
}

// sums: [kSums, kSize] of a thread: of threshold, and of leak unless it plays no part. total: kGroupDoubles of them.
template <int kSums, int kSize, bool kColumns, typename acc_t>
__device__ __forceinline__ void finish_sums(double* total, const acc_t (&sums)[kSums * kSize],
                                            const SumsOut<acc_t>& out, const Walk& walk,
                                            const Place<kSize, kColumns>& place) {
  constexpr int kChannels = Place<kSize, kColumns>::kChannels, kCount = kSums * kChannels;
  double mine[kCount];
  add_neurons<kSums, kSize, kColumns>(mine, sums);
  if (!sum_group(total, mine, walk, place, out.partials, out.counters)) return;
  for (int i = threadIdx.x; i < walk.cols * kChannels; i += kWalkThreads) {
    const int64_t channel = int64_t(place.group) * walk.cols * kChannels + i;
    if (channel >= walk.channels) return;
    const double* of_column = total + i / kChannels * kCount + i % kChannels;
    out.grad_threshold[channel] = acc_t(of_column[0]);
    out.grad_leak[channel] = kSums > 1 ? acc_t(of_column[(kSums - 1) * kChannels]) : acc_t(0);
  }
}

// T = 1 from rest, and nothing arrives at the membrane.
template <typename scalar_t, int kSize, bool kColumns, bool kSummed>
__global__ void __launch_bounds__(kWalkThreads, sizeof(scalar_t) == 8 || (kSummed && kSize > 4) ? 5
                                                : kSize > 4                                     ? 6
                                                                                                : 8)
    single_backward_kernel(const scalar_t* __restrict__ grad_s, const scalar_t* __restrict__ x,
                           const acc_of<scalar_t>* __restrict__ threshold, scalar_t* __restrict__ grad_x,
                           int64_t neurons, const __grid_constant__ BackwardOptions<acc_of<scalar_t>> options,
                           const __grid_constant__ SumsOut<acc_of<scalar_t>> out, const __grid_constant__ Walk walk) {
  using acc_t = acc_of<scalar_t>;
  const Place<kSize, kColumns> place(walk);
  Packet<scalar_t, kSize> current[kAtOnce], grad[kAtOnce];
  int64_t at[kAtOnce];
  const auto load_from = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      at[i] = place.at(walk, first + i * place.step);
      if (first + i * place.step >= place.end) continue;
      current[i] = load_tail<kSize>(x, at[i], neurons);
      grad[i] = load_tail<kSize>(grad_s, at[i], neurons);
    }
  };
  load_from(place.first);  // before the parameters, whose division would wait first
  Neuron<acc_t> parameters[Place<kSize, kColumns>::kChannels];
  load_parameters(parameters, threshold, static_cast<const acc_t*>(nullptr), options.v_reset, walk, place);
  acc_t sums[kSize] = {};
  for (int64_t first = place.first; first < place.end;) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * place.step >= place.end) break;
      acc_t h[kSize], g[kSize], slopes[kSize];
      widen(h, current[i]);
      widen(g, grad[i]);
      Neuron<acc_t> neuron[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) neuron[k] = parameters[kColumns ? k : 0];
      spike_slopes(slopes, h, neuron, options.surrogate, options.scale);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        Carry<acc_t> carry{};
        const auto step = backward_step<Reset::none>(g[k], h[k], acc_t(0), slopes[k], neuron[k], true, carry);
        if constexpr (kSummed) sums[k] = add(sums[k], step.threshold);
        g[k] = step.x;
      }
      store_tail(grad_x, at[i], neurons, narrow<scalar_t>(g));
    }
    first += kAtOnce * place.step;
    load_from(first);
  }
  if constexpr (kSummed) {
    __shared__ double total[kGroupDoubles<Place<kSize, kColumns>::kChannels>];
    finish_sums<1>(total, sums, out, walk, place);
  }
}

// Blocks of a multiprocessor: the most for which nothing spills.
template <typename scalar_t, int kSize, Reset kReset, bool kSummed>
constexpr int kBlocks = sizeof(scalar_t) == 8 || kSize > 4                                   ? 4
                        : kReset == Reset::soft_delayed || (kSummed && kArchitecture != 900) ? 5
                                                                                             : 6;

// Any number of timesteps, in segments of kSegment. checkpoints: [segments - 2, N], the membranes that the segments
// between the first and the last start from.
template <typename scalar_t, int kSize, bool kColumns, Reset kReset, bool kSummed>
__global__ void __launch_bounds__(kWalkThreads, kBlocks<scalar_t, kSize, kReset, kSummed>)
    backward_kernel(const scalar_t* __restrict__ grad_s, int64_t grad_s_stride_t, const scalar_t* __restrict__ x,
                    int64_t x_stride_t, const __grid_constant__ Inputs<acc_of<scalar_t>> inputs,
                    scalar_t* __restrict__ grad_x, acc_of<scalar_t>* __restrict__ grad_v0,
                    acc_of<scalar_t>* checkpoints, int64_t timesteps, int64_t count,
                    const __grid_constant__ BackwardOptions<acc_of<scalar_t>> options,
                    const __grid_constant__ SumsOut<acc_of<scalar_t>> out, const __grid_constant__ Walk walk) {
  using acc_t = acc_of<scalar_t>;
  extern __shared__ uint4 memory[];
  const Place<kSize, kColumns> place(walk);
  const int64_t last = (timesteps - 1) / kSegment * kSegment;  // where the last segment starts
  const Stage<scalar_t, kSize> stage(memory, segment_steps(timesteps), x_stride_t, grad_s_stride_t);
  constexpr int kStep = stage.kStep;
  const auto ask = [&](int64_t t0, int64_t n) {
    const int steps = segment_steps(timesteps - t0);
    stage.ask_x(x + t0 * x_stride_t + n, x_stride_t, steps);
    stage.ask_grad(grad_s + t0 * grad_s_stride_t + n, grad_s_stride_t, steps);
  };
  bool asked = last == 0 && place.first < place.end;
  if (asked) ask(0, place.at(walk, place.first));  // before the parameters, whose division would wait first
  Neuron<acc_t> parameters[Place<kSize, kColumns>::kChannels], neurons[kSize];
  load_parameters(parameters, inputs.threshold, inputs.leak, options.v_reset, walk, place);
#pragma unroll
  for (int k = 0; k < kSize; ++k) neurons[k] = parameters[kColumns ? k : 0];
  acc_t sums[2 * kSize] = {};
  for (int64_t packet = place.first; packet < place.end; packet += place.step) {
    const int64_t n = place.at(walk, packet);
    acc_t start[kSize] = {};  // the membranes a segment starts from
    if (inputs.v0 != nullptr) load_membrane(start, inputs.v0 + n);
    for (int64_t t0 = 0; t0 < last; t0 += kSegment) {
      if (t0 > 0) store_membrane(checkpoints + (t0 / kSegment - 1) * count + n, start);
      stage.ask_x(x + t0 * x_stride_t + n, x_stride_t, kSegment);
      wait_for_copies();
      const scalar_t* x_at = stage.x;
#pragma unroll 1
      for (int j = 0; j < kSegment; ++j, x_at += stage.x_step) {
        acc_t current[kSize];
        widen(current, load<kSize>(x_at));
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          start[k] = discharge<kReset>(charge<kReset>(current[k], start[k], neurons[k]), neurons[k]);
      }
    }
    acc_t grad_v_last[kSize] = {};
    if (inputs.grad_v != nullptr) load_membrane(grad_v_last, inputs.grad_v + n);
    Carry<acc_t> carry[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) carry[k] = {grad_v_last[k], acc_t(0)};
    for (int64_t t0 = last;;) {
      if (!asked) ask(t0, n);
      asked = false;
      const int steps = segment_steps(timesteps - t0);
      acc_t h[kSize], v[kSize], *kept = stage.h;
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] = start[k];
      const scalar_t* x_at = stage.x;
      wait_for_copies();
#pragma unroll 1
      for (int j = 0; j < steps; ++j, x_at += stage.x_step) {
        if (j > 0) stage.keep(kept, h), kept += kStep;
        acc_t current[kSize];
        widen(current, load<kSize>(x_at));
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          h[k] = charge<kReset>(current[k], v[k], neurons[k]);
          v[k] = discharge<kReset>(h[k], neurons[k]);
        }
      }
      const scalar_t* grad_at = stage.grad + (steps - 1) * stage.grad_step;
      scalar_t* to = grad_x + (t0 + steps - 1) * count + n;
#pragma unroll 1
      for (int j = steps - 1; j >= 0; --j, grad_at -= stage.grad_step, to -= count) {
        acc_t grad[kSize], slopes[kSize], earlier[kSize] = {};
        widen(grad, load<kSize>(grad_at));
        if (j > 0) stage.take(earlier, kept -= kStep);
        spike_slopes(slopes, h, neurons, options.surrogate, options.scale);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const acc_t before = j > 0 ? discharge<kReset>(earlier[k], neurons[k]) : start[k];
          const auto step =
              backward_step<kReset>(grad[k], h[k], before, slopes[k], neurons[k], options.detach_reset, carry[k]);
          if constexpr (kSummed) {
            sums[k] = add(sums[k], step.threshold);
            sums[kSize + k] = fma(step.x, before, sums[kSize + k]);
          }
          grad[k] = step.x;
          h[k] = earlier[k];
        }
        store(to, narrow<scalar_t>(grad));
      }
      if (t0 == 0) break;
      t0 -= kSegment;
      if (t0 > 0)
        load_membrane(start, checkpoints + (t0 / kSegment - 1) * count + n);
      else if (inputs.v0 != nullptr)
        load_membrane(start, inputs.v0 + n);
      else
        for (acc_t& at_rest : start) at_rest = acc_t(0);
    }
    if constexpr (kReset == Reset::soft_delayed) {
      if (inputs.v0 != nullptr && !options.detach_reset) {
        acc_t slopes[kSize];
        spike_slopes(slopes, start, neurons, options.surrogate, options.scale);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const acc_t grad_threshold = backward_v0_delayed(start[k], slopes[k], neurons[k], carry[k]);
          if constexpr (kSummed) sums[k] = add(sums[k], grad_threshold);
        }
      }
    }
    if (grad_v0 != nullptr) {
      acc_t grad_start[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) grad_start[k] = carry[k].grad_v;
      store_membrane(grad_v0 + n, grad_start);
    }
  }
  if constexpr (kSummed) {
    __syncthreads();  // the stage is done with
    finish_sums<2>(reinterpret_cast<double*>(memory), sums, out, walk, place);
  }
}

// One timestep and no membrane: the kernels of T = 1.
bool from_rest(const LifBackward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.grad_v; }

Walk plan(const LifBackward& args, int& size) {
  LifShape shape = args.shape;
  const int64_t bytes = size_of(shape.dtype);
  // The only kernel that may end within a packet: at any other T that would put the next row off its 16 bytes.
  if (from_rest(args) && shape.channels == 1) shape.neurons = ceil_div(shape.neurons, 16 / bytes) * (16 / bytes);
  size = walk_packet(shape, stage_packet(shape), args.grad_s_stride_t, args.grad_s, args.grad_v, args.x, args.v0,
                     args.grad_x, args.grad_v0);
  if (size == 1) shape = args.shape;
  return walk_of(shape, size);
}

int64_t checkpoint_bytes(const LifShape& shape) {
  const int64_t segments = ceil_div(shape.timesteps, kSegment);
  return ceil_div(std::max<int64_t>(segments - 2, 0) * shape.neurons * size_of_acc(shape.dtype), 16) * 16;
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

int64_t lif_backward_counters_cuda(const LifBackward& args) {
  int size;
  return counters_of(plan(args, size));
}

int64_t lif_backward_workspace_cuda(const LifBackward& args) {
  int size;
  const Walk walk = plan(args, size);
  const int64_t sums = args.grad_threshold ? (in_columns(args.shape) ? size : 1) * (from_rest(args) ? 1 : 2) : 0;
  return checkpoint_bytes(args.shape) + partial_bytes(walk, sums);
}

void lif_backward_cuda(const LifBackward& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const LifShape& shape = args.shape;
  int size;
  const Walk walk = plan(args, size);
  with_dtype(shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    using acc_t = acc_of<scalar_t>;
    const auto grad_s = static_cast<const scalar_t*>(args.grad_s), x = static_cast<const scalar_t*>(args.x);
    const auto grad_x = static_cast<scalar_t*>(args.grad_x);
    const auto workspace = static_cast<char*>(args.workspace);
    const Inputs<acc_t> inputs{static_cast<const acc_t*>(args.threshold), static_cast<const acc_t*>(args.leak),
                               static_cast<const acc_t*>(args.v0), static_cast<const acc_t*>(args.grad_v)};
    const SumsOut<acc_t> out{static_cast<acc_t*>(args.grad_threshold), static_cast<acc_t*>(args.grad_leak),
                             reinterpret_cast<double*>(workspace + checkpoint_bytes(shape)), args.counters};
    const BackwardOptions<acc_t> options{acc_t(args.v_reset), acc_t(args.surrogate_scale), args.surrogate,
                                         args.detach_reset};
    const auto with_sums = [&](const auto& launch) {
      if (args.grad_threshold)
        launch(constant<true>{});
      else
        launch(constant<false>{});
    };
    if (from_rest(args)) {
      with_packet<scalar_t, false>(shape, size, [&](auto packet, auto columns) {
        with_sums([&](auto summed) {
          constexpr auto kKernel = single_backward_kernel<scalar_t, packet, columns, summed>;
          const Walk all = summed ? at_once<kKernel>(walk, 0) : in_turns<kKernel>(walk, 0, kTurns, kAtOnce);
          kKernel<<<all.groups * all.splits, kWalkThreads, 0, stream>>>(grad_s, x, inputs.threshold, grad_x,
                                                                        shape.neurons, options, out, all);
        });
      });
      return;
    }
    with_packet<scalar_t, true>(shape, size, [&](auto packet, auto columns) {
      constexpr int kSums = 2 * Place<packet, columns>::kChannels;
      const int memory = stage_bytes<scalar_t, packet>(shape.timesteps, args.grad_threshold ? kSums : 0);
      with_reset<kEveryKernel || std::is_same_v<scalar_t, float>>(args.reset, [&](auto reset) {
        with_sums([&](auto summed) {
          constexpr auto kKernel = backward_kernel<scalar_t, packet, columns, reset, summed>;
          const Walk all = summed ? at_once<kKernel>(walk, memory) : in_turns<kKernel>(walk, memory, kTurns, 1);
          kKernel<<<all.groups * all.splits, kWalkThreads, memory, stream>>>(
              grad_s, args.grad_s_stride_t, x, shape.x_stride_t, inputs, grad_x, static_cast<acc_t*>(args.grad_v0),
              reinterpret_cast<acc_t*>(workspace), shape.timesteps, shape.neurons, options, out, all);
        });
      });
    });
  });
  check_launch("lif_backward");
}

}  // namespace iirsnn
