// What the backward kernels share.
#pragma once

#include "lif/cuda/walk.h"

namespace iirsnn::cuda {

template <typename acc_t>
struct BackwardOptions {
  acc_t v_reset, scale;
  Surrogate surrogate;
  bool detach_reset;
};

// ds/dh of a thread's neurons. The branches are the same for every thread of the grid.
template <int kSize, typename acc_t>
__device__ __forceinline__ void spike_slopes(acc_t (&slopes)[kSize], const acc_t (&h)[kSize],
                                             const Neuron<acc_t> (&neurons)[kSize], Surrogate kind, acc_t scale) {
  acc_t z[kSize], denominators[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) z[k] = sub(mul(h[k], neurons[k].inverse_threshold), acc_t(1));
  const auto whole = [&](auto surrogate_kind) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) slopes[k] = surrogate<surrogate_kind>(z[k], scale);
  };
  const auto ratio = [&](auto surrogate_kind) {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const auto parts = surrogate_ratio<surrogate_kind>(z[k], scale);
      slopes[k] = parts.numerator, denominators[k] = parts.denominator;
    }
  };
  if (kind == Surrogate::triangle) {
    whole(constant<Surrogate::triangle>{});
  } else if (kind == Surrogate::boxcar) {
    whole(constant<Surrogate::boxcar>{});
  } else {
    if (kind == Surrogate::atan)
      ratio(constant<Surrogate::atan>{});
    else if (kind == Surrogate::sigmoid)
      ratio(constant<Surrogate::sigmoid>{});
    else
      ratio(constant<Surrogate::fast_sigmoid>{});
#pragma unroll
    for (int k = 0; k < kSize; ++k) slopes[k] = div(slopes[k], denominators[k]);
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) slopes[k] = mul(slopes[k], neurons[k].inverse_threshold);
}

// A sum of each of a thread's neurons [kSums, kSize] -> one of each of its channels.
template <int kSums, int kSize, bool kColumns, typename acc_t>
__device__ __forceinline__ void add_neurons(double (&of_channels)[kSums * Place<kSize, kColumns>::kChannels],
                                            const acc_t (&sums)[kSums * kSize]) {
#pragma unroll
  for (double& sum : of_channels) sum = 0;
#pragma unroll
  for (int i = 0; i < kSums * kSize; ++i) of_channels[kColumns ? i : i / kSize] += sums[i];
}

__host__ __device__ inline int segment_steps(int64_t timesteps) {
  return timesteps < kSegment ? int(timesteps) : kSegment;
}

// Where a thread's packets of a segment wait, and the membranes h of its timesteps but the last: in shared memory, each
// thread's its own, so that nothing has to be waited for but the copies. There a loop can count timesteps. With all in
// registers it had to be unrolled: 60 to 170 KiB of machine code, which no cache of instructions holds.
template <typename scalar_t, int kSize>
struct Stage {
  using acc_t = acc_of<scalar_t>;
  static constexpr int kStep = kWalkThreads * kSize;             // from one packet of a thread to its next
  static constexpr int kWide = std::min(kSize, kPacket<acc_t>);  // of h, 16 bytes: threads side by side

  acc_t* h;            // [steps - 1]
  scalar_t *x, *grad;  // the first packet of each
  int x_step, grad_step;

  static constexpr int bytes(int steps) {
    return kStep * int(2 * steps * sizeof(scalar_t) + (steps - 1) * sizeof(acc_t));
  }

  // A stride of 0: all timesteps are one.
  __device__ __forceinline__ Stage(void* memory, int steps, int64_t x_stride_t, int64_t grad_stride_t)
      : h(static_cast<acc_t*>(memory) + threadIdx.x * kWide),
        x(reinterpret_cast<scalar_t*>(static_cast<acc_t*>(memory) + (steps - 1) * kStep) + threadIdx.x * kSize),
        grad(x + kStep),
        x_step(x_stride_t == 0 ? 0 : 2 * kStep),
        grad_step(grad_stride_t == 0 ? 0 : 2 * kStep) {}

  static __device__ __forceinline__ void keep(acc_t* to, const acc_t (&values)[kSize]) {
#pragma unroll
    for (int first = 0; first < kSize; first += kWide) {
      Packet<acc_t, kWide> packet;
#pragma unroll
      for (int k = 0; k < kWide; ++k) packet.set(k, values[first + k]);
      put(to + first * kWalkThreads, packet);
    }
  }
  static __device__ __forceinline__ void take(acc_t (&values)[kSize], const acc_t* from) {
#pragma unroll
    for (int first = 0; first < kSize; first += kWide) {
      const auto packet = load<kWide>(from + first * kWalkThreads);
#pragma unroll
      for (int k = 0; k < kWide; ++k) values[first + k] = packet.get(k);
    }
  }

  __device__ __forceinline__ void ask_x(const scalar_t* from, int64_t stride_t, int steps) const {
    ask(x, from, stride_t, steps);
  }
  __device__ __forceinline__ void ask_grad(const scalar_t* from, int64_t stride_t, int steps) const {
    ask(grad, from, stride_t, steps);
  }

 private:
  static __device__ __forceinline__ void ask(scalar_t* to, const scalar_t* from, int64_t stride_t, int steps) {
    copy_packet<kSize>(to, from);
    if (stride_t == 0) return;
#pragma unroll
    for (int j = 1; j < kSegment; ++j) {
      from += stride_t;
      if (j < steps) copy_packet<kSize>(to + j * 2 * kStep, from);
    }
  }
};

// Neurons of a packet: such that a stage takes less than 48 KiB, which is what a launch gets without asking.
inline int64_t stage_packet(const LifShape& shape) {
  return whole_packet(shape) > 4 && shape.timesteps > 6 ? 4 : whole_packet(shape);
}

// Shared memory of a block: its stage, and in its place after that what sums `sums` of a thread.
template <typename scalar_t, int kSize>
int stage_bytes(int64_t timesteps, int sums) {
  return std::max(Stage<scalar_t, kSize>::bytes(segment_steps(timesteps)), sums * kWalkThreads * int(sizeof(double)));
}

}  // namespace iirsnn::cuda
