// LIF on the CPU. Forward reads x and writes s; backward reads x and grad_s and writes grad_x: nothing else of size
// [T, N] exists. Neurons go through in blocks whose membranes, over kSegment timesteps, stay in the L1/L2 cache; for
// more timesteps backward keeps one membrane in kSegment as a checkpoint, of the block only.
//
// A "row" is a loop over the neurons of one block at one timestep. Rows are written once, as plain C++ the compiler
// vectorises, and compiled for several instruction sets; without contraction all of them give the same bits.
#include "lif_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "half.h"

#if defined(__clang__)
#define IIRSNN_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#define IIRSNN_WIDE
#else
#define IIRSNN_VECTORIZE _Pragma("GCC ivdep")
#define IIRSNN_WIDE ",prefer-vector-width=512"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define IIRSNN_AVX2 __attribute__((target("avx2,f16c")))
#define IIRSNN_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq" IIRSNN_WIDE)))
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packing reads eight bytes as one little-endian word");

namespace iirsnn {
namespace {

constexpr int kBlock = 256;              // neurons; a multiple of the 64 that packing pads to
constexpr int64_t kSegment = 16;         // timesteps between checkpoints
constexpr int64_t kChunk = 64 * kBlock;  // neurons a thread takes at least
constexpr int64_t kMaxChunks = 256;

// ---- Instruction sets ----

enum Capability { kPortable, kAvx2, kAvx512 };
const char* const kCapabilityNames[] = {"portable", "avx2", "avx512"};

Capability best_capability() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kAvx2;
#endif
  return kPortable;
}

Capability parse_capability(const std::string& name) {
  const Capability best = best_capability();
  for (int level = kPortable; level <= best; ++level) {
    if (name == kCapabilityNames[level]) return Capability(level);
  }
  throw std::invalid_argument("cpu capability: expected portable, avx2 or avx512, at most " +
                              std::string(kCapabilityNames[best]) + " on this processor, got '" + name + "'");
}

std::atomic<Capability>& capability() {
  static std::atomic<Capability> chosen = [] {
    const char* asked = std::getenv("IIRSNN_CPU_CAPABILITY");
    return asked ? parse_capability(asked) : best_capability();
  }();
  return chosen;
}

// Row::run, compiled for each instruction set; pick() is the one in force.
template <typename Row, typename Signature>
struct Versions;
template <typename Row, typename... Args>
struct Versions<Row, void(Args...)> {
  static void portable(Args... args) { Row::run(args...); }
#if defined(__x86_64__)
  IIRSNN_AVX2 static void avx2(Args... args) { Row::run(args...); }
  IIRSNN_AVX512 static void avx512(Args... args) { Row::run(args...); }
#endif
  static auto pick() {
#if defined(__x86_64__)
    const Capability level = capability();
    if (level == kAvx512) return &avx512;
    if (level == kAvx2) return &avx2;
#endif
    return &portable;
  }
};
template <typename Row>
auto version() {
  return Versions<Row, decltype(Row::run)>::pick();
}

// ---- Rows ----

// The parameters of a block, one element a neuron, whether they are scalars or per channel.
template <typename acc_t>
struct Parameters {
  alignas(64) acc_t threshold[kBlock];
  alignas(64) acc_t inverse_threshold[kBlock];
  alignas(64) acc_t leak[kBlock];
  acc_t v_reset;

  // v_reset comes from outside the loop: a load under a condition would keep the loop from being vectorised
  IIRSNN_INLINE Neuron<acc_t> at(int i, acc_t v_reset) const {
    return {threshold[i], inverse_threshold[i], leak[i], v_reset};
  }
};

// For packed output a neuron is first a byte: bit 0 its spike, bit 1 NaN.
struct Mark {
  uint8_t bits;
};
template <typename out_t, typename acc_t>
IIRSNN_INLINE out_t emit(acc_t h, acc_t threshold) {
  return Convert<out_t>::spike(spike(h, threshold));
}
template <>
IIRSNN_INLINE Mark emit<Mark, float>(float h, float threshold) {
  return {uint8_t((h > threshold ? 1u : 0u) | (h == h ? 0u : 2u))};
}
template <>
IIRSNN_INLINE Mark emit<Mark, double>(double h, double threshold) {
  return {uint8_t((h > threshold ? 1u : 0u) | (h == h ? 0u : 2u))};
}

template <typename scalar_t, typename out_t>
struct CompareRow {  // T = 1: no membrane at all
  using acc_t = typename Convert<scalar_t>::acc_t;
  static IIRSNN_INLINE void run(const scalar_t* x, const Parameters<acc_t>* p, out_t* s, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) s[i] = emit<out_t>(to_acc(x[i]), p->threshold[i]);
  }
};

