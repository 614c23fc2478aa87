// BatchNorm and LIF in one: spikes from the statistics, and the two passes backward. What they move stands in
// bn_lif_cuda.h.
#include "lif/cuda/backward.h"
#include "lif/cuda/bn_lif_cuda.h"
#include "lif/cuda/walk.h"

namespace iirsnn::cuda {
namespace {

constexpr int kAtOnce = 4;  // packets at T = 1, backward half as many of x and of grad_s
// Turns of blocks without sums. In columns each block first loads what many channels have.
constexpr int kTurns = 8, kFireTurnsInColumns = 2;
enum { kThresholdSum, kLeakSum, kGradSum, kDotSum, kSums };

// What the kernels read of a channel. A pointer that is null gives what it would for a BatchNorm that is not affine.
struct ChannelInputs {
  const float *mean, *rstd, *weight, *bias, *threshold, *leak, *grad_mean, *slope;
  bool one_threshold, one_leak;
  float v_reset;
};

struct Channel {
  float gain, shift, mean, grad_mean, slope;
  Neuron<float> neuron;
};

enum class Pass { fire, sums, grad_x };

template <Pass kPass>
__device__ __forceinline__ Channel channel_of(const ChannelInputs& in, int64_t channel, int64_t channels) {
  Channel c{};
  if (channel >= channels) return c;
  c.mean = in.mean[channel];
  c.gain = in.rstd[channel];
  if (in.weight != nullptr) c.gain = mul(c.gain, in.weight[channel]);
  c.shift = sub(in.bias != nullptr ? in.bias[channel] : 0.0f, mul(c.mean, c.gain));
  const float threshold = in.threshold[in.one_threshold ? 0 : channel];
  const float leak = in.leak[in.one_leak ? 0 : channel];
  c.neuron = {threshold, kPass == Pass::fire ? 0.0f : div(1.0f, threshold), leak, in.v_reset};
  if constexpr (kPass == Pass::grad_x) c.grad_mean = in.grad_mean[channel], c.slope = in.slope[channel];
  return c;
}

template <Pass kPass, int kSize, bool kColumns>
__device__ __forceinline__ void load_channels(Channel (&channels)[Place<kSize, kColumns>::kChannels],
                                              const ChannelInputs& in, const Walk& walk,
                                              const Place<kSize, kColumns>& place) {
#pragma unroll
  for (int c = 0; c < Place<kSize, kColumns>::kChannels; ++c)
    channels[c] = channel_of<kPass>(in, place.channel + c, walk.channels);
}

// What a BatchNorm of the dtype of x would write.
template <typename scalar_t, int kSize, int kChannels>
__device__ __forceinline__ void normalise(float (&current)[kSize], const float (&x)[kSize],
                                          const Channel (&channels)[kChannels]) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const Channel& channel = channels[kChannels > 1 ? k : 0];
    current[k] = add(mul(x[k], channel.gain), channel.shift);
  }
  if constexpr (sizeof(scalar_t) == 2) widen(current, narrow<scalar_t>(current));
}

// ---- spikes

