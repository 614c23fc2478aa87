// LIF on the CPU. Forward reads x and writes s; backward reads x and grad_s and writes grad_x: nothing else of size
// [T, N] exists. A vector of neurons goes through all its timesteps before the next one starts, its membranes in
// registers and, for backward, on the stack; for more than kSegment timesteps backward keeps one membrane in kSegment.
//
// Kernels are written once, for a number or a vector of them (lanes.h), and compiled for several instruction sets;
// without contraction all of them give the same bits.
#include "lif/cpu/lif_cpu.h"

#include <algorithm>
#include <memory>

#include "lif/cpu/cpu_lif.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packing reads eight bytes as one little-endian word");

namespace iirsnn {
namespace {

constexpr int kHalfBlock = 256;  // neurons, of float16, whose float rows stay in the L1/L2 cache

// ---- Rows of float16 ----

template <typename scalar_t>
struct LoadRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const scalar_t* from, float* to, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = to_acc(from[i]);
  }
};

template <typename scalar_t>
struct StoreRow {
  template <int kBytes>
  static IIRSNN_INLINE void run(const float* from, scalar_t* to, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = Convert<scalar_t>::round(from[i]);
  }
};

#if defined(__x86_64__)
// The processor's own float16 conversions, which the compiler does not make of the loops above; the same bits.
IIRSNN_AVX2 void load_half_f16c(const Half* from, float* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  LoadRow<Half>::run<16>(from + i, to + i, n - i);
}
IIRSNN_AVX2 void store_half_f16c(const float* from, Half* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  StoreRow<Half>::run<16>(from + i, to + i, n - i);
}
#endif

void load_row(const Half* from, float* to, int n) {
#if defined(__x86_64__)
  if (capability() >= kAvx2) return load_half_f16c(from, to, n);
#endif
  version<LoadRow<Half>>()(from, to, n);
}
void store_row(const float* from, Half* to, int n) {
#if defined(__x86_64__)
  if (capability() >= kAvx2) return store_half_f16c(from, to, n);
#endif
  version<StoreRow<Half>>()(from, to, n);
}

// ---- Bits ----

// For packed output a neuron is first a byte: bit 0 its spike, bit 1 NaN.
struct Spiked {
  uint8_t bits;
};

template <typename out_t>
struct UnpackRow {  // n neurons, from the first bit of `bits` on
  using acc_t = typename Convert<out_t>::acc_t;
  template <int kBytes>
  static IIRSNN_INLINE void run(const uint8_t* bits, out_t* s, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) s[i] = Convert<out_t>::spike((bits[i >> 3] >> (i & 7)) & 1 ? acc_t(1) : acc_t(0));
  }
};

// marks [n, rounded up to 64, the tail zero] -> n / 64 words of bits; true when one was NaN.
bool pack_row(const Spiked* marks, uint8_t* bits, int n) {
  uint64_t seen = 0;
  for (int i = 0; i < n; i += 8) {
    uint64_t word;
    std::memcpy(&word, marks + i, sizeof(word));
    seen |= word;
    // the product moves bit 0 of byte j to bit 56 + j
    bits[i / 8] = uint8_t(((word & 0x0101010101010101u) * 0x0102040810204080u) >> 56);
  }
  return (seen & 0x0202020202020202u) != 0;
}

// ---- Parameters ----

enum { kThreshold, kLeak, kInverse, kParameters };

template <typename acc_t>
class LifChannels : public Channels<acc_t, kParameters> {
 public:
  LifChannels(const LifShape& shape, const void* threshold, const void* leak, bool backward)
      : LifChannels(shape, static_cast<const acc_t*>(threshold), static_cast<const acc_t*>(leak),
                    inverses(static_cast<const acc_t*>(threshold), backward ? shape.channels : 0)) {}

 private:
  LifChannels(const LifShape& shape, const acc_t* threshold, const acc_t* leak, std::vector<acc_t> inverse)
      : Channels<acc_t, kParameters>(shape, {threshold, leak, inverse.empty() ? nullptr : inverse.data()}),
        inverse_(std::move(inverse)) {}
  static std::vector<acc_t> inverses(const acc_t* threshold, int64_t channels) {
    std::vector<acc_t> result(channels);
    for (int64_t c = 0; c < channels; ++c) result[c] = acc_t(1) / threshold[c];
    return result;
  }
  std::vector<acc_t> inverse_;
};

