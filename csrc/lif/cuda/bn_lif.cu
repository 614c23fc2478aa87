// BatchNorm and LIF in one: spikes from the statistics, and the two passes backward. What they move stands in
// bn_lif_cuda.h.
#include "lif/cuda/backward.h"
#include "lif/cuda/bn_lif_cuda.h"
#include "lif/cuda/walk.h"

namespace iirsnn::cuda {
namespace {

constexpr int kAtOnce = 4;  // packets at T = 1, backward half as many of x and of grad_s
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
template <typename scalar_t>
__device__ __forceinline__ float normalised(scalar_t x, const Channel& c) {
  return widen(narrow<scalar_t>(add(mul(widen(x), c.gain), c.shift)));
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
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const Channel& channel = channels[kColumns ? k : 0];
        packets[i].set(k, narrow<scalar_t>(spike(normalised(packets[i].get(k), channel), channel.neuron.threshold)));
      }
      store(s + at[i], packets[i]);
    }
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
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const Channel& channel = channels[kColumns ? k : 0];
          const float h = charge<kReset>(normalised(packets[j].get(k), channel), v[k], channel.neuron);
          packets[j].set(k, narrow<scalar_t>(spike(h, channel.neuron.threshold)));
          v[k] = discharge<kReset>(h, channel.neuron);
        }
        store(s + (t0 + j) * neurons + n, packets[j]);
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

// The sum over all channels, in a fixed order, by the threads of one block.
__device__ __forceinline__ void sum_channels(float* to, const double* from, int64_t channels, double* shared) {
  double sum = 0;
  for (int64_t channel = threadIdx.x; channel < channels; channel += kWalkThreads) sum += __ldcg(from + channel);
  __syncthreads();
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int thread = 1; thread < kWalkThreads; ++thread) sum += shared[thread];
  *to = float(sum);
}

// sums: [kSums, kChannels] of a thread. What all of them are is written by the last block of each group, and what runs
// over groups by the last of those.
template <int kSize, bool kColumns>
__device__ __forceinline__ void finish_sums(const float (&sums)[kSums * Place<kSize, kColumns>::kChannels],
                                            const SumsOut& out, const ChannelInputs& inputs, const Walk& walk,
                                            const Place<kSize, kColumns>& place) {
  constexpr int kChannels = Place<kSize, kColumns>::kChannels, kCount = kSums * kChannels;
  __shared__ double total[kGroupDoubles<kCount>];
  __shared__ bool last;
  double mine[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) mine[i] = sums[i];
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
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(out.counters + walk.groups, 1u) + 1 == walk.groups;
  __syncthreads();
  if (!last) return;
  if (threadIdx.x == 0) out.counters[walk.groups] = 0;
  __threadfence();
  if (inputs.one_threshold)
    sum_channels(out.grad_threshold, out.sums + kThresholdSum * walk.channels, walk.channels, total);
  if (inputs.one_leak) sum_channels(out.grad_leak, out.sums + kLeakSum * walk.channels, walk.channels, total);
}

// What a neuron adds to the sums of its channel.
template <int kCount>
__device__ __forceinline__ void add_sums(float (&sums)[kCount], int c, const StepGrad<float>& grad, float x,
                                         const Channel& channel) {
  constexpr int kChannels = kCount / kSums;
  sums[kThresholdSum * kChannels + c] += grad.threshold;
  sums[kLeakSum * kChannels + c] += grad.leak;
  sums[kGradSum * kChannels + c] += grad.x;
  sums[kDotSum * kChannels + c] += grad.x * (x - channel.mean);
}

// grad_x = gain (g - mean(g) - (x - mean) slope), g the gradient of the current.
__device__ __forceinline__ float through_statistics(float grad, float x, const Channel& channel) {
  const float off = sub(grad, channel.grad_mean), along = mul(sub(x, channel.mean), channel.slope);
  return mul(sub(off, along), channel.gain);
}

