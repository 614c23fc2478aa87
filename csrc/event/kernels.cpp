#include "kernels.h"

#include <cstring>
#include <string>
#include <type_traits>

#include "../lif_cpu.h"
#include "../lif_step.h"

#if defined(__x86_64__)
#define IIRSNN_AVX2 __attribute__((target("avx2,bmi")))
#if defined(__clang__)
#define IIRSNN_AVX512 __attribute__((target("bmi,avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define IIRSNN_AVX512 __attribute__((target("bmi,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors pass between inlined functions only
#endif

namespace iirsnn::event {
namespace {

// 512 bits whatever the processor: the compiler splits them into what it has.
typedef float Floats __attribute__((vector_size(64), may_alias));
typedef float LooseFloats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef int16_t Shorts __attribute__((vector_size(64), may_alias));
typedef int16_t HalfShorts __attribute__((vector_size(32), may_alias));
typedef int8_t Bytes32 __attribute__((vector_size(32), may_alias));
typedef int8_t Bytes16 __attribute__((vector_size(16), may_alias));

template <typename Loop, typename Signature>
struct Versions;
template <typename Loop, typename... Args>
struct Versions<Loop, void(Args...)> {
  static void portable(Args... args) { Loop::run(args...); }
#if defined(__x86_64__)
  IIRSNN_AVX2 static void avx2(Args... args) { Loop::run(args...); }
  IIRSNN_AVX512 static void avx512(Args... args) { Loop::run(args...); }
#endif
  static void run(Args... args) {
#if defined(__x86_64__)
    static const bool bmi = __builtin_cpu_supports("bmi");
    const std::string level = cpu_capability();
    if (level == "avx512" && bmi) return avx512(args...);
    if (level == "avx2" && bmi) return avx2(args...);
#endif
    portable(args...);
  }
};
template <typename Loop, typename... Args>
void run(Args... args) {
  Versions<Loop, decltype(Loop::run)>::run(args...);
}

// ---- Sums of kWidth outputs in registers ----

struct Fp32 {
  using weight_t = float;
  using sum_t = float;
  static constexpr int kUnit = row_unit(Precision::fp32);

  template <int kWidth>
  struct Sum {
    Floats v[kWidth / 16];

    IIRSNN_INLINE void zero() {
      for (Floats& part : v) part = Floats{};
    }
    IIRSNN_INLINE void load(const float* sums) {
      const Floats* parts = reinterpret_cast<const Floats*>(sums);
      for (int i = 0; i < kWidth / 16; ++i) v[i] = parts[i];
    }
    IIRSNN_INLINE void add(const float* row) {
      const Floats* parts = reinterpret_cast<const Floats*>(row);
      for (int i = 0; i < kWidth / 16; ++i) v[i] += parts[i];
    }
    // += other * 2^digit, by doubling
    IIRSNN_INLINE void merge(Sum& other, int digit) {
      for (; digit > 0; --digit) {
        for (Floats& part : other.v) part += part;
      }
      for (int i = 0; i < kWidth / 16; ++i) v[i] += other.v[i];
    }
    IIRSNN_INLINE void store(float* sums) const {
      Floats* parts = reinterpret_cast<Floats*>(sums);
      for (int i = 0; i < kWidth / 16; ++i) parts[i] = v[i];
    }
  };
};

// Two outputs, 16 apart, share 32 bits: the low half is the first one's.
struct Bf16 {
  using weight_t = uint16_t;
  using sum_t = float;
  static constexpr int kUnit = row_unit(Precision::bf16);

  template <int kWidth>
  struct Sum : Fp32::Sum<kWidth> {
    using Fp32::Sum<kWidth>::v;

    IIRSNN_INLINE void add(const uint16_t* row) {
      const Words* pairs = reinterpret_cast<const Words*>(row);
      for (int i = 0; i < kWidth / 32; ++i) {
        v[2 * i] += (Floats)(pairs[i] << 16);  // the same bits
        v[2 * i + 1] += (Floats)(pairs[i] & 0xffff0000u);
      }
    }
  };
};

// The sums of one visit are 16 bits wide: a visit adds at most the 64 rows of a word (4 in a stream), |row| <= 127, and
// 64 * 127 = 8128 < 2^15. They end in 32 bits: 2^31 / 127 rows, counts included, which the layers' sizes are held to.
template <typename stored_t>  // int8_t or int16_t
struct Integer {
  using weight_t = stored_t;
  using sum_t = int32_t;
  static constexpr int kUnit = row_unit(Precision::int8);

  template <int kWidth>
  struct Sum {
    Shorts v[kWidth / 32];
    int32_t* sums;