template <typename V, typename acc_t>
IIRSNN_INLINE Neuron<V> neuron_at(const Parameters<acc_t, kParameters>& p, int i, acc_t v_reset) {
  const int k = p.step * i;
  return {load<V>(p.at[kThreshold] + k), load<V>(p.at[kInverse] + k), load<V>(p.at[kLeak] + k), V(v_reset)};
}

// Whether what a kernel writes, [T, N], would push all else out of the caches, and lies as streams want it.
template <typename scalar_t>
bool past_caches(const LifShape& shape, const void* to) {
  constexpr int64_t kLarge = int64_t(32) << 20;
  return shape.timesteps * shape.neurons * int64_t(sizeof(scalar_t)) >= kLarge &&
         reinterpret_cast<uintptr_t>(to) % 64 == 0 && shape.neurons * sizeof(scalar_t) % 64 == 0;
}

// What was written past the caches is there for whoever comes to know that the kernel is done.
void settle() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- Forward ----

// Neurons [begin, begin + n): pointers to the first of them at t = 0; strides in elements from timestep to timestep.
template <typename scalar_t, typename out_t>
struct ForwardBlock {
  using acc_t = typename Convert<scalar_t>::acc_t;
  const LifChannels<acc_t>* channels;
  int64_t begin, timesteps;
  const scalar_t* x;
  int64_t x_stride;
  out_t* s;
  int64_t s_stride;
  const acc_t* v0;  // or null
  acc_t* v;         // or null
  acc_t v_reset;
  bool past_caches;  // write s so
};

template <typename V, typename scalar_t>
IIRSNN_INLINE void emit(scalar_t* s, const V& h, const V& threshold, bool past_caches) {
  Memory<V>::store_spike(s, spike(h, threshold), past_caches);
}
template <typename acc_t>
IIRSNN_INLINE void emit(Spiked* s, acc_t h, acc_t threshold, bool) {
  s->bits = uint8_t((h > threshold ? 1u : 0u) | (h == h ? 0u : 2u));
}
template <typename acc_t, int kBytes>
IIRSNN_INLINE void emit(Spiked* s, const Lanes<acc_t, kBytes>& h, const Lanes<acc_t, kBytes>& threshold, bool) {
  using Bits = typename Number<Lanes<acc_t, kBytes>>::bits_t;
  typedef uint8_t Bytes __attribute__((vector_size(kBytes / sizeof(acc_t))));
  const Bits bits = select(h > threshold, Bits(1), Bits(0)) | select(h == h, Bits(0), Bits(2));
  for (int k = 0; k < Bits::kRegisters; ++k) {
    const Bytes bytes = __builtin_convertvector(bits.r[k], Bytes);
    memcpy(s + k * sizeof(bytes), &bytes, sizeof(bytes));
  }
}

template <typename scalar_t, typename out_t, Reset kReset, bool kSingle>
struct ForwardRow {  // kSingle: T = 1 from v = 0, v not wanted
  using Block = ForwardBlock<scalar_t, out_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<acc_t, kBytes>;
    b->channels->for_each_piece(b->begin, first, last,
                                [&](int i, int end, const auto& p, int64_t) IIRSNN_INLINE_LAMBDA {
                                  for (; i < end; i += sizeof(V) / sizeof(acc_t)) neurons<V>(*b, i, p);
                                });
  }

 private:
  template <typename V>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const Parameters<acc_t, kParameters>& p) {
    const scalar_t* x = b.x + i;
    out_t* s = b.s + i;
    V h = load<V>(x);
    if constexpr (kSingle) return emit(s, h, load<V>(p.at[kThreshold] + p.step * i), b.past_caches);
    const Neuron<V> neuron{load<V>(p.at[kThreshold] + p.step * i), V(acc_t(0)), load<V>(p.at[kLeak] + p.step * i),
                           V(b.v_reset)};
    if (b.v0) h = charge<kReset>(h, load<V>(b.v0 + i), neuron);
    emit(s, h, neuron.threshold, b.past_caches);
    V v = discharge<kReset>(h, neuron);
    for (int64_t t = 1; t < b.timesteps; ++t) {
      x += b.x_stride;
      s += b.s_stride;
      h = charge<kReset>(load<V>(x), v, neuron);
      emit(s, h, neuron.threshold, b.past_caches);
      v = discharge<kReset>(h, neuron);
    }
    if (b.v) store(b.v + i, v);
  }
};

