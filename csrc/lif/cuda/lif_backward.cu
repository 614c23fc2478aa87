// LIF backward: what it moves stands in lif_cuda.h.
#include "lif/cuda/backward.h"
#include "lif/cuda/lif_cuda.h"
#include "lif/cuda/walk.h"

namespace iirsnn::cuda {
namespace {

constexpr int kAtOnce = 2;  // packets of x, and of grad_s, at T = 1

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

// sums: [kSums, kChannels] of a thread: of threshold, and of leak unless it plays no part.
template <int kSums, int kSize, bool kColumns, typename acc_t>
__device__ __forceinline__ void finish_sums(const acc_t (&sums)[kSums * Place<kSize, kColumns>::kChannels],
                                            const SumsOut<acc_t>& out, const Walk& walk,
                                            const Place<kSize, kColumns>& place) {
  constexpr int kChannels = Place<kSize, kColumns>::kChannels, kCount = kSums * kChannels;
  __shared__ double total[kGroupDoubles<kCount>];
  double mine[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) mine[i] = sums[i];
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
__global__ void __launch_bounds__(kWalkThreads, sizeof(scalar_t) == 8 ? 5
                                                : kSize > 4           ? 6
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
  acc_t sums[Place<kSize, kColumns>::kChannels] = {};
  for (int64_t first = place.first; first < place.end;) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * place.step >= place.end) break;
      acc_t h[kSize], slopes[kSize];
      Neuron<acc_t> neuron[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        h[k] = widen(current[i].get(k));
        neuron[k] = parameters[kColumns ? k : 0];
      }
      spike_slopes(slopes, h, neuron, options.surrogate, options.scale);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        Carry<acc_t> carry{};
        const auto step =
            backward_step<Reset::none>(acc_t(widen(grad[i].get(k))), h[k], acc_t(0), slopes[k], neuron[k], true, carry);
        if constexpr (kSummed) sums[kColumns ? k : 0] = add(sums[kColumns ? k : 0], step.threshold);
        grad[i].set(k, narrow<scalar_t>(step.x));
      }
      store_tail(grad_x, at[i], neurons, grad[i]);
    }
    first += kAtOnce * place.step;
    load_from(first);
  }
  if constexpr (kSummed) finish_sums<1>(sums, out, walk, place);
}

// Any number of timesteps, in segments of kSegment. checkpoints: [segments - 2, N], the membranes that the segments
// between the first and the last start from.
template <typename scalar_t, int kSize, bool kColumns, Reset kReset, bool kSummed>
__global__ void __launch_bounds__(kWalkThreads, sizeof(scalar_t) == 8 ? 1
                                                : kSummed             ? 3
                                                                      : 4)
    backward_kernel(const scalar_t* __restrict__ grad_s, int64_t grad_s_stride_t, const scalar_t* __restrict__ x,
                    int64_t x_stride_t, const __grid_constant__ Inputs<acc_of<scalar_t>> inputs,
                    scalar_t* __restrict__ grad_x, acc_of<scalar_t>* __restrict__ grad_v0,
                    acc_of<scalar_t>* checkpoints, int64_t timesteps, int64_t count,
                    const __grid_constant__ BackwardOptions<acc_of<scalar_t>> options,
                    const __grid_constant__ SumsOut<acc_of<scalar_t>> out, const __grid_constant__ Walk walk) {
  using acc_t = acc_of<scalar_t>;
  constexpr int kTogether = kSize < kPart ? kSize : kPart;
  const Place<kSize, kColumns> place(walk);
  constexpr int kChannels = Place<kSize, kColumns>::kChannels;
  const int64_t last = (timesteps - 1) / kSegment * kSegment;  // where the last segment starts
  Packet<scalar_t, kSize> current[kSegment], grad[kSegment];
  const auto load_both = [&](int64_t t0, int64_t n) {
    load_segment(current, x + n, x_stride_t, t0, timesteps);
    load_segment(grad, grad_s + n, grad_s_stride_t, t0, timesteps);
  };
  int64_t n = place.at(walk, place.first);
  if (last == 0 && place.first < place.end) load_both(0, n);  // before the parameters, whose division would wait first
  Neuron<acc_t> parameters[kChannels];
  load_parameters(parameters, inputs.threshold, inputs.leak, options.v_reset, walk, place);
  acc_t sums[2 * kChannels] = {};
  for (int64_t packet = place.first; packet < place.end;) {
    acc_t start[kSize] = {};  // the membranes a segment starts from
    if (inputs.v0 != nullptr) load_membrane(start, inputs.v0 + n);
    for (int64_t t0 = 0; t0 < last; t0 += kSegment) {
      if (t0 > 0) store_membrane(checkpoints + (t0 / kSegment - 1) * count + n, start);
      load_segment(current, x + n, x_stride_t, t0, timesteps);
#pragma unroll
      for (int j = 0; j < kSegment; ++j) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const Neuron<acc_t>& neuron = parameters[kColumns ? k : 0];
          start[k] = discharge<kReset>(charge<kReset>(acc_t(widen(current[j].get(k))), start[k], neuron), neuron);
        }
      }
    }
    acc_t grad_v_last[kSize] = {};
    if (inputs.grad_v != nullptr) load_membrane(grad_v_last, inputs.grad_v + n);
    Carry<acc_t> carry[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) carry[k] = {grad_v_last[k], acc_t(0)};
    if (last > 0) load_both(last, n);
    for (int64_t t0 = last;;) {
#pragma unroll
      for (int part = 0; part < kSize; part += kTogether) {
        Neuron<acc_t> neuron[kTogether];
        acc_t h[kSegment][kTogether], v[kTogether];
        acc_t threshold_sums[kTogether] = {}, leak_sums[kTogether] = {};  // short chains of additions
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          neuron[k] = parameters[kColumns ? part + k : 0];
          v[k] = start[part + k];
        }
#pragma unroll
        for (int j = 0; j < kSegment; ++j) {
          if (t0 + j >= timesteps) break;
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            h[j][k] = charge<kReset>(acc_t(widen(current[j].get(part + k))), v[k], neuron[k]);
            v[k] = discharge<kReset>(h[j][k], neuron[k]);
          }
        }
