// The statistics of BatchNorm, and the running ones: one pass over x, one launch.
//
// Sums are taken of x - centre, centre the channel's first value, so that a variance far below the mean is as exact as
// one at 0: in float over the packets that a thread asks for at once, in double over all of them.
#include "lif/cuda/bn_lif_cuda.h"
#include "lif/cuda/walk.h"

namespace iirsnn::cuda {
namespace {

constexpr int kAtOnce = 4;  // packets that a thread asks for before it needs the first
constexpr int kTotalsThreads = 512;

struct MomentsOut {
  double *sums, *partials;
  float *mean, *var, *rstd;
  uint32_t* counters;
  double eps, count;  // of the values that are read of a channel
  int64_t repeated;   // how often x has each of them
  BnLifRunning running;
};

// As torch's lerp.
__device__ __forceinline__ float towards(float from, float to, float weight) {
  const bool little = fabsf(weight) < 0.5f;
  return __fmaf_rn(little ? weight : weight - 1.0f, to - from, little ? from : to);
}

// With torch's bits. unbiased: the variance.
__device__ __forceinline__ void update(const BnLifRunning& running, int64_t channel, float mean, float unbiased) {
  const double momentum = isnan(running.momentum) ? 1 / double(*running.calls + 1) : running.momentum;
  running.mean[channel] = towards(running.mean[channel], mean, float(momentum));
  running.var[channel] = towards(running.var[channel], unbiased, float(momentum));
}

// Counts the call in the last of `blocks` to come here: the others have read how many there were. counter: 0 before and
// after.
__device__ __forceinline__ void count_call(const BnLifRunning& running, int64_t blocks, uint32_t* counter) {
  __syncthreads();
  if (threadIdx.x != 0 || count_up(counter) + 1 != blocks) return;
  *counter = 0;
  ++*running.calls;
}

template <typename scalar_t>
__device__ __forceinline__ float centre_of(const scalar_t* x, const Walk& walk, int64_t channel) {
  const float value = channel < walk.channels ? widen(x[channel * walk.inner]) : 0.0f;
  return value - value == 0.0f ? value : 0.0f;
}

template <typename scalar_t, int kSize, bool kColumns>
__global__ void __launch_bounds__(kWalkThreads, 1)
    moments_kernel(const scalar_t* __restrict__ x, int64_t timesteps, int64_t stride_t,
                   const __grid_constant__ MomentsOut out, const __grid_constant__ Walk walk) {
  const Place<kSize, kColumns> place(walk);
  constexpr int kChannels = Place<kSize, kColumns>::kChannels;
  float centre[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) centre[c] = centre_of(x, walk, place.channel + c);
  double sums[2 * kChannels] = {};
  for (int64_t t = 0; t < timesteps; ++t) {
    const scalar_t* row = x + t * stride_t;
    for (int64_t first = place.first; first < place.end; first += kAtOnce * place.step) {
      Packet<scalar_t, kSize> packets[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t packet = first + i * place.step;
        if (packet < place.end) packets[i] = load<kSize>(row + place.at(walk, packet));
      }
      float total[kChannels] = {}, square[kChannels] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * place.step >= place.end) break;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          const int c = kColumns ? k : 0;
          const float apart = widen(packets[i].get(k)) - centre[c];
          total[c] += apart;
          square[c] = __fmaf_rn(apart, apart, square[c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        sums[c] += total[c];
        sums[kChannels + c] += square[c];
      }
    }
  }
  __shared__ double total[kGroupDoubles<2 * kChannels>];
  if (!sum_group(total, sums, walk, place, out.partials, out.counters)) return;
  for (int i = threadIdx.x; i < walk.cols * kChannels; i += kWalkThreads) {
    const int64_t channel = int64_t(place.group) * walk.cols * kChannels + i;
    if (channel >= walk.channels) break;
    const double* of_column = total + i / kChannels * 2 * kChannels + i % kChannels;
    const double sum = of_column[0], squares = of_column[kChannels], start = centre_of(x, walk, channel);
    const double offset = sum / out.count, spread = squares / out.count - offset * offset;
    const double variance = spread < 0 ? 0 : spread;  // below 0 by rounding; NaN stays
    out.mean[channel] = float(start + offset);
    out.var[channel] = float(variance);
    if (out.running.mean != nullptr) {
      const double values = out.count * out.repeated;
      update(out.running, channel, float(start + offset), mul(float(variance), float(values / (values - 1))));
    }
    out.rstd[channel] = float(1 / sqrt(variance + out.eps));
    out.sums[channel] = (sum + out.count * start) * out.repeated;
    out.sums[walk.channels + channel] = (squares + 2 * start * sum + out.count * start * start) * out.repeated;
  }
  if (out.running.mean != nullptr)
    count_call(out.running, walk.groups, out.counters + walk.groups * (1 + walk.clusters()));
}

// One block, so that it reads how many calls there were before it counts its own.
__global__ void __launch_bounds__(kTotalsThreads, 1) totals_kernel(const __grid_constant__ BnLifTotals args) {
  for (int64_t channel = threadIdx.x; channel < args.channels; channel += kTotalsThreads) {
    const double count = args.totals[2 * args.channels + channel];
    const double mean = args.totals[channel] / count;
    const double spread = args.totals[args.channels + channel] / count - mean * mean;
    const double variance = spread < 0 ? 0 : spread;  // below 0 by rounding; NaN stays
    args.mean[channel] = float(mean);
    args.rstd[channel] = float(1 / sqrt(variance + args.eps));
    update(args.running, channel, float(mean), float(variance * (count / (count - 1))));
  }
  __syncthreads();
  if (threadIdx.x == 0) ++*args.running.calls;
}

int packet_of(const BnLifMoments& args) { return walk_packet(args.shape, whole_packet(args.shape), 0, args.x); }

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

int64_t bn_lif_moments_workspace_cuda(const LifShape& shape) {
  return walk_partial_bytes(shape, whole_packet(shape), 2);
}

void bn_lif_moments_cuda(const BnLifMoments& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const LifShape& shape = args.shape;
  const int size = packet_of(args);
  const Walk walk = walk_of(shape, size);
  const int64_t timesteps = shape.x_stride_t == 0 ? 1 : shape.timesteps;
  const double count = double(timesteps) * double(shape.neurons / shape.channels);
  const MomentsOut out{
      args.sums, static_cast<double*>(args.workspace), args.mean,   args.var, args.rstd, args.counters, args.eps,
      count,     shape.timesteps / timesteps,          args.running};
  with_float(shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    with_packet<scalar_t, false>(shape, size, [&](auto packet, auto columns) {
      constexpr auto kKernel = moments_kernel<scalar_t, packet, columns>;
      const Walk all = at_once<kKernel>(walk, 0);
      kKernel<<<all.groups * all.splits, kWalkThreads, 0, stream>>>(static_cast<const scalar_t*>(args.x), timesteps,
                                                                    shape.x_stride_t, out, all);
    });
  });
  check_launch("bn_lif_moments");
}

void bn_lif_totals_cuda(const BnLifTotals& args, void* stream) {
  totals_kernel<<<1, kTotalsThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_launch("bn_lif_totals");
}

}  // namespace iirsnn
