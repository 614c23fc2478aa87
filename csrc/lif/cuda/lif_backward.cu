// LIF backward: what it moves stands in lif_cuda.h.
#include <algorithm>
#include <numeric>

#include "lif/cuda/backward.h"
#include "lif/cuda/launch.h"
#include "lif/cuda/lif_cuda.h"

namespace iirsnn::cuda {
namespace {

constexpr int64_t kMaxBlocks = 8192, kMinBlocks = 512, kPartials = 1 << 16;  // see plan_backward

// Blocks of a backward kernel on a multiprocessor: enough for 32 KiB of loads in flight, 2T packets a thread. Elsewhere
// 1 is said aloud, which keeps ptxas from spilling a few bytes to fit one more.
constexpr int blocks_at_least(int timesteps) { return timesteps == 1 ? 8 : timesteps == 2 ? 4 : 1; }

// T = 1 from rest, and nothing arrives at the membrane.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kBlock, blocks_at_least(1))
    single_backward_kernel(const scalar_t* __restrict__ grad_s, const scalar_t* __restrict__ x,
                           const acc_of<scalar_t>* __restrict__ threshold, scalar_t* __restrict__ grad_x,
                           Partial<acc_of<scalar_t>>* __restrict__ partials,
                           const __grid_constant__ BackwardOptions<acc_of<scalar_t>> options,
                           const __grid_constant__ Plan plan, const __grid_constant__ Layout layout) {
  using acc_t = acc_of<scalar_t>;
  int64_t n = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kSize;
  Neuron<acc_t> neurons[kSize];
  load_neurons<true>(neurons, threshold, static_cast<const acc_t*>(nullptr), options.v_reset, layout.channels, n);
  Partial<acc_t> sums[kSize] = {};
  for (; n < layout.neurons; n += plan.stride) {
    const auto current = load_tail<kSize>(x, n, layout.neurons);
    auto grad = load_tail<kSize>(grad_s, n, layout.neurons);
    acc_t h[kSize];
    const acc_t v[kSize] = {};
    Carry<acc_t> carry[kSize] = {};
#pragma unroll
    for (int k = 0; k < kSize; ++k) h[k] = widen(current.get(k));
    backward_neurons<Reset::none>(grad, h, v, neurons, options, carry, sums);
    store_tail(grad_x, n, layout.neurons, grad);
  }
  if (partials != nullptr) store_partials(partials, sums, layout, plan);
}

// kTimesteps = 0: any number, in segments of kSegment. checkpoints: [segments - 2, N], the membranes the segments
// between the first and the last start from.
template <typename scalar_t, int kSize, int kTimesteps, Reset kReset>
__global__ void __launch_bounds__(kBlock, blocks_at_least(kTimesteps))
    backward_kernel(const scalar_t* __restrict__ grad_s, const acc_of<scalar_t>* __restrict__ grad_v,
                    const scalar_t* __restrict__ x, const acc_of<scalar_t>* __restrict__ threshold,
                    const acc_of<scalar_t>* __restrict__ leak, const acc_of<scalar_t>* __restrict__ v0,
                    scalar_t* __restrict__ grad_x, acc_of<scalar_t>* __restrict__ grad_v0,
                    Partial<acc_of<scalar_t>>* __restrict__ partials, acc_of<scalar_t>* checkpoints,
                    int64_t grad_s_stride_t, const __grid_constant__ BackwardOptions<acc_of<scalar_t>> options,
                    const __grid_constant__ Plan plan, const __grid_constant__ Layout layout) {
  using acc_t = acc_of<scalar_t>;
  constexpr int kSteps = kTimesteps ? kTimesteps : kSegment;
  const int64_t timesteps = kTimesteps ? kTimesteps : layout.timesteps, count = layout.neurons;
  const int64_t last = kTimesteps ? 0 : (timesteps - 1) / kSegment * kSegment;  // where the last segment starts
  int64_t n = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * kSize;
  Neuron<acc_t> neurons[kSize];
  load_neurons<true>(neurons, threshold, leak, options.v_reset, layout.channels, n);
  Partial<acc_t> sums[kSize] = {};
  for (; n < count; n += plan.stride) {
    Packet<scalar_t, kSize> same_current, same_grad;  // of all timesteps, where the stride is 0
    if (layout.x_stride_t == 0) same_current = load<kSize>(x + n);
    if (grad_s_stride_t == 0) same_grad = load<kSize>(grad_s + n);
    const auto load_steps = [&](Packet<scalar_t, kSize>(&packets)[kSteps], const scalar_t* from, int64_t stride_t,
                                int64_t t0, const Packet<scalar_t, kSize>& same) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) packets[j] = same;
      if (stride_t == 0) return;
#pragma unroll
      for (int j = 0; j < kSteps; ++j)
        if (t0 + j < timesteps) packets[j] = load<kSize>(from + (t0 + j) * stride_t + n);
    };
    acc_t start[kSize] = {};  // the membranes a segment starts from
    if (v0 != nullptr) load_membrane(start, v0 + n);
    if constexpr (kTimesteps == 0) {
      for (int64_t t0 = 0; t0 < last; t0 += kSteps) {
        if (t0 > 0) store_membrane(checkpoints + (t0 / kSteps - 1) * count + n, start);
        Packet<scalar_t, kSize> current[kSteps];
        load_steps(current, x, layout.x_stride_t, t0, same_current);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            const acc_t h = charge<kReset>(acc_t(widen(current[j].get(k))), start[k], neurons[k]);
            start[k] = discharge<kReset>(h, neurons[k]);
          }
        }
      }
    }
    acc_t grad_v_last[kSize] = {};
    if (grad_v != nullptr) load_membrane(grad_v_last, grad_v + n);
    Carry<acc_t> carry[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) carry[k] = {grad_v_last[k], acc_t(0)};
    for (int64_t t0 = last;; t0 -= kSteps) {
      Packet<scalar_t, kSize> current[kSteps], grad[kSteps];
      load_steps(current, x, layout.x_stride_t, t0, same_current);
      load_steps(grad, grad_s, grad_s_stride_t, t0, same_grad);
      acc_t h[kSteps][kSize], v[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) v[k] = start[k];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        if (t0 + j >= timesteps) continue;
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          h[j][k] = charge<kReset>(acc_t(widen(current[j].get(k))), v[k], neurons[k]);
          v[k] = discharge<kReset>(h[j][k], neurons[k]);
        }
      }
