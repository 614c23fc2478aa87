// LIF forward and backward on CUDA: one launch over all timesteps.
//
// Moved per neuron, in elements of x (v0, v and their gradients only when given or asked for, one acc each):
//   forward   T = 1: 1 read, 1 written     T: T read, T written       packed: T / 8 bytes written instead
//   backward  T = 1: 2 read, 1 written     T <= 8: 2T read, T written
//             T > 8: the T - 8 or more timesteps before the last segment are read once more, and each segment but the
//             first and the last leaves one membrane (acc) in the workspace. Storing them all in forward would cost
//             every forward, also those without a backward; recomputing from t = 0 would read x T / 8 times.
// A current or gradient that is the same at every timestep (stride 0) is read once.
//
// A thread owns the neurons of one 16-byte packet and keeps their membranes in registers; it asks for all packets of a
// segment before it needs the first. What hides the latency of memory is bytes in flight, not threads: 32 KiB or more
// on each multiprocessor, T (forward) or 2T (backward) packets a thread. 128 threads a block, because the largest
// backward takes 217 registers a thread and small blocks waste the fewest of the 64 K. Not yet measured on a device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "lif/cuda/lif_cuda.h"

// The largest T that has kernels of its own; a smaller one builds faster.
#ifndef IIRSNN_UNROLLED_TIMESTEPS
#define IIRSNN_UNROLLED_TIMESTEPS 8
#endif

namespace iirsnn {
namespace {

constexpr int kBlock = 128;
constexpr int kSegment = 8;        // timesteps held in registers
constexpr int kSinglePackets = 2;  // packets per thread of a forward at T = 1
constexpr int kSumBlock = 256;
constexpr int64_t kMaxBlocks = 8192, kMinBlocks = 512, kPartials = 1 << 16;  // see plan_backward
constexpr unsigned kWarp = 0xffffffffu;

// Blocks of a backward kernel on a multiprocessor: enough for 32 KiB of loads in flight, 2T packets a thread. Elsewhere
// 1 is said aloud, which keeps ptxas from spilling a few bytes to fit one more.
constexpr int blocks_at_least(int timesteps) { return timesteps == 1 ? 8 : timesteps == 2 ? 4 : 1; }

template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
template <typename scalar_t>
__device__ __forceinline__ scalar_t narrow(acc_of<scalar_t> value) {
  if constexpr (std::is_same_v<scalar_t, __half>)
    return __float2half_rn(value);
  else if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>)
    return __float2bfloat16_rn(value);
  else
    return value;
}

// ---- where a thread's neurons are

// n / divisor for 0 <= n < 2^63 by one multiplication: magic = ceil(2^(64 + shift) / divisor); magic 0 divides by 1.
struct Divider {
  uint64_t magic = 0;
  int shift = 0;

  explicit Divider(int64_t divisor) {
    if (divisor == 1) return;
    while ((int64_t(2) << shift) < divisor) ++shift;
    magic = uint64_t((((unsigned __int128)1 << (64 + shift)) + divisor - 1) / divisor);
  }
  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return magic == 0 ? n : int64_t(__umul64hi(n, magic) >> shift);
  }
};

// Neuron n belongs to channel (n / inner) % count.
struct Channels {
  int64_t count, inner;
  Divider by_inner, by_count;
};

struct Layout {
  int64_t timesteps, neurons, x_stride_t;
  Channels channels;
};

// kSize neighbours, held as the words they were loaded in: 16-bit values on their own would take a register each.
template <typename value_t, int kSize>
struct Packet {
  using word_t = std::conditional_t<sizeof(value_t) == 8, uint64_t, uint32_t>;
  static constexpr int kPerWord = sizeof(word_t) / sizeof(value_t);
  word_t words[(kSize + kPerWord - 1) / kPerWord] = {};

  __device__ __forceinline__ value_t get(int k) const {
    if constexpr (kPerWord == 2)
      return bit_cast<value_t>(uint16_t(words[k / 2] >> k % 2 * 16));
    else
      return bit_cast<value_t>(words[k]);
  }
  __device__ __forceinline__ void set(int k, value_t value) {
    if constexpr (kPerWord == 2)
      words[k / 2] = (words[k / 2] & (k % 2 ? 0xffffu : 0xffff0000u)) | uint32_t(bit_cast<uint16_t>(value))
                                                                            << k % 2 * 16;
    else
      words[k] = bit_cast<word_t>(value);
  }
};