template <typename scalar_t, typename out_t, Reset kReset>
struct ForwardRow {
  using acc_t = typename Convert<scalar_t>::acc_t;
  static IIRSNN_INLINE void run(const scalar_t* x, const Parameters<acc_t>* p, acc_t* v, out_t* s, int n) {
    const acc_t v_reset = p->v_reset;
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      const Neuron<acc_t> neuron = p->at(i, v_reset);
      const acc_t h = charge<kReset>(to_acc(x[i]), v[i], neuron);
      s[i] = emit<out_t>(h, neuron.threshold);
      v[i] = discharge<kReset>(h, neuron);
    }
  }
};

template <typename acc_t, Reset kReset>
struct AdvanceRow {  // v_next may be v
  static IIRSNN_INLINE void run(const acc_t* x, const Parameters<acc_t>* p, const acc_t* v, acc_t* v_next, int n) {
    const acc_t v_reset = p->v_reset;
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      const Neuron<acc_t> neuron = p->at(i, v_reset);
      v_next[i] = discharge<kReset>(charge<kReset>(x[i], v[i], neuron), neuron);
    }
  }
};

// What backward carries from timestep to timestep and sums over them.
template <typename acc_t>
struct Gradients {
  alignas(64) acc_t v[kBlock];
  alignas(64) acc_t reset[kBlock];
  alignas(64) acc_t threshold[kBlock];
  alignas(64) acc_t leak[kBlock];
};

template <typename acc_t, Reset kReset, bool kDetach, Surrogate kSurrogate>
struct BackwardRow {
  static constexpr bool kCarriesReset = kReset == Reset::soft_delayed && !kDetach;
  static IIRSNN_INLINE void run(const acc_t* grad_s, const acc_t* x, const acc_t* v, const Parameters<acc_t>* p,
                                acc_t scale, Gradients<acc_t>* grads, acc_t* grad_x, int n) {
    const acc_t v_reset = p->v_reset;
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      const Neuron<acc_t> neuron = p->at(i, v_reset);
      Carry<acc_t> carry{grads->v[i], kCarriesReset ? grads->reset[i] : acc_t(0)};
      const acc_t h = charge<kReset>(x[i], v[i], neuron);
      const StepGrad<acc_t> grad = backward_step<kReset, kSurrogate>(grad_s[i], h, v[i], neuron, scale, kDetach, carry);
      grad_x[i] = grad.x;
      grads->threshold[i] += grad.threshold;
      grads->leak[i] += grad.leak;
      grads->v[i] = carry.grad_v;
      if constexpr (kCarriesReset) grads->reset[i] = carry.grad_reset;
    }
  }
};

// T = 1 from v = 0: no membrane, no reset, no carry. grad_threshold [n] is written, not added to.
template <typename scalar_t, Surrogate kSurrogate>
struct SingleBackwardRow {
  using acc_t = typename Convert<scalar_t>::acc_t;
  static IIRSNN_INLINE void run(const scalar_t* grad_s, const scalar_t* x, const Parameters<acc_t>* p, acc_t scale,
                                acc_t* grad_threshold, scalar_t* grad_x, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      Carry<acc_t> carry{acc_t(0), acc_t(0)};
      const StepGrad<acc_t> grad = backward_step<Reset::none, kSurrogate>(to_acc(grad_s[i]), to_acc(x[i]), acc_t(0),
                                                                          p->at(i, acc_t(0)), scale, true, carry);
      grad_x[i] = Convert<scalar_t>::round(grad.x);
      grad_threshold[i] = grad.threshold;
    }
  }
};

template <typename acc_t, Surrogate kSurrogate>
struct DelayedV0Row {
  static IIRSNN_INLINE void run(const acc_t* v0, const Parameters<acc_t>* p, acc_t scale, Gradients<acc_t>* grads,
                                int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      Carry<acc_t> carry{grads->v[i], grads->reset[i]};
      grads->threshold[i] += backward_v0_delayed<kSurrogate>(v0[i], p->at(i, acc_t(0)), scale, carry);
      grads->v[i] = carry.grad_v;
    }
  }
};

