// What the CUDA kernels share: a thread's neurons, where they are, and how they are moved, 16 bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "lif/lif.h"

namespace iirsnn::cuda {

constexpr int kBlock = 128;
constexpr int kSegment = 8;  // timesteps held in registers
constexpr unsigned kWarp = 0xffffffffu;

template <typename scalar_t>
using acc_of = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
// Two numbers rounded to 16 bits, by one instruction: rounded alone, each would take the slow converter, eight cycles.
template <typename scalar_t>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<scalar_t, __half>)
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  else
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
template <typename scalar_t>
__device__ __forceinline__ scalar_t narrow(acc_of<scalar_t> value) {
  if constexpr (sizeof(scalar_t) == 2)
    return bit_cast<scalar_t>(uint16_t(narrow_pair<scalar_t>(value, 0.0f)));
  else
    return value;
}

template <auto kValue>
using constant = std::integral_constant<decltype(kValue), kValue>;

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

template <typename scalar_t, int kSize>
__device__ __forceinline__ void widen(acc_of<scalar_t> (&values)[kSize], const Packet<scalar_t, kSize>& packet) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) {
    if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>)
      values[k] = bit_cast<float>(k % 2 ? packet.words[k / 2] & 0xffff0000u : packet.words[k / 2] << 16);
    else
      values[k] = widen(packet.get(k));
  }
}

template <typename scalar_t, int kSize>
__device__ __forceinline__ Packet<scalar_t, kSize> narrow(const acc_of<scalar_t> (&values)[kSize]) {
  Packet<scalar_t, kSize> packet;
  if constexpr (sizeof(scalar_t) == 2 && kSize > 1) {
#pragma unroll
    for (int k = 0; k < kSize; k += 2) packet.words[k / 2] = narrow_pair<scalar_t>(values[k], values[k + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) packet.set(k, narrow<scalar_t>(values[k]));
  }
  return packet;
}

template <int kSize, typename value_t>
__device__ __forceinline__ Packet<value_t, kSize> load(const value_t* from) {
  Packet<value_t, kSize> packet;
  if constexpr (kSize == 1) {
    packet.set(0, *from);
  } else if constexpr (sizeof(packet) == 8) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    memcpy(&packet, &words, sizeof(packet));
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
__device__ __forceinline__ void store_words(uint2* to, uint2 words) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(words.x), "r"(words.y) : "memory");
}

template <int kSize, typename value_t>
__device__ __forceinline__ void store(value_t* to, const Packet<value_t, kSize>& packet) {
  if constexpr (kSize == 1) {
    *to = packet.get(0);
  } else if constexpr (sizeof(packet) == 8) {
    uint2 words;
    memcpy(&words, &packet, sizeof(packet));
    store_words(reinterpret_cast<uint2*>(to), words);
  } else {
    uint4 words[sizeof(packet) / 16];
    memcpy(words, &packet, sizeof(packet));
#pragma unroll
    for (int i = 0; i < int(sizeof(packet) / 16); ++i) store_words(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
}

// In shared memory.
template <int kSize, typename value_t>
__device__ __forceinline__ void put(value_t* to, const Packet<value_t, kSize>& packet) {
  if constexpr (kSize == 1) {
    *to = packet.get(0);
  } else {
    using words_t = std::conditional_t<sizeof(packet) == 8, uint2, uint4>;
    static_assert(sizeof(packet) == sizeof(words_t));
    words_t words;
    memcpy(&words, &packet, sizeof(packet));
    *reinterpret_cast<words_t*>(to) = words;
  }
}

// From global to shared memory, through no register where the device can; there after wait_for_copies().
template <int kSize, typename value_t>
__device__ __forceinline__ void copy_packet(value_t* to, const value_t* from) {
  constexpr int kBytes = kSize * int(sizeof(value_t));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kBytes >= 4) {
    const auto address = uint32_t(__cvta_generic_to_shared(to));
    if constexpr (kBytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes) : "memory");
    return;
  }
#endif
  put(to, load<kSize>(from));
}
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
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

}  // namespace iirsnn::cuda