template <typename scalar_t, int kSize, bool kColumns>
__global__ void __launch_bounds__(kWalkThreads, 1)
    single_fire_kernel(const scalar_t* __restrict__ x, scalar_t* __restrict__ s,
                       const __grid_constant__ ChannelInputs inputs, const __grid_constant__ Walk walk) {
  const Place<kSize, kColumns> place(walk);
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<Pass::fire>(channels, inputs, walk, place);
  for (int64_t first = place.first; first < place.end; first += kAtOnce * place.step) {
    Packet<scalar_t, kSize> packets[kAtOnce];
    int64_t at[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      at[i] = place.at(walk, first + i * place.step);
      if (first + i * place.step < place.end) packets[i] = load<kSize>(x + at[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * place.step >= place.end) break;
      float x_i[kSize], current[kSize];
      widen(x_i, packets[i]);
      normalise<scalar_t>(current, x_i, channels);
#pragma unroll
      for (int k = 0; k < kSize; ++k) current[k] = spike(current[k], channels[kColumns ? k : 0].neuron.threshold);
      store(s + at[i], narrow<scalar_t>(current));
    }
  }
}

// Packets of up to kSegment timesteps, from t0 on. With a stride of 0 all are one.
template <typename scalar_t, int kSize>
__device__ __forceinline__ void load_segment(Packet<scalar_t, kSize> (&packets)[kSegment], const scalar_t* from,
                                             int64_t stride_t, int64_t t0, int64_t timesteps) {
  packets[0] = load<kSize>(from + t0 * stride_t);
#pragma unroll
  for (int j = 1; j < kSegment; ++j) {
    packets[j] = packets[0];
    if (stride_t != 0 && t0 + j < timesteps) packets[j] = load<kSize>(from + (t0 + j) * stride_t);
  }
}

template <typename scalar_t, int kSize, bool kColumns, Reset kReset>
__global__ void __launch_bounds__(kWalkThreads, 1)
    fire_kernel(const scalar_t* __restrict__ x, int64_t x_stride_t, scalar_t* __restrict__ s, int64_t timesteps,
                int64_t neurons, const __grid_constant__ ChannelInputs inputs, const __grid_constant__ Walk walk) {
  const Place<kSize, kColumns> place(walk);
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<Pass::fire>(channels, inputs, walk, place);
  for (int64_t i = place.first; i < place.end; i += place.step) {
    const int64_t n = place.at(walk, i);
    float v[kSize] = {};
    for (int64_t t0 = 0; t0 < timesteps; t0 += kSegment) {
      Packet<scalar_t, kSize> packets[kSegment];
      load_segment(packets, x + n, x_stride_t, t0, timesteps);
#pragma unroll
      for (int j = 0; j < kSegment; ++j) {
        if (t0 + j >= timesteps) break;
        float x_j[kSize], current[kSize];
        widen(x_j, packets[j]);
        normalise<scalar_t>(current, x_j, channels);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const Neuron<float>& neuron = channels[kColumns ? k : 0].neuron;
          const float h = charge<kReset>(current[k], v[k], neuron);
          current[k] = spike(h, neuron.threshold);
          v[k] = discharge<kReset>(h, neuron);
        }
        store(s + (t0 + j) * neurons + n, narrow<scalar_t>(current));
      }
    }
  }
}

// ---- backward

struct SumsOut {
  double *sums, *partials;
  float *grad_weight, *grad_bias, *grad_threshold, *grad_leak, *grad_mean, *slope;
  uint32_t* counters;
  double count;  // of x in a channel
};

// The sum over all channels, in a fixed order, by one warp.
__device__ __forceinline__ void sum_channels(float* to, const double* from, int64_t channels) {
  double sum = 0;
  for (int64_t channel = threadIdx.x % 32; channel < channels; channel += 32) sum += __ldcg(from + channel);
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(kWarp, sum, apart);
  if (threadIdx.x % 32 == 0) *to = float(sum);
}

