// LIF forward: what it moves stands in lif_cuda.h.
#include "lif/cuda/launch.h"
#include "lif/cuda/lif_cuda.h"

namespace iirsnn::cuda {
namespace {

constexpr int kSinglePackets = 2;  // packets per thread at T = 1

// T = 1 from rest: compare, and that is all.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kBlock, 1)
    single_forward_kernel(const scalar_t* __restrict__ x, const acc_of<scalar_t>* __restrict__ threshold,
                          scalar_t* __restrict__ s, uint8_t* __restrict__ bits, const __grid_constant__ Layout layout) {
  using acc_t = acc_of<scalar_t>;
  constexpr int kTile = kBlock * kSize;
  const int64_t first = int64_t(blockIdx.x) * kTile * kSinglePackets + threadIdx.x * kSize;
  Packet<scalar_t, kSize> current[kSinglePackets];
#pragma unroll
  for (int i = 0; i < kSinglePackets; ++i) current[i] = load_tail<kSize>(x, first + i * kTile, layout.neurons);
#pragma unroll
  for (int i = 0; i < kSinglePackets; ++i) {
    const int64_t n = first + i * kTile;
    Neuron<acc_t> neurons[kSize];
    load_neurons<false>(neurons, threshold, static_cast<const acc_t*>(nullptr), acc_t(0), layout.channels, n);
    Packet<scalar_t, kSize> spikes;
    unsigned fired = 0;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const acc_t h = widen(current[i].get(k));
      spikes.set(k, narrow<scalar_t>(spike(h, neurons[k].threshold)));
      fired |= unsigned(h > neurons[k].threshold) << k;
    }
    if (bits != nullptr)
      store_bits<kSize>(bits, n, layout.neurons, fired);
    else
      store_tail(s, n, layout.neurons, spikes);
  }
}

// kTimesteps = 0: any number, in segments of kSegment.
template <typename scalar_t, int kSize, int kTimesteps, Reset kReset>
__global__ void __launch_bounds__(kBlock, 1)
    forward_kernel(const scalar_t* __restrict__ x, const acc_of<scalar_t>* __restrict__ threshold,
                   const acc_of<scalar_t>* __restrict__ leak, const acc_of<scalar_t>* __restrict__ v0,
                   scalar_t* __restrict__ s, uint8_t* __restrict__ bits, acc_of<scalar_t>* __restrict__ v_out,
                   acc_of<scalar_t> v_reset, const __grid_constant__ Layout layout) {
  using acc_t = acc_of<scalar_t>;
  constexpr int kSteps = kTimesteps ? kTimesteps : kSegment;
  const int64_t timesteps = kTimesteps ? kTimesteps : layout.timesteps;
  const int64_t n = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kSize;
  const bool inside = n < layout.neurons;  // the others help to pack
  Packet<scalar_t, kSize> first;
  Neuron<acc_t> neurons[kSize];
  acc_t v[kSize] = {};
  if (inside) {
    first = load<kSize>(x + n);
    if (v0 != nullptr) load_membrane(v, v0 + n);
  }
  load_neurons<false>(neurons, threshold, leak, v_reset, layout.channels, n);
  for (int64_t t0 = 0; t0 < timesteps; t0 += kSteps) {
    Packet<scalar_t, kSize> current[kSteps];
#pragma unroll
    for (int j = 0; j < kSteps; ++j) current[j] = first;
    if (inside && layout.x_stride_t != 0) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const int64_t t = t0 + j;
        if (t > 0 && t < timesteps) current[j] = load<kSize>(x + t * layout.x_stride_t + n);
      }
    }
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int64_t t = t0 + j;
      if (t >= timesteps) continue;
      Packet<scalar_t, kSize> spikes;
      unsigned fired = 0;
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        const acc_t h = charge<kReset>(acc_t(widen(current[j].get(k))), v[k], neurons[k]);
        spikes.set(k, narrow<scalar_t>(spike(h, neurons[k].threshold)));
        fired |= unsigned(h > neurons[k].threshold) << k;
        v[k] = discharge<kReset>(h, neurons[k]);
      }
      if (bits != nullptr)
        store_bits<kSize>(bits + t * packed_bytes(layout.neurons), n, layout.neurons, fired);
      else if (inside)
        store(s + t * layout.neurons + n, spikes);
    }
  }
  if (v_out != nullptr && inside) store_membrane(v_out + n, v);
}

// One timestep and no membrane: the kernels of T = 1.
bool from_rest(const LifForward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.v; }

int packet_of(const LifForward& args) {
  return cuda::packet_of(args.shape, from_rest(args), 0, args.x, args.s, args.v0, args.v);
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

void lif_forward_cuda(const LifForward& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Layout layout = layout_of(args.shape);
  const int packet = packet_of(args);
  const int64_t tiles = ceil_div(args.shape.neurons, kBlock * packet);
  with_dtype(args.shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    using acc_t = acc_of<scalar_t>;
    const auto x = static_cast<const scalar_t*>(args.x);
    const auto threshold = static_cast<const acc_t*>(args.threshold);
    const auto s = static_cast<scalar_t*>(args.s);
    if (from_rest(args)) {
      const auto kernel =
          packet == 1 ? single_forward_kernel<scalar_t, 1> : single_forward_kernel<scalar_t, kPacket<scalar_t>>;
      kernel<<<ceil_div(tiles, kSinglePackets), kBlock, 0, stream>>>(x, threshold, s, args.bits, layout);
      return;
    }
    with_reset<kEveryKernel || std::is_same_v<scalar_t, float>>(args.reset, [&](auto reset) {
      with_steps<scalar_t>(packet, args.shape.timesteps, [&](auto size, auto timesteps) {
        forward_kernel<scalar_t, size, timesteps, reset><<<tiles, kBlock, 0, stream>>>(
            x, threshold, static_cast<const acc_t*>(args.leak), static_cast<const acc_t*>(args.v0), s, args.bits,
            static_cast<acc_t*>(args.v), acc_t(args.v_reset), layout);
      });
    });
  });
  check_launch("lif_forward");
}

}  // namespace iirsnn