template <typename scalar_t, int kSize, bool kColumns, Pass kPass>
__global__ void __launch_bounds__(kWalkThreads, 1)
    single_backward_kernel(const scalar_t* __restrict__ grad_s, const scalar_t* __restrict__ x,
                           scalar_t* __restrict__ grad_x, const __grid_constant__ BackwardOptions<float> options,
                           const __grid_constant__ SumsOut out, const __grid_constant__ ChannelInputs inputs,
                           const __grid_constant__ Walk walk) {
  constexpr int kPackets = kAtOnce / 2;
  const Place<kSize, kColumns> place(walk);
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<kPass>(channels, inputs, walk, place);
  float sums[kSums * Place<kSize, kColumns>::kChannels] = {};
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
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const int c = kColumns ? k : 0;
        const Channel& channel = channels[c];
        const Neuron<float> neuron[1] = {channel.neuron};
        const float value = widen(input[i].get(k)), h[1] = {normalised(input[i].get(k), channel)};
        float slope[1];
        spike_slopes(slope, h, neuron, options.surrogate, options.scale);
        Carry<float> carry{};
        const auto step =
            backward_step<Reset::none>(widen(grad[i].get(k)), h[0], 0.0f, slope[0], channel.neuron, true, carry);
        if constexpr (kPass == Pass::sums)
          add_sums(sums, c, step, value, channel);
        else
          grad[i].set(k, narrow<scalar_t>(through_statistics(step.x, value, channel)));
      }
      if constexpr (kPass == Pass::grad_x) store(grad_x + at[i], grad[i]);
    }
  }
  if constexpr (kPass == Pass::sums) finish_sums(sums, out, inputs, walk, place);
}

// membranes: [segments - 1, N], those that each segment but the first starts from; the pass over the sums writes them.
template <typename scalar_t, int kSize, bool kColumns, Reset kReset, Pass kPass>
__global__ void __launch_bounds__(kWalkThreads, 3)
    backward_kernel(const scalar_t* __restrict__ grad_s, int64_t grad_s_stride_t, const scalar_t* __restrict__ x,
                    int64_t x_stride_t, scalar_t* __restrict__ grad_x, float* membranes, int64_t timesteps,
                    int64_t neurons, const __grid_constant__ BackwardOptions<float> options,
                    const __grid_constant__ SumsOut out, const __grid_constant__ ChannelInputs inputs,
                    const __grid_constant__ Walk walk) {
  constexpr int kTogether = kSize < kPart ? kSize : kPart;
  const Place<kSize, kColumns> place(walk);
  Channel channels[Place<kSize, kColumns>::kChannels];
  load_channels<kPass>(channels, inputs, walk, place);
  const int64_t last = (timesteps - 1) / kSegment * kSegment;  // where the last segment starts
  float sums[kSums * Place<kSize, kColumns>::kChannels] = {};
  for (int64_t i = place.first; i < place.end; i += place.step) {
    const int64_t n = place.at(walk, i);
    Packet<scalar_t, kSize> input[kSegment], grad[kSegment];
    float start[kSize] = {};
    if constexpr (kPass == Pass::sums) {
      for (int64_t t0 = 0; t0 < last; t0 += kSegment) {
        load_segment(input, x + n, x_stride_t, t0, timesteps);
#pragma unroll
        for (int j = 0; j < kSegment; ++j) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            const Channel& channel = channels[kColumns ? k : 0];
            const float h = charge<kReset>(normalised(input[j].get(k), channel), start[k], channel.neuron);
            start[k] = discharge<kReset>(h, channel.neuron);
          }
        }
        store_membrane(membranes + t0 / kSegment * neurons + n, start);
      }
    } else if (last > 0) {
      load_membrane(start, membranes + (last / kSegment - 1) * neurons + n);
    }
    Carry<float> carry[kSize] = {};
    for (int64_t t0 = last;; t0 -= kSegment) {
      load_segment(input, x + n, x_stride_t, t0, timesteps);
      load_segment(grad, grad_s + n, grad_s_stride_t, t0, timesteps);
#pragma unroll
      for (int part = 0; part < kSize; part += kTogether) {
        Neuron<float> neuron[kTogether];
        float h[kSegment][kTogether], v[kTogether];
        float part_sums[kSums * kTogether] = {};  // short chains of additions
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          neuron[k] = channels[kColumns ? part + k : 0].neuron;
          v[k] = start[part + k];
        }
#pragma unroll
        for (int j = 0; j < kSegment; ++j) {
          if (t0 + j >= timesteps) break;
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const Channel& channel = channels[kColumns ? part + k : 0];
            h[j][k] = charge<kReset>(normalised(input[j].get(part + k), channel), v[k], neuron[k]);
            v[k] = discharge<kReset>(h[j][k], neuron[k]);
          }
        }