// sums: [kSums, kSize] of a thread. What all of them are is written by the last block of each group, and what runs over
// groups by the last of those. total: kGroupDoubles of them.
template <int kSize, bool kColumns>
__device__ __forceinline__ void finish_sums(double* total, const float (&sums)[kSums * kSize], const SumsOut& out,
                                            const ChannelInputs& inputs, const Walk& walk,
                                            const Place<kSize, kColumns>& place) {
  constexpr int kChannels = Place<kSize, kColumns>::kChannels, kCount = kSums * kChannels;
  __shared__ bool last;
  double mine[kCount];
  add_neurons<kSums, kSize, kColumns>(mine, sums);
  if (!sum_group(total, mine, walk, place, out.partials, out.counters)) return;
  for (int i = threadIdx.x; i < walk.cols * kChannels; i += kWalkThreads) {
    const int64_t channel = int64_t(place.group) * walk.cols * kChannels + i;
    if (channel >= walk.channels) break;
    const double* of_column = total + i / kChannels * kCount + i % kChannels;
    for (int sum = 0; sum < kSums; ++sum) out.sums[sum * walk.channels + channel] = of_column[sum * kChannels];
    const double grad = of_column[kGradSum * kChannels], dot = of_column[kDotSum * kChannels];
    const double rstd = inputs.rstd[channel];
    out.grad_weight[channel] = float(dot * rstd);
    out.grad_bias[channel] = float(grad);
    if (!inputs.one_threshold) out.grad_threshold[channel] = float(of_column[kThresholdSum * kChannels]);
    if (!inputs.one_leak) out.grad_leak[channel] = float(of_column[kLeakSum * kChannels]);
    out.grad_mean[channel] = float(grad / out.count);
    out.slope[channel] = float(dot / out.count * rstd * rstd);
  }
  if (!inputs.one_threshold && !inputs.one_leak) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    uint32_t* const counter = out.counters + walk.groups * (1 + walk.clusters());
    __threadfence();
    last = atomicAdd(counter, 1u) + 1 == walk.groups;
    __threadfence();
    if (last) *counter = 0;
  }
  __syncthreads();
  if (!last) return;
  if (inputs.one_threshold && threadIdx.x / 32 == 0)
    sum_channels(out.grad_threshold, out.sums + kThresholdSum * walk.channels, walk.channels);
  if (inputs.one_leak && threadIdx.x / 32 == 1)
    sum_channels(out.grad_leak, out.sums + kLeakSum * walk.channels, walk.channels);
}

// What neuron k adds to sums [kSums, kSize].
template <int kSize>
__device__ __forceinline__ void add_sums(float (&sums)[kSums * kSize], int k, const StepGrad<float>& grad, float before,
                                         float x, const Channel& channel) {
  sums[kThresholdSum * kSize + k] += grad.threshold;
  sums[kLeakSum * kSize + k] = __fmaf_rn(grad.x, before, sums[kLeakSum * kSize + k]);
  sums[kGradSum * kSize + k] += grad.x;
  sums[kDotSum * kSize + k] = __fmaf_rn(grad.x, x - channel.mean, sums[kDotSum * kSize + k]);
}

// grad_x = gain (g - mean(g) - (x - mean) slope), g the gradient of the current.
__device__ __forceinline__ float through_statistics(float grad, float x, const Channel& channel) {
  const float off = sub(grad, channel.grad_mean), along = mul(sub(x, channel.mean), channel.slope);
  return mul(sub(off, along), channel.gain);
}

template <typename scalar_t, int kSize, bool kColumns, Pass kPass>
__global__ void __launch_bounds__(kWalkThreads, !kColumns || kPass != Pass::grad_x || sizeof(scalar_t) != 2 ? 1
                                                : std::is_same_v<scalar_t, __half> || kArchitecture >= 1000 ? 7
                                                                                                            : 8)
    single_backward_kernel(const scalar_t* __restrict__ grad_s, const scalar_t* __restrict__ x,
                           scalar_t* __restrict__ grad_x, const __grid_constant__ BackwardOptions<float> options,
                           const __grid_constant__ SumsOut out, const __grid_constant__ ChannelInputs inputs,
                           const __grid_constant__ Walk walk) {
  constexpr int kPackets = kAtOnce / 2;
  const Place<kSize, kColumns> place(walk);
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<kPass>(channels, inputs, walk, place);
  float sums[kSums * kSize] = {};
  for (int64_t first = place.first; first < place.end; first += kPackets * place.step) {
    Packet<scalar_t, kSize> input[kPackets], grad[kPackets];
    int64_t at[kPackets];
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
      at[i] = place.at(walk, first + i * place.step);
      if (first + i * place.step >= place.end) continue;
      input[i] = load<kSize>(x + at[i]);
      grad[i] = load<kSize>(grad_s + at[i]);
    }
#pragma unroll
    for (int i = 0; i < kPackets; ++i) {
      if (first + i * place.step >= place.end) break;
      float value[kSize], h[kSize], g[kSize], slopes[kSize];
      Neuron<float> neurons[kSize];
      widen(value, input[i]);
      widen(g, grad[i]);
      normalise<scalar_t>(h, value, channels);
#pragma unroll
      for (int k = 0; k < kSize; ++k) neurons[k] = channels[kColumns ? k : 0].neuron;
      spike_slopes(slopes, h, neurons, options.surrogate, options.scale);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const Channel& channel = channels[kColumns ? k : 0];
        Carry<float> carry{};
        const auto step = backward_step<Reset::none>(g[k], h[k], 0.0f, slopes[k], neurons[k], true, carry);
        if constexpr (kPass == Pass::sums)
          add_sums<kSize>(sums, k, step, 0.0f, value[k], channel);
        else
          g[k] = through_statistics(step.x, value[k], channel);
      }
      if constexpr (kPass == Pass::grad_x) store(grad_x + at[i], narrow<scalar_t>(g));
    }
  }
  if constexpr (kPass == Pass::sums) {
    __shared__ double total[kGroupDoubles<kSums * Place<kSize, kColumns>::kChannels>];
    finish_sums(total, sums, out, inputs, walk, place);
  }
}