#pragma unroll
        for (int j = kSegment - 1; j >= 0; --j) {
          if (t0 + j >= timesteps) continue;
          acc_t slopes[kTogether];
          spike_slopes(slopes, h[j], neuron, options.surrogate, options.scale);
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const acc_t before =
                j > 0 ? discharge<kReset>(forgotten(h[j > 0 ? j - 1 : 0][k]), neuron[k]) : start[part + k];
            const auto step = backward_step<kReset>(acc_t(widen(grad[j].get(part + k))), h[j][k], before, slopes[k],
                                                    neuron[k], options.detach_reset, carry[part + k]);
            if constexpr (kSummed) {
              threshold_sums[k] = add(threshold_sums[k], step.threshold);
              leak_sums[k] = add(leak_sums[k], step.leak);
            }
            grad[j].set(part + k, narrow<scalar_t>(step.x));
          }
        }
        if constexpr (kSummed) {
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int c = kColumns ? part + k : 0;
            sums[c] = add(sums[c], threshold_sums[k]);
            sums[kChannels + c] = add(sums[kChannels + c], leak_sums[k]);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kSegment; ++j)
        if (t0 + j < timesteps) store(grad_x + (t0 + j) * count + n, grad[j]);
      if (t0 == 0) break;
      t0 -= kSegment;
      if (t0 > 0)
        load_membrane(start, checkpoints + (t0 / kSegment - 1) * count + n);
      else if (inputs.v0 != nullptr)
        load_membrane(start, inputs.v0 + n);
      else
        for (acc_t& at_rest : start) at_rest = acc_t(0);
      load_both(t0, n);
    }
    if constexpr (kReset == Reset::soft_delayed) {
      if (inputs.v0 != nullptr && !options.detach_reset) {
        Neuron<acc_t> neuron[kSize];
        acc_t slopes[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) neuron[k] = parameters[kColumns ? k : 0];
        spike_slopes(slopes, start, neuron, options.surrogate, options.scale);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const acc_t grad_threshold = backward_v0_delayed(start[k], slopes[k], neuron[k], carry[k]);
          if constexpr (kSummed) sums[kColumns ? k : 0] = add(sums[kColumns ? k : 0], grad_threshold);
        }
      }
    }
    if (grad_v0 != nullptr) {
      acc_t grad_start[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) grad_start[k] = carry[k].grad_v;
      store_membrane(grad_v0 + n, grad_start);
    }
    packet += place.step;
    n = place.at(walk, packet);
    if (last == 0 && packet < place.end) load_both(0, n);
  }
  if constexpr (kSummed) finish_sums<2>(sums, out, walk, place);
}

// One timestep and no membrane: the kernels of T = 1.
bool from_rest(const LifBackward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.grad_v; }

Walk plan(const LifBackward& args, int& size) {
  LifShape shape = args.shape;
  const int64_t bytes = size_of(shape.dtype);
  // The only kernel that may end within a packet: at any other T that would put the next row off its 16 bytes.
  if (from_rest(args) && shape.channels == 1) shape.neurons = ceil_div(shape.neurons, 16 / bytes) * (16 / bytes);
  size = walk_packet(shape, args.grad_s_stride_t, args.grad_s, args.grad_v, args.x, args.v0, args.grad_x, args.grad_v0);
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

int64_t lif_backward_counters_cuda(const LifBackward& args) { return args.shape.channels; }

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
  const int64_t blocks = walk.groups * walk.splits;
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
    with_packet<scalar_t>(shape, size, [&](auto packet, auto columns) {
      if (from_rest(args)) {
        with_sums([&](auto summed) {
          single_backward_kernel<scalar_t, packet, columns, summed><<<blocks, kWalkThreads, 0, stream>>>(
              grad_s, x, inputs.threshold, grad_x, shape.neurons, options, out, walk);
        });
        return;
      }
      with_reset<kEveryKernel || std::is_same_v<scalar_t, float>>(args.reset, [&](auto reset) {
        with_sums([&](auto summed) {
          backward_kernel<scalar_t, packet, columns, reset, summed><<<blocks, kWalkThreads, 0, stream>>>(
              grad_s, args.grad_s_stride_t, x, shape.x_stride_t, inputs, grad_x, static_cast<acc_t*>(args.grad_v0),
              reinterpret_cast<acc_t*>(workspace), shape.timesteps, shape.neurons, options, out, walk);
        });
      });
    });
  });
  check_launch("lif_backward");
}

}  // namespace iirsnn