template <typename scalar_t, typename out_t>
auto forward_row(Reset reset, bool single) {
  if (single) return kernel<ForwardRow<scalar_t, out_t, Reset::none, true>>();
  return with_reset(reset,
                    [](auto chosen) { return kernel<ForwardRow<scalar_t, out_t, decltype(chosen)::value, false>>(); });
}

// float16 goes through rows of floats, which the processor converts; the other types are read and written in place.
template <typename scalar_t>
using kernel_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;
template <typename scalar_t>
constexpr int kRows = std::is_same_v<scalar_t, Half> ? kHalfBlock : kBlock;

template <typename scalar_t, bool kPacked>
bool forward(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using x_t = kernel_t<scalar_t>;
  using out_t = std::conditional_t<kPacked, Spiked, x_t>;
  constexpr bool kHalf = std::is_same_v<scalar_t, Half>;
  constexpr int kSize = kRows<scalar_t>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps;
  const LifChannels<acc_t> channels(shape, args.threshold, args.leak, false);
  const auto row = forward_row<x_t, out_t>(args.reset, steps == 1 && !args.v0 && !args.v);
  std::vector<x_t> x_rows(kHalf ? steps * kSize : 0);
  std::vector<out_t> s_rows(kHalf || kPacked ? steps * kSize : 0);
  bool nan = false;
  for_each_block(shape, first_chunk, last_chunk, kSize, [&](int64_t begin, int n, int64_t) {
    const auto* x = static_cast<const scalar_t*>(args.x) + begin;
    scalar_t* s = kPacked ? nullptr : static_cast<scalar_t*>(args.s) + begin;
    ForwardBlock<x_t, out_t> block{&channels,     begin, steps,   nullptr, kSize,
                                   s_rows.data(), kSize, nullptr, nullptr, acc_t(args.v_reset)};
    if constexpr (kHalf) {
      block.x = x_rows.data();
      for (int64_t t = 0; t < steps; ++t) {
        load_row(x + t * shape.x_stride_t, x_rows.data() + t * kSize, n);
      }
    } else {
      block.x = x;
      block.x_stride = shape.x_stride_t;
      if constexpr (!kPacked) {
        block.s = s;
        block.s_stride = shape.neurons;
        block.past_caches = past_caches<scalar_t>(shape, args.s);
      }
    }
    if (args.v0) block.v0 = static_cast<const acc_t*>(args.v0) + begin;
    if (args.v) block.v = static_cast<acc_t*>(args.v) + begin;
    row(block, n);
    if constexpr (kPacked) {
      const int padded = (n + 63) / 64 * 64;
      for (int64_t t = 0; t < steps; ++t) {
        Spiked* spiked = s_rows.data() + t * kSize;
        std::fill(spiked + n, spiked + padded, Spiked{0});
        nan |= pack_row(spiked, args.bits + t * packed_bytes(shape.neurons) + begin / 8, padded);
      }
    } else if constexpr (kHalf) {
      for (int64_t t = 0; t < steps; ++t) {
        store_row(s_rows.data() + t * kSize, s + t * shape.neurons, n);
      }
    }
  });
  return nan;
}

// ---- Backward ----

enum { kThresholdSum, kLeakSum, kSums };

template <typename scalar_t>
struct BackwardBlock {
  using acc_t = typename Convert<scalar_t>::acc_t;
  const LifChannels<acc_t>* channels;
  int64_t begin, timesteps;
  const scalar_t* x;
  int64_t x_stride;
  const scalar_t* grad_s;
  int64_t grad_s_stride;
  scalar_t* grad_x;
  int64_t grad_x_stride;
  const acc_t* v0;      // or null
  const acc_t* grad_v;  // or null
  acc_t* grad_v0;       // null when v0 is
  acc_t v_reset;
  bool detach_reset;
  Surrogate surrogate;
  acc_t scale;
  bool past_caches;       // write grad_x so
  acc_t* checkpoints;     // one vector in kSegment timesteps, but for the first
  acc_t (*sums)[kBlock];  // [kSums], or null: not wanted
  double* totals;         // [kSums, C] of this chunk, added to
};