    IIRSNN_INLINE void zero() {
      for (Shorts& part : v) part = Shorts{};
    }
    IIRSNN_INLINE void load(int32_t* to) {
      zero();
      sums = to;
    }
    IIRSNN_INLINE void add(const int8_t* row) {
      const Bytes32* parts = reinterpret_cast<const Bytes32*>(row);
      for (int i = 0; i < kWidth / 32; ++i) v[i] += __builtin_convertvector(parts[i], Shorts);
    }
    IIRSNN_INLINE void add(const int16_t* row) {
      const Shorts* parts = reinterpret_cast<const Shorts*>(row);
      for (int i = 0; i < kWidth / 32; ++i) v[i] += parts[i];
    }
    IIRSNN_INLINE void merge(const Sum& other, int digit) { other.widen(sums, digit); }
    IIRSNN_INLINE void store(int32_t* to) const { widen(to, 0); }
    IIRSNN_INLINE void widen(int32_t* to, int digit) const {
      Ints* parts = reinterpret_cast<Ints*>(to);
      for (int i = 0; i < kWidth / 32; ++i) {
        HalfShorts halves[2];
        std::memcpy(halves, &v[i], sizeof(halves));
        for (int k = 0; k < 2; ++k) parts[2 * i + k] += __builtin_convertvector(halves[k], Ints) << digit;
      }
    }
  };
};

// ---- Events ----

// Rows of a visit begin at `rows`, whose first is that of channel 0 of the word.
template <typename Weights, int kWidth>
struct TileVisit {
  using weight_t = typename Weights::weight_t;
  using sum_t = typename Weights::sum_t;
  using Sum = typename Weights::template Sum<kWidth>;
  static constexpr bool kPrefetches = true;
  int64_t pitch;
  IIRSNN_INLINE TileVisit(const Additions& work) : pitch(work.pitch) {}

  IIRSNN_INLINE void add(Sum& sum, uint64_t bits, const weight_t* rows) const {
    for (; bits; bits &= bits - 1) sum.add(rows + int64_t(__builtin_ctzll(bits)) * pitch);
  }
  IIRSNN_INLINE void prefetch(const weight_t* row) const {
    for (int i = 0; i < kWidth; i += 64 / int(sizeof(weight_t))) __builtin_prefetch(row + i, 0, 2);
  }
  IIRSNN_INLINE void plain(uint64_t bits, const weight_t* rows, sum_t* sums) const {
    Sum sum;
    sum.load(sums);
    add(sum, bits, rows);
    sum.store(sums);
  }
  // bits[0] counts once, bits[plane] twice, bits[2 * plane] four times, ...
  IIRSNN_INLINE void pooled(const uint64_t* bits, int64_t plane, int planes, uint64_t mask, const weight_t* rows,
                            sum_t* sums, Work& done) const {
    Sum sum;
    sum.load(sums);
    add(sum, bits[0] & mask, rows);
    for (int digit = 1; digit < planes; ++digit) {
      const uint64_t set = bits[digit * plane] & mask;
      if (!set) continue;
      done.events += __builtin_popcountll(set);
      done.merges += digit + 1;
      Sum high;
      high.zero();
      add(high, set, rows);
      sum.merge(high, digit);
    }
    sum.store(sums);
  }
};

template <typename Weights>
struct StreamVisit {
  using weight_t = typename Weights::weight_t;
  using sum_t = typename Weights::sum_t;
  using Sum = typename Weights::template Sum<Weights::kUnit>;
  static constexpr bool kPrefetches = false;
  static constexpr int kRows = 4;
  int64_t pitch;
  int width;
  IIRSNN_INLINE StreamVisit(const Additions& work) : pitch(work.pitch), width(work.width) {}