template <typename scalar_t>
struct LoadRow {
  static IIRSNN_INLINE void run(const scalar_t* from, float* to, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) to[i] = to_acc(from[i]);
  }
};

template <typename scalar_t>
struct StoreRow {
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
  LoadRow<Half>::run(from + i, to + i, n - i);
}
IIRSNN_AVX2 void store_half_f16c(const float* from, Half* to, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  StoreRow<Half>::run(from + i, to + i, n - i);
}
template <>
auto version<LoadRow<Half>>() {
  return capability() >= kAvx2 ? &load_half_f16c : &Versions<LoadRow<Half>, decltype(LoadRow<Half>::run)>::portable;
}
template <>
auto version<StoreRow<Half>>() {
  return capability() >= kAvx2 ? &store_half_f16c : &Versions<StoreRow<Half>, decltype(StoreRow<Half>::run)>::portable;
}
#endif

// Sums in 64-byte vectors, whatever the hardware's width: one order, hence the same bits everywhere.
template <typename acc_t>
struct SumRow {
  typedef acc_t Lanes __attribute__((vector_size(64)));
  static constexpr int kLanes = 64 / sizeof(acc_t);
  static IIRSNN_INLINE void run(const acc_t* row, int n, double* total) {
    Lanes sum[4] = {};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      Lanes part[4];
      std::memcpy(part, row + i, sizeof(part));
      for (int k = 0; k < 4; ++k) sum[k] += part[k];
    }
    const Lanes lanes = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    acc_t result = 0;
    for (int k = 0; k < kLanes; ++k) result += lanes[k];
    for (; i < n; ++i) result += row[i];
    *total += double(result);
  }
};

template <typename out_t>
struct UnpackRow {  // n neurons, from the first bit of `bits` on
  using acc_t = typename Convert<out_t>::acc_t;
  static IIRSNN_INLINE void run(const uint8_t* bits, out_t* s, int n) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) s[i] = Convert<out_t>::spike((bits[i >> 3] >> (i & 7)) & 1 ? acc_t(1) : acc_t(0));
  }
};

// marks [n, rounded up to 64, the tail zero] -> n / 64 words of bits; true when one was NaN.
bool pack_row(const Mark* marks, uint8_t* bits, int n) {
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

// ---- Blocks ----

int64_t chunk_neurons(const LifShape& shape) {
  const int64_t least = std::max(16 * shape.channels, (shape.neurons + kMaxChunks - 1) / kMaxChunks);
  return std::max(kChunk, (least + kBlock - 1) / kBlock * kBlock);
}

// Calls f(first, length, channel) for the runs of one channel among neurons [begin, begin + n), counted from begin.
template <typename F>
void for_each_run(const LifShape& shape, int64_t begin, int n, F f) {
  if (shape.channels == 1) return f(0, n, int64_t(0));
  int64_t channel = begin / shape.inner % shape.channels, left = shape.inner - begin % shape.inner;
  for (int first = 0; first < n;) {
    const int length = int(std::min<int64_t>(left, n - first));
    f(first, length, channel);
    first += length;
    left = shape.inner;
    if (++channel == shape.channels) channel = 0;
  }
}

template <typename acc_t>
class BlockParameters : public Parameters<acc_t> {
 public:
  BlockParameters(const LifShape& shape, const void* threshold, const void* leak, double v_reset)
      : shape_(shape), threshold_(static_cast<const acc_t*>(threshold)), leak_(static_cast<const acc_t*>(leak)) {
    this->v_reset = acc_t(v_reset);
    if (shape.channels == 1) fill(0, kBlock);
  }
  void move_to(int64_t begin, int n) {
    if (shape_.channels > 1) fill(begin, n);
  }

 private:
  void fill(int64_t begin, int n) {
    for_each_run(shape_, begin, n, [this](int first, int length, int64_t channel) {
      std::fill_n(this->threshold + first, length, threshold_[channel]);
      std::fill_n(this->inverse_threshold + first, length, acc_t(1) / threshold_[channel]);
      std::fill_n(this->leak + first, length, leak_[channel]);
    });
  }
  const LifShape shape_;
  const acc_t* const threshold_;
  const acc_t* const leak_;
};

// A block's rows are too short for the hardware to see the next ones coming. Past the end nothing happens.
template <typename scalar_t>
void prefetch(const scalar_t* row, int n) {
  const char* first = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < n * int64_t(sizeof(scalar_t)); i += 64) __builtin_prefetch(first + i, 0, 2);
}