// Runs neurons(i, parameters, sums) over [first, last), which adds what neurons owe to kCount vectors of sums.
template <typename V, int kCount, typename Block, typename F>
IIRSNN_INLINE void backward_pieces(const Block* b, int first, int last, F neurons) {
  constexpr int kSize = sizeof(V) / sizeof(typename Block::acc_t);
  b->channels->for_each_piece(
      b->begin, first, last, [&](int i, int end, const auto& p, int64_t channel) IIRSNN_INLINE_LAMBDA {
        const int start = i;
        V sums[kCount];
        for (V& sum : sums) sum = V(0);
        for (; i < end; i += kSize) {
          neurons(i, p, sums);
          if (!b->sums || channel >= 0) continue;
          for (int k = 0; k < kCount; ++k) {
            store(b->sums[k] + i, sums[k]);
            sums[k] = V(0);
          }
        }
        if (!b->sums) return;
        if (channel < 0) return b->channels->template add_up<V>(b->begin, start, end, kCount, b->sums, b->totals);
        for (int k = 0; k < kCount; ++k) b->totals[k * b->channels->count() + channel] += double(sum(sums[k]));
      });
}

// Asks for what the vector after the next will load: 3 T streams may be more than the processor follows by itself.
template <typename V, typename scalar_t>
IIRSNN_INLINE void prefetch(const scalar_t* from) {
  constexpr int kSize = sizeof(V) / sizeof(typename Convert<scalar_t>::acc_t), kLine = 64 / sizeof(scalar_t);
  for (int i = 0; i < kSize; i += kLine) __builtin_prefetch(from + 2 * kSize + i);
}