// Blocks of a multiprocessor: the most for which nothing spills.
template <typename scalar_t, int kSize, bool kColumns, Reset kReset, Pass kPass>
constexpr int kBlocks =
    kPass == Pass::sums && kSize > 4 &&
            (std::is_same_v<scalar_t, __half> || kReset == Reset::soft_delayed || kArchitecture >= 1000)
        ? 3
    : kSize > 4 || (kPass == Pass::sums && kColumns) ? 4
                                                     : 5;

// membranes: [segments - 1, N], those that each segment but the first starts from; the pass over the sums writes them.
template <typename scalar_t, int kSize, bool kColumns, Reset kReset, Pass kPass>
__global__ void __launch_bounds__(kWalkThreads, kBlocks<scalar_t, kSize, kColumns, kReset, kPass>)
    backward_kernel(const scalar_t* __restrict__ grad_s, int64_t grad_s_stride_t, const scalar_t* __restrict__ x,
                    int64_t x_stride_t, scalar_t* __restrict__ grad_x, float* membranes, int64_t timesteps,
                    int64_t neurons, const __grid_constant__ BackwardOptions<float> options,
                    const __grid_constant__ SumsOut out, const __grid_constant__ ChannelInputs inputs,
                    const __grid_constant__ Walk walk) {
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
  bool asked = (last == 0 || kPass == Pass::grad_x) && place.first < place.end;
  if (asked) ask(last, place.at(walk, place.first));  // before what is loaded of channels
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<kPass>(channels, inputs, walk, place);
  Neuron<float> neuron[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) neuron[k] = channels[kColumns ? k : 0].neuron;
  float sums[kSums * kSize] = {};
  for (int64_t i = place.first; i < place.end; i += place.step) {
    const int64_t n = place.at(walk, i);
    float start[kSize] = {};  // the membranes a segment starts from
    if constexpr (kPass == Pass::sums) {
      for (int64_t t0 = 0; t0 < last; t0 += kSegment) {
        stage.ask_x(x + t0 * x_stride_t + n, x_stride_t, kSegment);
        wait_for_copies();
        const scalar_t* x_at = stage.x;
#pragma unroll 1
        for (int j = 0; j < kSegment; ++j, x_at += stage.x_step) {
          float current[kSize];
          widen(current, load<kSize>(x_at));
          normalise<scalar_t>(current, current, channels);
#pragma unroll
          for (int k = 0; k < kSize; ++k)
            start[k] = discharge<kReset>(charge<kReset>(current[k], start[k], neuron[k]), neuron[k]);
        }
        store_membrane(membranes + t0 / kSegment * neurons + n, start);
      }
    } else if (last > 0) {
      load_membrane(start, membranes + (last / kSegment - 1) * neurons + n);
    }
    Carry<float> carry[kSize] = {};
    for (int64_t t0 = last;; t0 -= kSegment) {
      if (!asked) ask(t0, n);
      asked = false;
      const int steps = segment_steps(timesteps - t0);
      float h[kSize], v[kSize], *kept = stage.h;
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] = start[k];
      const scalar_t* x_at = stage.x;
      wait_for_copies();
#pragma unroll 1
      for (int j = 0; j < steps; ++j, x_at += stage.x_step) {
        if (j > 0) stage.keep(kept, h), kept += kStep;
        float current[kSize];
        widen(current, load<kSize>(x_at));
        normalise<scalar_t>(current, current, channels);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          h[k] = charge<kReset>(current[k], v[k], neuron[k]);
          v[k] = discharge<kReset>(h[k], neuron[k]);
        }
      }
      const scalar_t* grad_at = stage.grad + (steps - 1) * stage.grad_step;
      scalar_t* to = grad_x + (t0 + steps - 1) * neurons + n;
#pragma unroll 1
      for (int j = steps - 1; j >= 0; --j, grad_at -= stage.grad_step, to -= neurons) {
        x_at -= stage.x_step;
        float grad[kSize], value[kSize], slopes[kSize], earlier[kSize] = {};
        widen(grad, load<kSize>(grad_at));
        widen(value, load<kSize>(x_at));
        if (j > 0) stage.take(earlier, kept -= kStep);
        spike_slopes(slopes, h, neuron, options.surrogate, options.scale);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const Channel& channel = channels[kColumns ? k : 0];
          const float before = j > 0 ? discharge<kReset>(earlier[k], neuron[k]) : start[k];
          const auto step =
              backward_step<kReset>(grad[k], h[k], before, slopes[k], neuron[k], options.detach_reset, carry[k]);
          if constexpr (kPass == Pass::sums)
            add_sums<kSize>(sums, k, step, before, value[k], channel);
          else
            grad[k] = through_statistics(step.x, value[k], channel);
          h[k] = earlier[k];
        }
        if constexpr (kPass == Pass::grad_x) store(to, narrow<scalar_t>(grad));
      }
      if (t0 == 0) break;
      if (t0 > kSegment)
        load_membrane(start, membranes + (t0 / kSegment - 2) * neurons + n);
      else
        for (float& at_rest : start) at_rest = 0.0f;
    }
  }
  if constexpr (kPass == Pass::sums) {
    __syncthreads();  // the stage is done with
    finish_sums(reinterpret_cast<double*>(memory), sums, out, inputs, walk, place);
  }
}