template <typename acc_t>
void load_or_zero(acc_t* row, const void* from, int64_t begin, int n) {
  if (from) {
    std::copy_n(static_cast<const acc_t*>(from) + begin, n, row);
  } else {
    std::fill_n(row, n, acc_t(0));
  }
}

template <typename F>
void for_each_block(const LifShape& shape, int64_t first_chunk, int64_t last_chunk, F f) {
  const int64_t chunk = chunk_neurons(shape);
  const int64_t end = std::min(last_chunk * chunk, shape.neurons);
  for (int64_t begin = first_chunk * chunk; begin < end; begin += kBlock) {
    f(begin, int(std::min<int64_t>(kBlock, end - begin)), begin / chunk);
  }
}

template <typename scalar_t, typename out_t>
auto forward_row(Reset reset) {
  switch (reset) {
    case Reset::soft:
      return version<ForwardRow<scalar_t, out_t, Reset::soft>>();
    case Reset::hard:
      return version<ForwardRow<scalar_t, out_t, Reset::hard>>();
    case Reset::none:
      return version<ForwardRow<scalar_t, out_t, Reset::none>>();
    default:
      return version<ForwardRow<scalar_t, out_t, Reset::soft_delayed>>();
  }
}

template <typename scalar_t, typename out_t>
bool forward(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  constexpr bool kPacked = std::is_same_v<out_t, Mark>;
  const LifShape& shape = args.shape;
  const auto* x = static_cast<const scalar_t*>(args.x);
  const bool single = shape.timesteps == 1 && !args.v0 && !args.v;
  const auto compare = version<CompareRow<scalar_t, out_t>>();
  const auto step = forward_row<scalar_t, out_t>(args.reset);
  BlockParameters<acc_t> parameters(shape, args.threshold, args.leak, args.v_reset);
  alignas(64) acc_t v[kBlock];
  alignas(64) Mark marks[kPacked ? kBlock : 1] = {};
  bool nan = false;
  for_each_block(shape, first_chunk, last_chunk, [&](int64_t begin, int n, int64_t) {
    parameters.move_to(begin, n);
    if (!single) load_or_zero(v, args.v0, begin, n);
    if (kPacked && n < kBlock) std::fill_n(marks, kBlock, Mark{0});
    for (int64_t t = 0; t < shape.timesteps; ++t) {
      const scalar_t* x_t = x + t * shape.x_stride_t + begin;
      out_t* s_t;
      if constexpr (kPacked) {
        s_t = marks;
      } else {
        s_t = static_cast<scalar_t*>(args.s) + t * shape.neurons + begin;
      }
      if (single) {
        compare(x_t, &parameters, s_t, n);
      } else {
        step(x_t, &parameters, v, s_t, n);
      }
      if constexpr (kPacked) {
        uint8_t* bits = args.bits + t * packed_bytes(shape.neurons) + begin / 8;
        nan |= pack_row(marks, bits, (n + 63) / 64 * 64);
      }
    }
    if (args.v) std::copy_n(v, n, static_cast<acc_t*>(args.v) + begin);
  });
  return nan;
}

// Calls f with the surrogate as a type.
template <typename F>
auto with_surrogate(Surrogate surrogate, F f) {
  switch (surrogate) {
    case Surrogate::triangle:
      return f(std::integral_constant<Surrogate, Surrogate::triangle>());
    case Surrogate::atan:
      return f(std::integral_constant<Surrogate, Surrogate::atan>());
    case Surrogate::sigmoid:
      return f(std::integral_constant<Surrogate, Surrogate::sigmoid>());
    case Surrogate::fast_sigmoid:
      return f(std::integral_constant<Surrogate, Surrogate::fast_sigmoid>());
    default:
      return f(std::integral_constant<Surrogate, Surrogate::boxcar>());
  }
}