template <typename scalar_t, Reset kReset>
struct BackwardRow {
  using Block = BackwardBlock<scalar_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<acc_t, kBytes>;
    if constexpr (kBytes == 32) {
      if (b->timesteps <= kSegment) {
        const Block copy = *b;  // which stores cannot change
        const auto run_as = [&](auto surrogate, auto wanted) IIRSNN_INLINE_LAMBDA {
          backward_pieces<V, kSums>(b, first, last, [&](int i, const auto& p, V* sums) IIRSNN_INLINE_LAMBDA {
            by_register<V, kBytes, decltype(surrogate)::value, decltype(wanted)::value>(copy, i, p, sums);
          });
        };
        if (b->surrogate == Surrogate::triangle) {
          const std::integral_constant<int, int(Surrogate::triangle)> triangle;
          return b->sums ? run_as(triangle, std::true_type()) : run_as(triangle, std::false_type());
        }
        return run_as(std::integral_constant<int, -1>(), std::true_type());
      }
    }
    backward_pieces<V, kSums>(b, first, last,
                              [&](int i, const auto& p, V* sums) IIRSNN_INLINE_LAMBDA { neurons<V>(*b, i, p, sums); });
  }

 private:
  // The same a register (of 16-bit floats two) after the other in each timestep: few values are live at once.
  template <typename V, int kBytes, int kSurrogate, bool kWanted>
  static IIRSNN_INLINE void by_register(const Block& b, int i, const Parameters<acc_t, kParameters>& p, V* sums) {
    constexpr int kPart = sizeof(scalar_t) == 2 ? 2 * kBytes : kBytes, kParts = kVectorBytes / kPart;
    constexpr int kLanes = kPart / sizeof(acc_t), kSize = V::kSize, kOf = kPart / kBytes;
    using P = Lanes<acc_t, kBytes, kPart>;
    const P zero = P(acc_t(0)), scale = P(b.scale);
    P v[kParts], start[kSegment][kParts], membrane[kSegment][kParts];
    Carry<P> carry[kParts];
    const auto neuron_of = [&](int k) IIRSNN_INLINE_LAMBDA { return neuron_at<P>(p, i + k * kLanes, b.v_reset); };
    IIRSNN_REGISTERS
    for (int k = 0; k < kParts; ++k) v[k] = b.v0 ? load<P>(b.v0 + i + k * kLanes) : zero;
    const scalar_t* x = b.x + i;
    const int length = int(b.timesteps);
    for (int t = 0; t < length; ++t, x += b.x_stride) {
      prefetch<V>(x);
      IIRSNN_REGISTERS
      for (int k = 0; k < kParts; ++k) {
        const Neuron<P> neuron = neuron_of(k);
        start[t][k] = v[k];
        membrane[t][k] = charge<kReset>(load<P>(x + k * kLanes), v[k], neuron);
        v[k] = discharge<kReset>(membrane[t][k], neuron);
      }
    }
    const scalar_t* grad_s = b.grad_s + (length - 1) * b.grad_s_stride + i;
    scalar_t* grad_x = b.grad_x + (length - 1) * b.grad_x_stride + i;
    alignas(64) scalar_t rows[kSegment][kSize];  // of grad_x on their way past the caches
    const int64_t to_stride = b.past_caches ? kSize : b.grad_x_stride;
    scalar_t* to = b.past_caches ? rows[length - 1] : grad_x;
    IIRSNN_REGISTERS
    for (int k = 0; k < kParts; ++k) carry[k] = {b.grad_v ? load<P>(b.grad_v + i + k * kLanes) : zero, zero};
    for (int t = length - 1; t >= 0; --t, grad_s -= b.grad_s_stride, to -= to_stride) {
      prefetch<V>(grad_s);
      IIRSNN_REGISTERS
      for (int k = 0; k < kParts; ++k) {
        const Neuron<P> neuron = neuron_of(k);
        P slope;
        if constexpr (kSurrogate >= 0) {
          slope = spike_slope<Surrogate(kSurrogate)>(membrane[t][k], neuron, scale);
        } else {
          slope = slope_at(b.surrogate, membrane[t][k], neuron, scale);
        }
        const StepGrad<P> grad = backward_step<kReset>(load<P>(grad_s + k * kLanes), membrane[t][k], start[t][k], slope,
                                                       neuron, b.detach_reset, carry[k]);
        store(to + k * kLanes, grad.x);
        if (kWanted && b.sums) {
          IIRSNN_REGISTERS
          for (int j = 0; j < kOf; ++j) {
            sums[kThresholdSum].r[k * kOf + j] = sums[kThresholdSum].r[k * kOf + j] + grad.threshold.r[j];
            sums[kLeakSum].r[k * kOf + j] = sums[kLeakSum].r[k * kOf + j] + grad.leak.r[j];
          }
        }
      }
    }
    if (b.past_caches) {
      for (int t = length - 1; t >= 0; --t, grad_x -= b.grad_x_stride) Memory<V>::copy_past_caches(grad_x, rows[t]);
    }
    if (b.v0) {
      IIRSNN_REGISTERS
      for (int k = 0; k < kParts; ++k) {
        if (kReset == Reset::soft_delayed && !b.detach_reset) {
          const Neuron<P> neuron = neuron_of(k);
          const P v0 = load<P>(b.v0 + i + k * kLanes), slope = slope_at(b.surrogate, v0, neuron, scale);
          const P owed = backward_v0_delayed(v0, slope, neuron, carry[k]);
          for (int j = 0; j < kOf; ++j) {
            sums[kThresholdSum].r[k * kOf + j] = sums[kThresholdSum].r[k * kOf + j] + owed.r[j];
          }
        }
        store(b.grad_v0 + i + k * kLanes, carry[k].grad_v);
      }
    }
  }

  template <typename V>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const Parameters<acc_t, kParameters>& p, V* sums) {
    const V zero = V(acc_t(0));
    constexpr int kSize = sizeof(V) / sizeof(acc_t);
    const Neuron<V> neuron = neuron_at<V>(p, i, b.v_reset);
    const V scale = V(b.scale);
    V v = b.v0 ? load<V>(b.v0 + i) : zero;
    const int64_t last_segment = (b.timesteps - 1) / kSegment;
    const scalar_t* x = b.x + i;
    for (int64_t t = 0; t < last_segment * kSegment; ++t, x += b.x_stride) {
      if (t % kSegment == 0) store(b.checkpoints + t / kSegment * kSize, v);
      v = discharge<kReset>(charge<kReset>(load<V>(x), v, neuron), neuron);
    }
    const scalar_t* grad_s = b.grad_s + (b.timesteps - 1) * b.grad_s_stride + i;
    scalar_t* grad_x = b.grad_x + (b.timesteps - 1) * b.grad_x_stride + i;
    Carry<V> carry{b.grad_v ? load<V>(b.grad_v + i) : zero, zero};
    V start[kSegment], membrane[kSegment];
    alignas(64) scalar_t rows[kSegment][kSize];  // of grad_x on their way past the caches
    const int64_t to_stride = b.past_caches ? kSize : b.grad_x_stride;
    for (int64_t segment = last_segment;;) {
      const int length = int(std::min<int64_t>(kSegment, b.timesteps - segment * kSegment));
      for (int t = 0; t < length; ++t, x += b.x_stride) {
        prefetch<V>(x);
        start[t] = v;
        membrane[t] = charge<kReset>(load<V>(x), v, neuron);
        v = discharge<kReset>(membrane[t], neuron);
      }
      scalar_t* to = b.past_caches ? rows[length - 1] : grad_x;
      for (int t = length - 1; t >= 0; --t, grad_s -= b.grad_s_stride, to -= to_stride) {
        prefetch<V>(grad_s);
        const V slope = slope_at(b.surrogate, membrane[t], neuron, scale);
        const StepGrad<V> grad =
            backward_step<kReset>(load<V>(grad_s), membrane[t], start[t], slope, neuron, b.detach_reset, carry);
        store(to, grad.x);
        if (b.sums) {
          sums[kThresholdSum] = sums[kThresholdSum] + grad.threshold;
          sums[kLeakSum] = sums[kLeakSum] + grad.leak;
        }
      }
      for (int t = length - 1; t >= 0; --t, grad_x -= b.grad_x_stride) {
        if (b.past_caches) Memory<V>::copy_past_caches(grad_x, rows[t]);
      }
      if (segment-- == 0) break;
      v = load<V>(b.checkpoints + segment * kSize);
      x = b.x + segment * kSegment * b.x_stride + i;
    }
    if (b.v0) {
      if (kReset == Reset::soft_delayed && !b.detach_reset) {
        const V v0 = load<V>(b.v0 + i), slope = slope_at(b.surrogate, v0, neuron, scale);
        sums[kThresholdSum] = sums[kThresholdSum] + backward_v0_delayed(v0, slope, neuron, carry);
      }
      store(b.grad_v0 + i, carry.grad_v);
    }
  }
};