template <typename scalar_t>
constexpr int kPacket = 16 / sizeof(scalar_t);

template <int kSize, typename value_t>
__device__ __forceinline__ Packet<value_t, kSize> load(const value_t* from) {
  Packet<value_t, kSize> packet;
  if constexpr (kSize == 1) {
    packet.set(0, *from);
  } else {
    uint4 words[sizeof(packet) / 16];
#pragma unroll
    for (int i = 0; i < int(sizeof(packet) / 16); ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(&packet, words, sizeof(packet));
  }
  return packet;
}

// In assembly, because the compiler takes a plain store of eight 16-bit values apart into four of 4 bytes.
__device__ __forceinline__ void store_words(uint4* to, uint4 words) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

template <int kSize, typename value_t>
__device__ __forceinline__ void store(value_t* to, const Packet<value_t, kSize>& packet) {
  if constexpr (kSize == 1) {
    *to = packet.get(0);
  } else {
    uint4 words[sizeof(packet) / 16];
    memcpy(words, &packet, sizeof(packet));
#pragma unroll
    for (int i = 0; i < int(sizeof(packet) / 16); ++i) store_words(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
}

// Only at T = 1 may the last packet end beyond the last neuron: at any other T a row that is no multiple of packets
// would put the next row off its 16 bytes, and such rows are moved neuron by neuron (kSize = 1). Beyond, 0 is read.
template <int kSize, typename value_t>
__device__ __forceinline__ Packet<value_t, kSize> load_tail(const value_t* row, int64_t n, int64_t neurons) {
  if (n + kSize <= neurons) return load<kSize>(row + n);
  Packet<value_t, kSize> packet;
#pragma unroll
  for (int k = 0; k < kSize; ++k)
    if (n + k < neurons) packet.set(k, row[n + k]);
  return packet;
}

template <int kSize, typename value_t>
__device__ __forceinline__ void store_tail(value_t* row, int64_t n, int64_t neurons,
                                           const Packet<value_t, kSize>& packet) {
  if (n + kSize <= neurons) return store(row + n, packet);
#pragma unroll
  for (int k = 0; k < kSize; ++k)
    if (n + k < neurons) row[n + k] = packet.get(k);
}

// Bit k of fired: the spike of neuron n + k. Every lane of the warp must come here.
template <int kSize>
__device__ __forceinline__ void store_bits(uint8_t* row, int64_t n, int64_t neurons, unsigned fired) {
  const int64_t padded = packed_bytes(neurons) * 8, left = neurons - n;
  if (left < kSize) fired &= left > 0 ? (1u << left) - 1 : 0;
  if constexpr (kSize == 1) {
    const unsigned word = __ballot_sync(kWarp, fired);
    if (n % 32 == 0 && n < padded) *reinterpret_cast<uint32_t*>(row + n / 8) = word;
  } else {
#pragma unroll
    for (int width = kSize; width < 8; width *= 2) fired |= __shfl_down_sync(kWarp, fired, width / kSize) << width;
    if (n % 8 == 0 && n < padded) row[n / 8] = uint8_t(fired);
  }
}

// kBackward: with the inverse threshold. leak is null where it plays no part.
template <bool kBackward, int kSize, typename acc_t>
__device__ __forceinline__ void load_neurons(Neuron<acc_t> (&neurons)[kSize], const acc_t* __restrict__ threshold,
                                             const acc_t* __restrict__ leak, acc_t v_reset, const Channels& channels,
                                             int64_t n) {
  const auto neuron_of = [&](int64_t channel) {
    const acc_t th = threshold[channel];
    return Neuron<acc_t>{th, kBackward ? div(acc_t(1), th) : acc_t(0), leak ? leak[channel] : acc_t(0), v_reset};
  };
  int64_t channel = 0, inner = 0;
  if (channels.count > 1) {
    const int64_t run = channels.by_inner(n);
    channel = run - channels.by_count(run) * channels.count;
    inner = n - run * channels.inner;
  }
  neurons[0] = neuron_of(channel);
#pragma unroll
  for (int k = 1; k < kSize; ++k) {
    neurons[k] = neurons[k - 1];
    if (++inner != channels.inner || channels.count == 1) continue;
    inner = 0;
    if (++channel == channels.count) channel = 0;
    neurons[k] = neuron_of(channel);
  }
}

template <int kSize, typename acc_t>
__device__ __forceinline__ void load_membrane(acc_t (&v)[kSize], const acc_t* from) {
  const auto packet = load<kSize>(from);
#pragma unroll
  for (int k = 0; k < kSize; ++k) v[k] = packet.get(k);
}

template <int kSize, typename acc_t>
__device__ __forceinline__ void store_membrane(acc_t* to, const acc_t (&v)[kSize]) {
  Packet<acc_t, kSize> packet;
#pragma unroll
  for (int k = 0; k < kSize; ++k) packet.set(k, v[k]);
  store(to, packet);
}

// ---- forward

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

// ---- backward

// The same value, of which the compiler does not know that it is the same: it would otherwise keep what it computed
// from it the first time, a membrane beside each h: 40 registers more at T = 8 in 16 bit.
__device__ __forceinline__ float forgotten(float value) {
  asm("" : "+f"(value));
  return value;
}
__device__ __forceinline__ double forgotten(double value) {
  asm("" : "+d"(value));
  return value;
}

// Blocks walk over the neurons in strides that are a multiple of channels * inner, so that a thread meets the same
// channels in each of them and sums their gradients in registers. A block leaves `slots` pairs of partial sums, one for
// each channel its tile touches, and sum_partials_kernel adds them in a fixed order: no atomics, the same bits each
// run.
struct Plan {
  int64_t blocks, slots, stride;
};

template <typename acc_t>
struct Partial {
  acc_t threshold, leak;
};

template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> operator+(Partial<acc_t> a, Partial<acc_t> b) {
  return {add(a.threshold, b.threshold), add(a.leak, b.leak)};
}

// Lanes apart by less than width (a power of two) end with their sum.
template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> sum_lanes(Partial<acc_t> sum, int width) {
  for (int apart = width / 2; apart > 0; apart /= 2) {
    const Partial<acc_t> other{__shfl_xor_sync(kWarp, sum.threshold, apart), __shfl_xor_sync(kWarp, sum.leak, apart)};
    sum = sum + other;
  }
  return sum;
}

// The sum over a block, in thread 0. shared: one per warp.
template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> sum_block(Partial<acc_t> sum, Partial<acc_t>* shared) {
  sum = sum_lanes(sum, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum = sum + shared[warp];
  return sum;
}

template <int kSize, typename acc_t>
__device__ __forceinline__ void store_partials(Partial<acc_t>* __restrict__ partials,
                                               const Partial<acc_t> (&sums)[kSize], const Layout& layout,
                                               const Plan& plan) {
  constexpr int kPositions = kBlock * kSize;
  __shared__ Partial<acc_t> shared[kPositions];
  const Channels& channels = layout.channels;
  const int64_t tile = int64_t(blockIdx.x) * kPositions;
  partials += int64_t(blockIdx.x) * plan.slots;
  const int64_t run = channels.by_inner(tile);
  if (channels.count == 1 || run == channels.by_inner(tile + kPositions - 1)) {
    Partial<acc_t> sum = sums[0];
#pragma unroll
    for (int k = 1; k < kSize; ++k) sum = sum + sums[k];
    sum = sum_block(sum, shared);
    if (threadIdx.x == 0) partials[0] = sum;
    return;
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) shared[threadIdx.x * kSize + k] = sums[k];
  __syncthreads();
  int width = 32;  // lanes to a slot: so many that every thread has kSize neurons to add
  while (width > 1 && width * plan.slots > kPositions) width /= 2;
  const int lane = threadIdx.x % width, group = threadIdx.x / width, groups = kBlock / width;
  for (int64_t base = 0; base < plan.slots; base += groups) {
    const int64_t slot = base + group, start = (run + slot) * channels.inner - tile;  // of its first run
    Partial<acc_t> sum{};
    for (int64_t i = max(-start, int64_t(0)) + lane; slot < plan.slots; i += width) {
      const int64_t runs = channels.by_inner(i) * (channels.count - 1) * channels.inner;  // of other slots, passed over
      const int64_t position = start + i + runs;
      if (position >= kPositions) break;
      sum = sum + shared[position];
    }
    sum = sum_lanes(sum, width);
    if (lane == 0 && slot < plan.slots) partials[slot] = sum;
  }
}

// One block per channel: everything that blocks have left for it.
template <typename acc_t>
__global__ void __launch_bounds__(kSumBlock)
    sum_partials_kernel(const Partial<acc_t>* __restrict__ partials, acc_t* __restrict__ grad_threshold,
                        acc_t* __restrict__ grad_leak, int64_t tile, const __grid_constant__ Plan plan,
                        const __grid_constant__ Layout layout) {
  __shared__ Partial<acc_t> shared[kSumBlock / 32];
  const Channels& channels = layout.channels;
  Partial<acc_t> sum{};
  if (channels.count == 1) {
    for (int64_t block = threadIdx.x; block < plan.blocks; block += kSumBlock) sum = sum + partials[block];
  } else {
    const int64_t runs = channels.by_inner(plan.blocks * tile - 1) + 1;     // of all channels
    const int64_t blocks_per_run = (channels.inner + tile - 2) / tile + 1;  // at most
    for (int64_t i = threadIdx.x;; i += kSumBlock) {
      const int64_t run = i / blocks_per_run * channels.count + blockIdx.x;
      if (run >= runs) break;
      const int64_t block = run * channels.inner / tile + i % blocks_per_run;
      const int64_t slot = run - channels.by_inner(block * tile);
      if (block < plan.blocks && slot >= 0 && slot < channels.count) sum = sum + partials[block * plan.slots + slot];
    }
  }
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) grad_threshold[blockIdx.x] = sum.threshold, grad_leak[blockIdx.x] = sum.leak;
}

template <typename acc_t>
struct BackwardOptions {
  acc_t v_reset, scale;
  Surrogate surrogate;
  bool detach_reset;
};

template <auto kValue>
using constant = std::integral_constant<decltype(kValue), kValue>;

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

// One timestep of a thread's neurons: grad_s becomes grad_x.
template <Reset kReset, typename scalar_t, int kSize, typename acc_t>
__device__ __forceinline__ void backward_neurons(Packet<scalar_t, kSize>& grad, const acc_t (&h)[kSize],
                                                 const acc_t (&v)[kSize], const Neuron<acc_t> (&neurons)[kSize],
                                                 const BackwardOptions<acc_t>& options, Carry<acc_t> (&carry)[kSize],
                                                 Partial<acc_t> (&sums)[kSize]) {
  acc_t slopes[kSize];
  spike_slopes(slopes, h, neurons, options.surrogate, options.scale);
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    const StepGrad<acc_t> step = backward_step<kReset>(acc_t(widen(grad.get(k))), h[k], v[k], slopes[k], neurons[k],
                                                       options.detach_reset, carry[k]);
    sums[k] = sums[k] + Partial<acc_t>{step.threshold, step.leak};
    grad.set(k, narrow<scalar_t>(step.x));
  }
}

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

// ---- unpack

// A thread reads one byte, a warp 256 neurons; its stores are kSize neurons a lane, side by side across the warp.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kBlock, 1)
    unpack_kernel(const uint8_t* __restrict__ bits, scalar_t* __restrict__ s, int64_t timesteps, int64_t neurons) {
  const int64_t column = int64_t(blockIdx.x) * kBlock + threadIdx.x, row_bytes = packed_bytes(neurons);
  const int lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.y; t < timesteps; t += gridDim.y) {
    const unsigned byte = column < row_bytes ? bits[t * row_bytes + column] : 0;
#pragma unroll
    for (int i = 0; i < 8 / kSize; ++i) {
      const int in_warp = (i * 32 + lane) * kSize;
      const unsigned fired = __shfl_sync(kWarp, byte, in_warp / 8) >> in_warp % 8;
      const int64_t first = (column - lane) * 8 + in_warp;
      Packet<scalar_t, kSize> spikes;
#pragma unroll
      for (int k = 0; k < kSize; ++k) spikes.set(k, narrow<scalar_t>(fired >> k & 1));
      if (first < neurons) store(s + t * neurons + first, spikes);
    }
  }
}

// ---- launchers

template <typename F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(__half{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
  }
  throw std::invalid_argument("unknown dtype " + std::to_string(int(dtype)));
}

template <typename F>
void with_reset(Reset reset, const F& f) {
  switch (reset) {
    case Reset::soft:
      return f(constant<Reset::soft>{});
    case Reset::hard:
      return f(constant<Reset::hard>{});
    case Reset::none:
      return f(constant<Reset::none>{});
    case Reset::soft_delayed:
      return f(constant<Reset::soft_delayed>{});
  }
  throw std::invalid_argument("unknown reset " + std::to_string(int(reset)));
}

// Calls f(neurons per packet, T or 0 for any). Rows off their 16 bytes and double, which is there to check gradients
// with, share one kernel for every T: that keeps the build short.
template <typename scalar_t, int kTimesteps = IIRSNN_UNROLLED_TIMESTEPS, typename F>
void with_steps(int packet, int64_t timesteps, const F& f) {
  if (packet == 1)
    f(constant<1>{}, constant<0>{});
  else if constexpr (kTimesteps < 2 || std::is_same_v<scalar_t, double>)
    f(constant<kPacket<scalar_t>>{}, constant<0>{});
  else if (timesteps == kTimesteps)
    f(constant<kPacket<scalar_t>>{}, constant<kTimesteps>{});
  else
    with_steps<scalar_t, kTimesteps - 1>(packet, timesteps, f);
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string(kernel) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; iirsnn was built for other GPUs: build it again with TORCH_CUDA_ARCH_LIST naming this one";
  throw std::runtime_error(message);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
int64_t size_of_acc(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// One timestep and no membrane: the kernels of T = 1.
bool from_rest(const LifForward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.v; }
bool from_rest(const LifBackward& args) { return args.shape.timesteps == 1 && !args.v0 && !args.grad_v; }

// Neurons a thread moves at once: a packet of 16 bytes when every row starts on 16 bytes, else 1.
template <typename... pointers_t>
int packet_of(const LifShape& shape, bool one_row, int64_t stride, pointers_t... pointers) {
  const int64_t rows = one_row ? 0 : (shape.neurons | shape.x_stride_t | stride) * size_of(shape.dtype);
  return (rows | (reinterpret_cast<intptr_t>(pointers) | ...)) % 16 == 0 ? int(16 / size_of(shape.dtype)) : 1;
}
int packet_of(const LifForward& args) {
  return packet_of(args.shape, from_rest(args), 0, args.x, args.s, args.v0, args.v);
}
int packet_of(const LifBackward& args) {
  return packet_of(args.shape, from_rest(args), args.grad_s_stride_t, args.grad_s, args.grad_v, args.x, args.v0,
                   args.grad_x, args.grad_v0);
}

Layout layout_of(const LifShape& shape) {
  const int64_t inner = shape.channels == 1 ? shape.neurons : shape.inner;
  return {shape.timesteps,
          shape.neurons,
          shape.x_stride_t,
          {shape.channels, inner, Divider(inner), Divider(shape.channels)}};
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
    with_reset(args.reset, [&](auto reset) {
      with_steps<scalar_t>(packet, args.shape.timesteps, [&](auto size, auto timesteps) {
        forward_kernel<scalar_t, size, timesteps, reset><<<tiles, kBlock, 0, stream>>>(
            x, threshold, static_cast<const acc_t*>(args.leak), static_cast<const acc_t*>(args.v0), s, args.bits,
            static_cast<acc_t*>(args.v), acc_t(args.v_reset), layout);
      });
    });
  });
  check_launch("lif_forward");
}

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

void unpack_spikes_cuda(const uint8_t* bits, void* s, DType dtype, int64_t timesteps, int64_t neurons, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const dim3 grid(unsigned(ceil_div(packed_bytes(neurons), kBlock)), unsigned(std::min<int64_t>(timesteps, 65535)));
  const bool packets = (neurons * size_of(dtype) | reinterpret_cast<uintptr_t>(s)) % 16 == 0;
  with_dtype(dtype, [&](auto value) {
    using scalar_t = decltype(value);
    const auto spikes = static_cast<scalar_t*>(s);
    if (packets)
      unpack_kernel<scalar_t, kPacket<scalar_t>><<<grid, kBlock, 0, stream>>>(bits, spikes, timesteps, neurons);
    else
      unpack_kernel<scalar_t, 1><<<grid, kBlock, 0, stream>>>(bits, spikes, timesteps, neurons);
  });
  check_launch("unpack_spikes");
}

}  // namespace iirsnn