// The rows of backward, chosen once a call.
template <typename acc_t>
struct BackwardRows {
  decltype(version<AdvanceRow<acc_t, Reset::soft>>()) advance;
  decltype(version<BackwardRow<acc_t, Reset::soft, true, Surrogate::triangle>>()) step;
  decltype(version<DelayedV0Row<acc_t, Surrogate::triangle>>()) delayed_v0;
};
template <typename acc_t, Reset kReset, bool kDetach>
BackwardRows<acc_t> backward_rows(Surrogate surrogate) {
  return with_surrogate(surrogate, [](auto name) -> BackwardRows<acc_t> {
    constexpr Surrogate kSurrogate = decltype(name)::value;
    return {version<AdvanceRow<acc_t, kReset>>(), version<BackwardRow<acc_t, kReset, kDetach, kSurrogate>>(),
            version<DelayedV0Row<acc_t, kSurrogate>>()};
  });
}
template <typename acc_t>
BackwardRows<acc_t> backward_rows(Reset reset, bool detach, Surrogate surrogate) {
  switch (reset) {
    case Reset::soft:
      return detach ? backward_rows<acc_t, Reset::soft, true>(surrogate)
                    : backward_rows<acc_t, Reset::soft, false>(surrogate);
    case Reset::hard:
      return detach ? backward_rows<acc_t, Reset::hard, true>(surrogate)
                    : backward_rows<acc_t, Reset::hard, false>(surrogate);
    case Reset::none:
      return backward_rows<acc_t, Reset::none, true>(surrogate);
    default:
      return detach ? backward_rows<acc_t, Reset::soft_delayed, true>(surrogate)
                    : backward_rows<acc_t, Reset::soft_delayed, false>(surrogate);
  }
}

template <typename acc_t>
class PartialSums {
 public:
  explicit PartialSums(const LifBackward& args) : args_(args), sum_(version<SumRow<acc_t>>()) {}
  // Adds a block's rows to its chunk's sums; chunks come in order.
  void add(const acc_t* threshold, const acc_t* leak, int64_t begin, int n, int64_t chunk) {
    if (!args_.grad_threshold) return;
    const LifShape& shape = args_.shape;
    double* partial = static_cast<double*>(args_.workspace) + chunk * 2 * shape.channels;
    if (chunk != chunk_) std::fill_n(partial, 2 * shape.channels, 0.0);
    chunk_ = chunk;
    for_each_run(shape, begin, n, [&](int first, int length, int64_t channel) {
      sum_(threshold + first, length, partial + channel);
      if (leak) sum_(leak + first, length, partial + shape.channels + channel);
    });
  }

 private:
  const LifBackward& args_;
  decltype(version<SumRow<acc_t>>()) const sum_;
  int64_t chunk_ = -1;
};

template <typename scalar_t>
void backward_single(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  const auto step = with_surrogate(
      args.surrogate, [](auto name) { return version<SingleBackwardRow<scalar_t, decltype(name)::value>>(); });
  BlockParameters<acc_t> parameters(args.shape, args.threshold, args.leak, 0);
  PartialSums<acc_t> sums(args);
  alignas(64) acc_t grad_threshold[kBlock];
  for_each_block(args.shape, first_chunk, last_chunk, [&](int64_t begin, int n, int64_t chunk) {
    parameters.move_to(begin, n);
    step(static_cast<const scalar_t*>(args.grad_s) + begin, static_cast<const scalar_t*>(args.x) + begin, &parameters,
         acc_t(args.surrogate_scale), grad_threshold, static_cast<scalar_t*>(args.grad_x) + begin, n);
    sums.add(grad_threshold, nullptr, begin, n, chunk);
  });
}

template <typename scalar_t>
struct Scratch {
  using acc_t = typename Convert<scalar_t>::acc_t;
  alignas(64) acc_t v[kSegment][kBlock];  // the membranes the timesteps of a segment start from, but for the first
  alignas(64) acc_t zero[kBlock] = {};
  alignas(64) acc_t x[kBlock];
  alignas(64) acc_t grad_s[kBlock];
  alignas(64) acc_t grad_x[kBlock];
  Gradients<acc_t> grads;
};