// T = 1 from v = 0, no grad_v: no membrane, no reset, no carry, no leak.
template <typename scalar_t>
struct SingleBackwardRow {
  using Block = BackwardBlock<scalar_t>;
  using acc_t = typename Block::acc_t;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<acc_t, kBytes>;
    backward_pieces<V, 1>(b, first, last,
                          [&](int i, const auto& p, V* sums) IIRSNN_INLINE_LAMBDA { neurons<V>(*b, i, p, sums); });
  }

 private:
  template <typename V>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const Parameters<acc_t, kParameters>& p, V* sums) {
    const V zero = V(acc_t(0));
    const int k = p.step * i;
    const Neuron<V> neuron{zero, load<V>(p.at[kInverse] + k), zero, zero};
    Carry<V> carry{zero, zero};
    const V h = load<V>(b.x + i), slope = slope_at(b.surrogate, h, neuron, V(b.scale));
    const StepGrad<V> grad = backward_step<Reset::none>(load<V>(b.grad_s + i), h, zero, slope, neuron, true, carry);
    store(b.grad_x + i, grad.x, b.past_caches);
    if (b.sums) sums[kThresholdSum] = sums[kThresholdSum] + grad.threshold;
  }
};

template <typename scalar_t>
auto backward_row(Reset reset, bool single) {
  if (single) return kernel<SingleBackwardRow<scalar_t>>();
  return with_reset(reset, [](auto chosen) { return kernel<BackwardRow<scalar_t, decltype(chosen)::value>>(); });
}