#pragma unroll
        for (int j = kSegment - 1; j >= 0; --j) {
          if (t0 + j >= timesteps) continue;
          float slopes[kTogether];
          spike_slopes(slopes, h[j], neuron, options.surrogate, options.scale);
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int c = kColumns ? part + k : 0;
            const float before =
                j > 0 ? discharge<kReset>(forgotten(h[j > 0 ? j - 1 : 0][k]), neuron[k]) : start[part + k];
            const auto step = backward_step<kReset>(widen(grad[j].get(part + k)), h[j][k], before, slopes[k], neuron[k],
                                                    options.detach_reset, carry[part + k]);
            const float value = widen(input[j].get(part + k));
            if constexpr (kPass == Pass::sums)
              add_sums(part_sums, k, step, value, channels[c]);
            else
              grad[j].set(part + k, narrow<scalar_t>(through_statistics(step.x, value, channels[c])));
          }
        }
        if constexpr (kPass == Pass::sums) {
#pragma unroll
          for (int i = 0; i < kSums * kTogether; ++i) {
            const int c = kColumns ? part + i % kTogether : 0;
            sums[i / kTogether * Place<kSize, kColumns>::kChannels + c] += part_sums[i];
          }
        }
      }
      if constexpr (kPass == Pass::grad_x) {
#pragma unroll
        for (int j = 0; j < kSegment; ++j)
          if (t0 + j < timesteps) store(grad_x + (t0 + j) * neurons + n, grad[j]);
      }
      if (t0 == 0) break;
      if (t0 > kSegment)
        load_membrane(start, membranes + (t0 / kSegment - 2) * neurons + n);
      else
        for (float& at_rest : start) at_rest = 0.0f;
    }
  }
  if constexpr (kPass == Pass::sums) finish_sums(sums, out, inputs, walk, place);
}

// ---- launchers

int packet_of(const BnLifCuda& args) {
  return walk_packet(args.shape, args.grad_s_stride_t, args.x, args.s, args.grad_s, args.grad_x);
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
  const int size = packet_of(args);
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
    const int64_t blocks = walk.groups * walk.splits;
    with_packet<scalar_t>(shape, size, [&](auto packet, auto columns) {
      if (shape.timesteps == 1) {
        single_backward_kernel<scalar_t, packet, columns, kPass>
            <<<blocks, kWalkThreads, 0, stream>>>(grad_s, x, grad_x, options, out, inputs_of(args), walk);
        return;
      }
      with_reset<kEveryKernel>(args.reset, [&](auto reset) {
        backward_kernel<scalar_t, packet, columns, reset, kPass>
            <<<blocks, kWalkThreads, 0, stream>>>(grad_s, args.grad_s_stride_t, x, shape.x_stride_t, grad_x, membranes,
                                                  shape.timesteps, shape.neurons, options, out, inputs_of(args), walk);
      });
    });
  });
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

int64_t bn_lif_counters_cuda(const LifShape& shape) { return shape.channels + 1; }

int64_t bn_lif_workspace_cuda(const LifShape& shape) {
  return membrane_bytes(shape) + walk_partial_bytes(shape, kSums);
}

void bn_lif_fire_cuda(const BnLifCuda& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const LifShape& shape = args.shape;
  const int size = packet_of(args);
  const Walk walk = walk_of(shape, size);
  with_float(shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    const auto x = static_cast<const scalar_t*>(args.x);
    const auto s = static_cast<scalar_t*>(args.s);
    const int64_t blocks = walk.groups * walk.splits;
    with_packet<scalar_t>(shape, size, [&](auto packet, auto columns) {
      if (shape.timesteps == 1) {
        single_fire_kernel<scalar_t, packet, columns><<<blocks, kWalkThreads, 0, stream>>>(x, s, inputs_of(args), walk);
        return;
      }
      with_reset<kEveryKernel>(args.reset, [&](auto reset) {
        fire_kernel<scalar_t, packet, columns, reset><<<blocks, kWalkThreads, 0, stream>>>(
            x, shape.x_stride_t, s, shape.timesteps, shape.neurons, inputs_of(args), walk);
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