// ---- launchers

int packet_of(const BnLifCuda& args, int64_t most) {
  return walk_packet(args.shape, most, args.grad_s_stride_t, args.x, args.s, args.grad_s, args.grad_x);
}

ChannelInputs inputs_of(const BnLifCuda& args) {
  return {args.mean,      args.rstd,  args.weight,        args.bias,     args.threshold,     args.leak,
          args.grad_mean, args.slope, args.one_threshold, args.one_leak, float(args.v_reset)};
}

int64_t membrane_bytes(const LifShape& shape) {
  const int64_t segments = ceil_div(shape.timesteps, kSegment);
  return ceil_div((segments - 1) * shape.neurons * int64_t(sizeof(float)), 16) * 16;
}

template <Pass kPass>
void backward(const BnLifCuda& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const LifShape& shape = args.shape;
  const int size = packet_of(args, stage_packet(shape));
  const Walk walk = walk_of(shape, size);
  const auto workspace = static_cast<char*>(args.workspace);
  const auto membranes = reinterpret_cast<float*>(workspace);
  const SumsOut out{args.sums,           reinterpret_cast<double*>(workspace + membrane_bytes(shape)),
                    args.grad_weight,    args.grad_bias,
                    args.grad_threshold, args.grad_leak,
                    args.grad_mean,      args.slope,
                    args.counters,       double(shape.timesteps) * double(shape.neurons / shape.channels)};
  const BackwardOptions<float> options{float(args.v_reset), float(args.surrogate_scale), args.surrogate,
                                       args.detach_reset};
  with_float(shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    const auto grad_s = static_cast<const scalar_t*>(args.grad_s), x = static_cast<const scalar_t*>(args.x);
    const auto grad_x = static_cast<scalar_t*>(args.grad_x);
    if (shape.timesteps == 1) {
      with_packet<scalar_t, false>(shape, size, [&](auto packet, auto columns) {
        constexpr auto kKernel = single_backward_kernel<scalar_t, packet, columns, kPass>;
        const Walk all = kPass == Pass::sums || columns ? at_once<kKernel>(walk, 0)
                                                        : in_turns<kKernel>(walk, 0, kTurns, kAtOnce / 2);
        kKernel<<<all.groups * all.splits, kWalkThreads, 0, stream>>>(grad_s, x, grad_x, options, out, inputs_of(args),
                                                                      all);
      });
      return;
    }
    with_packet<scalar_t, true>(shape, size, [&](auto packet, auto columns) {
      const int sums = kPass == Pass::sums ? kSums * Place<packet, columns>::kChannels : 0;
      const int memory = stage_bytes<scalar_t, packet>(shape.timesteps, sums);
      with_reset<kEveryKernel>(args.reset, [&](auto reset) {
        constexpr auto kKernel = backward_kernel<scalar_t, packet, columns, reset, kPass>;
        const Walk all = kPass == Pass::sums || columns ? at_once<kKernel>(walk, memory)
                                                        : in_turns<kKernel>(walk, memory, kTurns, 1);
        kKernel<<<all.groups * all.splits, kWalkThreads, memory, stream>>>(
            grad_s, args.grad_s_stride_t, x, shape.x_stride_t, grad_x, membranes, shape.timesteps, shape.neurons,
            options, out, inputs_of(args), all);
      });
    });
  });
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