template <typename scalar_t>
void backward(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  constexpr bool kConvert = !std::is_same_v<scalar_t, acc_t>;
  const LifShape& shape = args.shape;
  const int64_t steps = shape.timesteps, last_segment = (steps - 1) / kSegment;
  if (steps == 1 && !args.v0 && !args.grad_v) return backward_single<scalar_t>(args, first_chunk, last_chunk);

  const bool carries_reset = args.reset == Reset::soft_delayed && !args.detach_reset;
  const acc_t scale = acc_t(args.surrogate_scale);
  const BackwardRows<acc_t> rows = backward_rows<acc_t>(args.reset, args.detach_reset, args.surrogate);
  BlockParameters<acc_t> parameters(shape, args.threshold, args.leak, args.v_reset);
  PartialSums<acc_t> sums(args);
  const auto scratch = std::make_unique<Scratch<scalar_t>>();
  Gradients<acc_t>& grads = scratch->grads;
  std::vector<acc_t> checkpoints(last_segment * kBlock);

  const auto load = [](const scalar_t* from, acc_t* row, int n) -> const acc_t* {
    if constexpr (kConvert) {
      version<LoadRow<scalar_t>>()(from, row, n);
      return row;
    } else {
      return from;
    }
  };

  for_each_block(shape, first_chunk, last_chunk, [&](int64_t begin, int n, int64_t chunk) {
    const acc_t* v0 = args.v0 ? static_cast<const acc_t*>(args.v0) + begin : scratch->zero;
    const auto x_at = [&](int64_t t) {
      return load(static_cast<const scalar_t*>(args.x) + t * shape.x_stride_t + begin, scratch->x, n);
    };
    parameters.move_to(begin, n);
    load_or_zero(grads.v, args.grad_v, begin, n);
    if (carries_reset) std::fill_n(grads.reset, n, acc_t(0));
    std::fill_n(grads.threshold, n, acc_t(0));
    std::fill_n(grads.leak, n, acc_t(0));

    const acc_t* v = v0;
    for (int64_t t = 0; t < last_segment * kSegment; ++t) {
      acc_t* next = checkpoints.data() + t / kSegment * kBlock;
      rows.advance(x_at(t), &parameters, v, next, n);
      v = next;
    }
    for (int64_t segment = last_segment; segment >= 0; --segment) {
      const int64_t start = segment * kSegment, length = std::min(kSegment, steps - start);
      const acc_t* v_start = segment == 0 ? v0 : checkpoints.data() + (segment - 1) * kBlock;
      const auto v_at = [&](int64_t i) { return i == 0 ? v_start : scratch->v[i]; };
      for (int64_t i = 1; i < length; ++i) {
        rows.advance(x_at(start + i - 1), &parameters, v_at(i - 1), scratch->v[i], n);
      }
      for (int64_t i = length - 1; i >= 0; --i) {
        const int64_t t = start + i;
        const acc_t* grad_s =
            load(static_cast<const scalar_t*>(args.grad_s) + t * args.grad_s_stride_t + begin, scratch->grad_s, n);
        scalar_t* grad_x = static_cast<scalar_t*>(args.grad_x) + t * shape.neurons + begin;
        prefetch(static_cast<const scalar_t*>(args.x) + t * shape.x_stride_t + begin + n, n);
        prefetch(static_cast<const scalar_t*>(args.grad_s) + t * args.grad_s_stride_t + begin + n, n);
        prefetch(grad_x + n, n);
        if constexpr (kConvert) {
          rows.step(grad_s, x_at(t), v_at(i), &parameters, scale, &grads, scratch->grad_x, n);
          version<StoreRow<scalar_t>>()(scratch->grad_x, grad_x, n);
        } else {
          rows.step(grad_s, x_at(t), v_at(i), &parameters, scale, &grads, grad_x, n);
        }
      }
    }
    if (args.v0) {
      if (carries_reset) rows.delayed_v0(v0, &parameters, scale, &grads, n);
      std::copy_n(grads.v, n, static_cast<acc_t*>(args.grad_v0) + begin);
    }
    sums.add(grads.threshold, grads.leak, begin, n, chunk);
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

const char* cpu_capability() { return kCapabilityNames[capability()]; }

void set_cpu_capability(const char* name) { capability() = parse_capability(name); }

int64_t lif_chunks_cpu(const LifShape& shape) {
  const int64_t chunk = chunk_neurons(shape);
  return (shape.neurons + chunk - 1) / chunk;
}

int64_t lif_backward_workspace_cpu(const LifBackward& args) {
  return args.grad_threshold ? lif_chunks_cpu(args.shape) * 2 * args.shape.channels * int64_t(sizeof(double)) : 0;
}

bool lif_forward_cpu(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  return dispatch(args.shape.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    return args.bits ? forward<scalar_t, Mark>(args, first_chunk, last_chunk)
                     : forward<scalar_t, scalar_t>(args, first_chunk, last_chunk);
  });
}

void lif_backward_cpu(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  dispatch(args.shape.dtype, [&](auto scalar) { backward<decltype(scalar)>(args, first_chunk, last_chunk); });
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