  IIRSNN_INLINE void prefetch(const weight_t*) const {}
  template <int kCount>
  IIRSNN_INLINE void add(const weight_t* const* rows, int digit, sum_t* sums) const {
    for (int i = 0; i < width; i += Weights::kUnit) {
      Sum sum;
      sum.load(sums + i);
      if (digit == 0) {
        for (int k = 0; k < kCount; ++k) sum.add(rows[k] + i);
      } else {
        Sum high;
        high.zero();
        for (int k = 0; k < kCount; ++k) high.add(rows[k] + i);
        sum.merge(high, digit);
      }
      if constexpr (std::is_same_v<sum_t, float>) {
        sum.store(sums + i);
      } else if (digit == 0) {
        sum.store(sums + i);  // of a higher digit, merge has written the sums
      }
    }
  }
  IIRSNN_INLINE int64_t digit(uint64_t bits, int digit, const weight_t* rows, sum_t* sums) const {
    int64_t passes = 0;
    while (bits) {
      const weight_t* chosen[kRows];
      int count = 0;
      for (; bits && count < kRows; bits &= bits - 1) chosen[count++] = rows + __builtin_ctzll(bits) * pitch;
      ++passes;
      if (count == 4) {
        add<4>(chosen, digit, sums);
      } else if (count == 3) {
        add<3>(chosen, digit, sums);
      } else if (count == 2) {
        add<2>(chosen, digit, sums);
      } else {
        add<1>(chosen, digit, sums);
      }
    }
    return passes;
  }
  IIRSNN_INLINE void plain(uint64_t bits, const weight_t* rows, sum_t* sums) const { digit(bits, 0, rows, sums); }
  IIRSNN_INLINE void pooled(const uint64_t* bits, int64_t plane, int planes, uint64_t mask, const weight_t* rows,
                            sum_t* sums, Work& done) const {
    digit(bits[0] & mask, 0, rows, sums);
    for (int d = 1; d < planes; ++d) {
      const uint64_t set = bits[d * plane] & mask;
      done.events += __builtin_popcountll(set);
      done.merges += (d + 1) * digit(set, d, rows, sums);
    }
  }
};

// A block, one word of one tap, is small enough to stay in the L1 cache while all positions of the strip visit it.
// The visits share out the rows of the next block among them and ask for them early: memory cannot guess the order in
// which events read rows. With few visits most rows would be fetched in vain.
constexpr int64_t kVisitsToPrefetch = 8;

template <typename Weights, typename Visit, bool kPlain>
struct AddLoop {
  static IIRSNN_INLINE void run(const Additions* work_, Work* done_) {
    const Additions work = *work_;
    Work done;
    const Visit visit(work);
    using weight_t = typename Weights::weight_t;
    using sum_t = typename Weights::sum_t;
    const weight_t* rows = static_cast<const weight_t*>(work.weights);
    int left = work.channels;
    for (int word = 0; word < work.words; ++word) {
      const uint64_t mask =
          (word == 0 ? work.first_mask : ~uint64_t(0)) & (word == work.words - 1 ? work.last_mask : ~uint64_t(0));
      const int skipped = !kPlain && word == 0 ? __builtin_ctzll(work.first_mask) : 0;
      const int here = left < kWord - skipped ? left : kWord - skipped;
      left -= here;
      const uint64_t* bits = work.bits + work.first_word + word;
      for (int t = 0; t < work.tap_count; ++t, rows += here * work.pitch) {
        const Tap tap = work.taps[t];
        const weight_t* from = rows - skipped * work.pitch;
        const int64_t visits = work.images * tap.rows * tap.columns;
        const weight_t *next = rows + here * work.pitch, *end = next;
        if (Visit::kPrefetches && visits >= kVisitsToPrefetch) end += here * work.pitch;
        const int64_t share = (here + visits - 1) / (visits > 0 ? visits : 1);
        for (int64_t image = 0; image < work.images; ++image) {
          for (int y = 0; y < tap.rows; ++y) {
            const uint64_t* in = bits + tap.in + image * work.image_in + y * work.row_in;
            sum_t* sums = static_cast<sum_t*>(work.sums) +
                          (tap.out + image * work.image_out + y * work.row_out) * int64_t(work.width);
            for (int x = tap.columns; x > 0; --x, in += work.column_in, sums += work.width) {
              if (next < end) {
                for (int64_t row = share; row > 0; --row, next += work.pitch) visit.prefetch(next);
              }
              if constexpr (kPlain) {
                done.events += __builtin_popcountll(*in);
                visit.plain(*in, from, sums);
              } else {
                done.events += __builtin_popcountll(*in & mask);
                visit.pooled(in, work.plane, work.planes, mask, from, sums, done);
              }
            }
          }
        }
      }
    }
    done_->events += done.events;
    done_->merges += done.merges;
  }
};

template <typename Weights, typename Visit>
void add_events(const Additions& work, Work& done) {
  if (work.whole && work.planes == 1) {
    run<AddLoop<Weights, Visit, true>>(&work, &done);
  } else {
    run<AddLoop<Weights, Visit, false>>(&work, &done);
  }
}

// ---- The first layer ----

template <int kWidth>
struct ProductLoop {
  static IIRSNN_INLINE void run(const Products* work_) {
    const Products work = *work_;
    for (int part = 0; part < work.width; part += kWidth) {
      for (int t = 0; t < work.tap_count; ++t) {
        const Tap tap = work.taps[t];
        for (int64_t image = 0; image < work.images; ++image) {
          for (int y = 0; y < tap.rows; ++y) {
            const float* in = work.image + tap.in + image * work.image_in + y * work.row_in;
            float* sums =
                work.sums + (tap.out + image * work.image_out + y * work.row_out) * int64_t(work.width) + part;
            for (int x = 0; x < tap.columns; ++x, in += work.column_in, sums += work.width) {
              Fp32::Sum<kWidth> sum;
              sum.load(sums);
              const float* row = work.weights + int64_t(t) * work.channels * work.pitch + part;
              for (int c = 0; c < work.channels; ++c, row += work.pitch) {
                const float value = in[(work.first_channel + c) * work.channel_in];
                const Floats* parts = reinterpret_cast<const Floats*>(row);
                for (int i = 0; i < kWidth / 16; ++i) sum.v[i] += parts[i] * value;
              }
              sum.store(sums);
            }
          }
        }
      }
    }
  }
};

// ---- Neurons ----

IIRSNN_INLINE uint64_t spikes16(Ints above) {  // lanes of 0 or -1
  const Bytes16 bytes = __builtin_convertvector(above, Bytes16);
  uint64_t halves[2];
  std::memcpy(halves, &bytes, sizeof(halves));
  uint64_t bits = 0;
  for (int i = 0; i < 2; ++i) {  // byte k keeps its bit k; the product adds all bytes up in the highest one
    bits |= (((halves[i] & 0x8040201008040201u) * 0x0101010101010101u) >> 56) << (8 * i);
  }
  return bits;
}

template <bool kInteger>
IIRSNN_INLINE Floats current16(const Neurons& work, const char* sums, int output, uint64_t skip) {
  Floats h;
  if constexpr (kInteger) {
    h = __builtin_convertvector(*reinterpret_cast<const Ints*>(sums), Floats);
    h = h * *reinterpret_cast<const LooseFloats*>(work.scale + output) +
        *reinterpret_cast<const LooseFloats*>(work.bias + output);
  } else {
    h = *reinterpret_cast<const Floats*>(sums);
  }
  if (work.skip) {
    constexpr Ints kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    h += __builtin_convertvector((int32_t(skip & 0xffff) >> kLane) & 1, Floats);
  }
  return h;
}

template <bool kInteger>
struct FireOnce {
  static IIRSNN_INLINE void run(const Neurons* work_, int64_t* spikes) {
    const Neurons work = *work_;
    int64_t count = 0;
    const char* sums = static_cast<const char*>(work.sums);
    for (int64_t image = 0; image < work.images; ++image) {
      for (int64_t p = 0; p < work.positions; ++p, sums += work.width * 4) {
        const int64_t at = image * work.image_words + p * work.words;
        for (int word = 0; word * kWord < work.outputs; ++word) {
          const uint64_t skip = work.skip ? work.skip[at + word] : 0;
          const int outputs = work.outputs - word * kWord < kWord ? work.outputs - word * kWord : kWord;
          uint64_t bits = 0;
          for (int i = 0; i < outputs; i += 16) {
            const int output = word * kWord + i;
            const Floats h = current16<kInteger>(work, sums + output * 4, output, skip >> i);
            bits |= spikes16(h > *reinterpret_cast<const LooseFloats*>(work.threshold + output)) << i;
          }
          if (outputs < kWord) bits &= (uint64_t(1) << outputs) - 1;
          work.spikes[at + word] = bits;
          count += __builtin_popcountll(bits);
        }
      }
    }
    *spikes += count;
  }
};

template <bool kInteger, Reset kReset>
struct FireOverTime {
  static IIRSNN_INLINE void run(const Neurons* work_, int64_t* spikes) {
    const Neurons work = *work_;
    int64_t count = 0;
    const int64_t step = work.positions * work.width * 4;
    for (int64_t image = 0; image < work.images; ++image) {
      const char* first = static_cast<const char*>(work.sums) + image * (work.constant ? 1 : work.timesteps) * step;
      for (int64_t p = 0; p < work.positions; ++p) {
        for (int output = 0; output < work.outputs; output += 16) {
          const int lanes = work.outputs - output < 16 ? work.outputs - output : 16, shift = output % kWord;
          alignas(64) float v[16] = {};
          for (int64_t t = 0; t < work.timesteps; ++t) {
            const int64_t at = (image * work.timesteps + t) * work.image_words + p * work.words + output / kWord;
            const char* sums = first + (work.constant ? 0 : t) * step + (p * work.width + output) * 4;
            alignas(64) float h[16];
            const Floats x = current16<kInteger>(work, sums, output, work.skip ? work.skip[at] >> shift : 0);
            std::memcpy(h, &x, sizeof(h));
            uint64_t bits = 0;
            for (int i = 0; i < lanes; ++i) {
              const Neuron<float> neuron{work.threshold[output + i], 0.0f, work.leak[output + i], work.v_reset};
              if (t > 0) h[i] = charge<kReset>(h[i], v[i], neuron);
              v[i] = discharge<kReset>(h[i], neuron);
              bits |= uint64_t(h[i] > neuron.threshold) << i;
            }
            work.spikes[at] = (shift ? work.spikes[at] : 0) | bits << shift;
            count += __builtin_popcountll(bits);
          }
        }
      }
    }
    *spikes += count;
  }
};

template <bool kInteger>
void fire_as(const Neurons& work, int64_t& spikes) {
  if (work.timesteps == 1) return run<FireOnce<kInteger>>(&work, &spikes);
  switch (work.reset) {
    case Fires::soft:
      return run<FireOverTime<kInteger, Reset::soft>>(&work, &spikes);
    case Fires::hard:
      return run<FireOverTime<kInteger, Reset::hard>>(&work, &spikes);
    case Fires::none:
      return run<FireOverTime<kInteger, Reset::none>>(&work, &spikes);
    case Fires::soft_delayed:
      return run<FireOverTime<kInteger, Reset::soft_delayed>>(&work, &spikes);
  }
}

}  // namespace

namespace {

template <typename Weights>
void add_integer_tile(const Additions& work, Work& done) {
  switch (work.width) {
    case 32:
      return add_events<Weights, TileVisit<Weights, 32>>(work, done);
    case 64:
      return add_events<Weights, TileVisit<Weights, 64>>(work, done);
    case 96:
      return add_events<Weights, TileVisit<Weights, 96>>(work, done);
    default:
      return add_events<Weights, TileVisit<Weights, 128>>(work, done);
  }
}

}  // namespace

void add_tile(Precision precision, const Additions& work, Work& done) {
  switch (precision) {
    case Precision::fp32:
      switch (work.width) {
        case 16:
          return add_events<Fp32, TileVisit<Fp32, 16>>(work, done);
        case 32:
          return add_events<Fp32, TileVisit<Fp32, 32>>(work, done);
        case 48:
          return add_events<Fp32, TileVisit<Fp32, 48>>(work, done);
        default:
          return add_events<Fp32, TileVisit<Fp32, 64>>(work, done);
      }
    case Precision::bf16:
      return work.width == 32 ? add_events<Bf16, TileVisit<Bf16, 32>>(work, done)
                              : add_events<Bf16, TileVisit<Bf16, 64>>(work, done);
    case Precision::int8:
      return add_integer_tile<Integer<int8_t>>(work, done);
    case Precision::int16:
      return add_integer_tile<Integer<int16_t>>(work, done);
  }
}

void add_stream(Precision precision, const Additions& work, Work& done) {
  switch (precision) {
    case Precision::fp32:
      return add_events<Fp32, StreamVisit<Fp32>>(work, done);
    case Precision::bf16:
      return add_events<Bf16, StreamVisit<Bf16>>(work, done);
    case Precision::int8:
      return add_events<Integer<int8_t>, StreamVisit<Integer<int8_t>>>(work, done);
    case Precision::int16:
      return add_events<Integer<int16_t>, StreamVisit<Integer<int16_t>>>(work, done);
  }
}

void add_products(const Products& work) {
  if (work.width % 64 == 0) return run<ProductLoop<64>>(&work);
  if (work.width % 32 == 0) return run<ProductLoop<32>>(&work);
  run<ProductLoop<16>>(&work);
}

int64_t fire(const Neurons& work) {
  int64_t spikes = 0;
  if (work.integer) {
    fire_as<true>(work, spikes);
  } else {
    fire_as<false>(work, spikes);
  }
  return spikes;
}

void read_out(const Logits& work) {
  for (int64_t image = 0; image < work.images; ++image) {
    for (int output = 0; output < work.outputs; ++output) {
      float total = 0.0f;
      for (int64_t t = 0; t < work.timesteps; ++t) {
        const int64_t row = work.constant ? image : image * work.timesteps + t;
        const int64_t at = row * work.width + output;
        total += work.integer
                     ? float(static_cast<const int32_t*>(work.sums)[at]) * work.scale[output] + work.bias[output]
                     : static_cast<const float*>(work.sums)[at];
      }
      work.logits[image * work.stride + output] = total;
    }
  }
}

}  // namespace iirsnn::event