int64_t bn_lif_counters_cuda(const LifShape& shape) {
  return 1 + std::max(walk_counters(shape, whole_packet(shape)), walk_counters(shape, stage_packet(shape)));
}

int64_t bn_lif_workspace_cuda(const LifShape& shape) {
  return membrane_bytes(shape) + walk_partial_bytes(shape, stage_packet(shape), kSums);
}

void bn_lif_fire_cuda(const BnLifCuda& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const LifShape& shape = args.shape;
  const int size = packet_of(args, whole_packet(shape));
  const Walk walk = walk_of(shape, size);
  with_float(shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    const auto x = static_cast<const scalar_t*>(args.x);
    const auto s = static_cast<scalar_t*>(args.s);
    const int64_t turns = in_columns(shape) ? kFireTurnsInColumns : kTurns;
    with_packet<scalar_t, false>(shape, size, [&](auto packet, auto columns) {
      if (shape.timesteps == 1) {
        constexpr auto kKernel = single_fire_kernel<scalar_t, packet, columns>;
        const Walk all = in_turns<kKernel>(walk, 0, turns, kAtOnce);
        kKernel<<<all.groups * all.splits, kWalkThreads, 0, stream>>>(x, s, inputs_of(args), all);
        return;
      }
      with_reset<kEveryKernel>(args.reset, [&](auto reset) {
        constexpr auto kKernel = fire_kernel<scalar_t, packet, columns, reset>;
        const Walk all = in_turns<kKernel>(walk, 0, turns, 1);
        kKernel<<<all.groups * all.splits, kWalkThreads, 0, stream>>>(x, shape.x_stride_t, s, shape.timesteps,
                                                                      shape.neurons, inputs_of(args), all);
      });
    });
  });
  check_launch("bn_lif_fire");
}

void bn_lif_sums_cuda(const BnLifCuda& args, void* stream) {
  backward<Pass::sums>(args, stream);
  check_launch("bn_lif_sums");
}

void bn_lif_grad_x_cuda(const BnLifCuda& args, void* stream) {
  backward<Pass::grad_x>(args, stream);
  check_launch("bn_lif_grad_x");
}

}  // namespace iirsnn