#pragma unroll
      for (int j = kSteps - 1; j >= 0; --j) {
        if (t0 + j >= timesteps) continue;
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          v[k] = j > 0 ? discharge<kReset>(forgotten(h[j > 0 ? j - 1 : 0][k]), neurons[k]) : start[k];
        backward_neurons<kReset>(grad[j], h[j], v, neurons, options, carry, sums);
        store(grad_x + (t0 + j) * count + n, grad[j]);
      }
      if (t0 == 0) break;
      if (t0 > kSteps)
        load_membrane(start, checkpoints + (t0 / kSteps - 2) * count + n);
      else if (v0 != nullptr)
        load_membrane(start, v0 + n);
      else
        for (acc_t& at_rest : start) at_rest = acc_t(0);
    }
    if constexpr (kReset == Reset::soft_delayed) {
      if (v0 != nullptr && !options.detach_reset) {
        acc_t slopes[kSize];
        spike_slopes(slopes, start, neurons, options.surrogate, options.scale);
#pragma unroll
        for (int k = 0; k < kSize; ++k)
          sums[k].threshold = add(sums[k].threshold, backward_v0_delayed(start[k], slopes[k], neurons[k], carry[k]));
      }
    }
    if (grad_v0 != nullptr) {
      acc_t grad_start[kSize];
#pragma unroll
      for (int k = 0; k < kSize; ++k) grad_start[k] = carry[k].grad_v;
      store_membrane(grad_v0 + n, grad_start);
    }
  }
  if (partials != nullptr) store_partials(partials, sums, layout, plan);
}

bool from_rest(const LifBackward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.grad_v; }

int packet_of(const LifBackward& args) {
  return packet_of(args.shape, from_rest(args), args.grad_s_stride_t, args.grad_s, args.grad_v, args.x, args.v0,
                   args.grad_x, args.grad_v0);
}