template <typename scalar_t>
void backward(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using x_t = kernel_t<scalar_t>;
  constexpr bool kHalf = std::is_same_v<scalar_t, Half>;
  constexpr int kSize = kRows<scalar_t>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps;
  const LifChannels<acc_t> channels(shape, args.threshold, args.leak, true);
  const auto row = backward_row<x_t>(args.reset, steps == 1 && !args.v0 && !args.grad_v);
  std::vector<acc_t> checkpoints((steps - 1) / kSegment * (kVectorBytes / sizeof(acc_t)));
  std::vector<x_t> x_rows(kHalf ? steps * kSize : 0), grad_s_rows(x_rows.size()), grad_x_rows(x_rows.size());
  const auto sums = std::make_unique<acc_t[][kBlock]>(kSums);
  int64_t current = -1;
  for_each_block(shape, first_chunk, last_chunk, kSize, [&](int64_t begin, int n, int64_t chunk) {
    const auto* x = static_cast<const scalar_t*>(args.x) + begin;
    const auto* grad_s = static_cast<const scalar_t*>(args.grad_s) + begin;
    auto* grad_x = static_cast<scalar_t*>(args.grad_x) + begin;
    BackwardBlock<x_t> block{};
    block.channels = &channels;
    block.begin = begin;
    block.timesteps = steps;
    if constexpr (kHalf) {
      for (int64_t t = 0; t < steps; ++t) {
        load_row(x + t * shape.x_stride_t, x_rows.data() + t * kSize, n);
        load_row(grad_s + t * args.grad_s_stride_t, grad_s_rows.data() + t * kSize, n);
      }
      block.x = x_rows.data();
      block.grad_s = grad_s_rows.data();
      block.grad_x = grad_x_rows.data();
      block.x_stride = block.grad_s_stride = block.grad_x_stride = kSize;
    } else {
      block.x = x;
      block.x_stride = shape.x_stride_t;
      block.grad_s = grad_s;
      block.grad_s_stride = args.grad_s_stride_t;
      block.grad_x = grad_x;
      block.grad_x_stride = shape.neurons;
      block.past_caches = past_caches<scalar_t>(shape, args.grad_x);
    }
    if (args.v0) {
      block.v0 = static_cast<const acc_t*>(args.v0) + begin;
      block.grad_v0 = static_cast<acc_t*>(args.grad_v0) + begin;
    }
    if (args.grad_v) block.grad_v = static_cast<const acc_t*>(args.grad_v) + begin;
    block.v_reset = acc_t(args.v_reset);
    block.detach_reset = args.detach_reset;
    block.surrogate = args.surrogate;
    block.scale = acc_t(args.surrogate_scale);
    block.checkpoints = checkpoints.data();
    if (args.grad_threshold) {
      block.sums = sums.get();
      block.totals = static_cast<double*>(args.workspace) + chunk * kSums * shape.channels;
      if (chunk != current) std::fill_n(block.totals, kSums * shape.channels, 0.0);
      current = chunk;
    }
    row(block, n);
    if constexpr (kHalf) {
      for (int64_t t = 0; t < steps; ++t) {
        store_row(grad_x_rows.data() + t * kSize, grad_x + t * shape.neurons, n);
      }
    }
  });
}

template <typename F>
auto dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::float16:
      return f(Half());
    default:
      return f(BFloat16());
  }
}

}  // namespace

int64_t lif_chunks_cpu(const LifShape& shape) { return chunks_of(shape); }

int64_t lif_backward_workspace_cpu(const LifBackward& args) {
  return args.grad_threshold ? lif_chunks_cpu(args.shape) * kSums * args.shape.channels * int64_t(sizeof(double)) : 0;
}

bool lif_forward_cpu(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  return dispatch(args.shape.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const bool nan = args.bits ? forward<scalar_t, true>(args, first_chunk, last_chunk)
                               : forward<scalar_t, false>(args, first_chunk, last_chunk);
    settle();
    return nan;
  });
}

void lif_backward_cpu(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  dispatch(args.shape.dtype, [&](auto scalar) { backward<decltype(scalar)>(args, first_chunk, last_chunk); });
  settle();
}

void lif_backward_finish_cpu(const LifBackward& args) {
  const int64_t channels = args.shape.channels, chunks = lif_chunks_cpu(args.shape);
  const auto* partial = static_cast<const double*>(args.workspace);
  for (int64_t c = 0; c < channels; ++c) {
    double threshold = 0, leak = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      threshold += partial[chunk * 2 * channels + c];
      leak += partial[(chunk * 2 + 1) * channels + c];
    }
    if (args.shape.dtype == DType::float64) {
      static_cast<double*>(args.grad_threshold)[c] = threshold;
      static_cast<double*>(args.grad_leak)[c] = leak;
    } else {
      static_cast<float*>(args.grad_threshold)[c] = float(threshold);
      static_cast<float*>(args.grad_leak)[c] = float(leak);
    }
  }
}

void unpack_spikes_cpu(const uint8_t* bits, void* s, DType dtype, int64_t neurons, int64_t first, int64_t last) {
  dispatch(dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto unpack = version<UnpackRow<scalar_t>>();
    for (int64_t t = first; t < last; ++t) {
      const uint8_t* from = bits + t * packed_bytes(neurons);
      scalar_t* to = static_cast<scalar_t*>(s) + t * neurons;
      for (int64_t begin = 0; begin < neurons; begin += kBlock) {
        unpack(from + begin / 8, to + begin, int(std::min<int64_t>(kBlock, neurons - begin)));
      }
    }
  });
}

}  // namespace iirsnn