// As many blocks as tiles, up to kMaxBlocks, or fewer where their partial sums would pass kPartials (yet kMinBlocks,
// enough to fill a device): constants, so that a sum has the same bits on every device. Without sums, all tiles.
Plan plan_backward(const LifBackward& args) {
  const LifShape& shape = args.shape;
  const int64_t tile = kBlock * packet_of(args), tiles = ceil_div(shape.neurons, tile);
  Plan plan{tiles, 1, 0};
  if (args.grad_threshold != nullptr) {
    int64_t sweep = 1;  // blocks until the channels come around at the start of a tile again
    if (shape.channels > 1) {
      plan.slots = std::min(shape.channels, (shape.inner + tile - 2) / shape.inner + 1);
      sweep = shape.channels * shape.inner / std::gcd(shape.channels * shape.inner, tile);
    }
    const int64_t wanted = std::clamp(kPartials / plan.slots, kMinBlocks, kMaxBlocks);
    plan.blocks = std::min(tiles, std::max<int64_t>(wanted / sweep, 1) * sweep);
  }
  plan.stride = plan.blocks * tile;
  return plan;
}

int64_t partial_bytes(const LifBackward& args, const Plan& plan) {
  return args.grad_threshold == nullptr
             ? 0
             : ceil_div(plan.blocks * plan.slots * 2 * size_of_acc(args.shape.dtype), 16) * 16;
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

int64_t lif_backward_workspace_cuda(const LifBackward& args) {
  const int64_t segments = ceil_div(args.shape.timesteps, kSegment);
  const int64_t checkpoints = std::max<int64_t>(segments - 2, 0) * args.shape.neurons * size_of_acc(args.shape.dtype);
  return partial_bytes(args, plan_backward(args)) + checkpoints;
}

void lif_backward_cuda(const LifBackward& args, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = plan_backward(args);
  const Layout layout = layout_of(args.shape);
  const int packet = packet_of(args);
  with_dtype(args.shape.dtype, [&](auto dtype) {
    using scalar_t = decltype(dtype);
    using acc_t = acc_of<scalar_t>;
    const auto grad_s = static_cast<const scalar_t*>(args.grad_s), x = static_cast<const scalar_t*>(args.x);
    const auto threshold = static_cast<const acc_t*>(args.threshold);
    const auto grad_x = static_cast<scalar_t*>(args.grad_x);
    const auto partials = args.grad_threshold ? static_cast<Partial<acc_t>*>(args.workspace) : nullptr;
    const auto checkpoints = reinterpret_cast<acc_t*>(static_cast<char*>(args.workspace) + partial_bytes(args, plan));
    const BackwardOptions<acc_t> options{acc_t(args.v_reset), acc_t(args.surrogate_scale), args.surrogate,
                                         args.detach_reset};
    if (from_rest(args)) {
      const auto kernel =
          packet == 1 ? single_backward_kernel<scalar_t, 1> : single_backward_kernel<scalar_t, kPacket<scalar_t>>;
      kernel<<<plan.blocks, kBlock, 0, stream>>>(grad_s, x, threshold, grad_x, partials, options, plan, layout);
    } else {
      with_reset(args.reset, [&](auto reset) {
        with_steps<scalar_t>(packet, args.shape.timesteps, [&](auto size, auto timesteps) {
          backward_kernel<scalar_t, size, timesteps, reset><<<plan.blocks, kBlock, 0, stream>>>(
              grad_s, static_cast<const acc_t*>(args.grad_v), x, threshold, static_cast<const acc_t*>(args.leak),
              static_cast<const acc_t*>(args.v0), grad_x, static_cast<acc_t*>(args.grad_v0), partials, checkpoints,
              args.grad_s_stride_t, options, plan, layout);
        });
      });
    }
    check_launch("lif_backward");
    if (partials == nullptr) return;
    sum_partials_kernel<acc_t><<<args.shape.channels, kSumBlock, 0, stream>>>(
        partials, static_cast<acc_t*>(args.grad_threshold), static_cast<acc_t*>(args.grad_leak), kBlock * packet, plan,
        layout);
    check_launch("sum_partials");
  });
}

}  // namespace iirsnn
