#include "event/kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lif/lif_step.h"
#include "simd/versions.h"

namespace iirsnn::event {
namespace {

// ---- Sums of kWidth outputs in registers ----

struct Fp32 {
  using weight_t = float;
  using sum_t = float;
  using Wide = Fp32;  // what rows become once where many visits read them
  static constexpr int kUnit = row_unit(Precision::fp32);

  template <int kWidth, int kBytes>
  struct Sum {
    using Floats = Register<float, kBytes>;
    static constexpr int kLanes = kBytes / 4, kRegisters = kWidth / kLanes;
    Floats v[kRegisters];

    IIRSNN_INLINE void load(const float* sums) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Floats>(sums + i * kLanes);
    }
    // += row * 2^digit, by doubling
    IIRSNN_INLINE void add(const float* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) add(i, load_register<Floats>(row + i * kLanes), digit);
    }
    IIRSNN_INLINE void add(int i, Floats part, int digit) {
      for (; digit > 0; --digit) part += part;
      v[i] += part;
    }
    IIRSNN_INLINE void store(float* sums) const {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) store_register(sums + i * kLanes, v[i]);
    }
  };
};

// Two outputs, 16 apart, share 32 bits: the low half is the first one's.
struct Bf16 {
  using weight_t = uint16_t;
  using sum_t = float;
  using Wide = Fp32;
  static constexpr int kUnit = row_unit(Precision::bf16);

  template <int kWidth, int kBytes>
  struct Sum : Fp32::Sum<kWidth, kBytes> {
    using Base = Fp32::Sum<kWidth, kBytes>;
    using typename Base::Floats;
    using Words = Register<uint32_t, kBytes>;
    static constexpr int kOf16 = 64 / kBytes;  // registers of 16 outputs

    IIRSNN_INLINE void add(const uint16_t* row, int digit) {
      each(row, [&](int i, const Floats& part) IIRSNN_INLINE_LAMBDA { Base::add(i, part, digit); });
    }
    static IIRSNN_INLINE void widen(const uint16_t* row, float* wide) {
      each(row, [&](int i, const Floats& part) IIRSNN_INLINE_LAMBDA { store_register(wide + i * Base::kLanes, part); });
    }

   private:
    template <typename F>
    static IIRSNN_INLINE void each(const uint16_t* row, F f) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kWidth / 32; ++i) {
        IIRSNN_REGISTERS
        for (int j = 0; j < kOf16; ++j) {
          const Words pairs = load_register<Words>(row + i * 32 + j * (kBytes / 2));
          f(2 * i * kOf16 + j, (Floats)(pairs << 16));  // the same bits
          f((2 * i + 1) * kOf16 + j, (Floats)(pairs & 0xffff0000u));
        }
      }
    }
  };
};

// 16-bit sums: Carry says where they have to be carried over to 32 bits, from bounds that the engine proves.
template <typename stored_t>  // int8_t or int16_t
struct Integer {
  using weight_t = stored_t;
  using sum_t = int16_t;
  using Wide = Integer<int16_t>;
  static constexpr int kUnit = row_unit(Precision::int8);

  template <int kWidth, int kBytes>
  struct Sum {
    using Shorts = Register<int16_t, kBytes>;
    using Bytes = Register<int8_t, kBytes / 2>;
    static constexpr int kLanes = kBytes / 2, kRegisters = kWidth / kLanes;
    Shorts v[kRegisters];

    IIRSNN_INLINE void load(const int16_t* sums) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Shorts>(sums + i * kLanes);
    }
    IIRSNN_INLINE void add(const int8_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) {
        v[i] += widened<Shorts>(load_register<Bytes>(row + i * kLanes)) << digit;
      }
    }
    IIRSNN_INLINE void add(const int16_t* row, int digit) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) v[i] += load_register<Shorts>(row + i * kLanes) << digit;
    }
    static IIRSNN_INLINE void widen(const int8_t* row, int16_t* wide) {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) {
        store_register(wide + i * kLanes, widened<Shorts>(load_register<Bytes>(row + i * kLanes)));
      }
    }
    IIRSNN_INLINE void store(int16_t* sums) const {
      IIRSNN_REGISTERS
      for (int i = 0; i < kRegisters; ++i) store_register(sums + i * kLanes, v[i]);
    }
  };
};

// totals += sums * 2^digit; sums = 0
template <int kBytes>
IIRSNN_INLINE void carry_over(const Additions& work, int digit) {
  using Half = Register<int16_t, kBytes / 2>;
  using Ints = Register<int32_t, kBytes>;
  constexpr int kLanes = kBytes / 4;
  int16_t* sums = static_cast<int16_t*>(work.sums);
  int32_t* totals = work.totals;
  const int64_t count = work.positions * work.width;  // a multiple of 32
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    IIRSNN_REGISTERS
    for (int k = 0; k < 2; ++k) {
      const int64_t at = i + k * kLanes;
      const Ints part = widened<Ints>(load_register<Half>(sums + at));
      store_register(totals + at, load_register<Ints>(totals + at) + (part << digit));
    }
    store_register(sums + i, Register<int16_t, kBytes>{});
  }
}

// ---- Events ----

// The channels of a word that take part: the lowest is bit 0 of what `of` gives, as its row is the first of the
// block's.
struct Channels {
  int first;
  uint64_t mask;
  IIRSNN_INLINE uint64_t of(uint64_t word) const { return word >> first & mask; }
};

template <typename Weights, int kWidth, int kBytes>
struct TileVisit {
  using weight_t = typename Weights::weight_t;
  using sum_t = typename Weights::sum_t;
  using Sum = typename Weights::template Sum<kWidth, kBytes>;
  int64_t pitch;
  IIRSNN_INLINE TileVisit(int64_t pitch) : pitch(pitch) {}

  IIRSNN_INLINE void add(Sum& sum, uint64_t bits, const weight_t* rows, int digit = 0) const {
    for (; bits; bits &= bits - 1) sum.add(rows + int64_t(__builtin_ctzll(bits)) * pitch, digit);
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
  IIRSNN_INLINE void pooled(const uint64_t* bits, int64_t plane, int planes, const Channels& channels,
                            const weight_t* rows, sum_t* sums, Work& done) const {
    Sum sum;
    sum.load(sums);
    add(sum, channels.of(bits[0]), rows);
    for (int digit = 1; digit < planes; ++digit) {
      const uint64_t set = channels.of(bits[digit * plane]);
      done.count(set, digit);
      if (digit == 1) {
        add(sum, set, rows, 1);  // most of them: without a loop
      } else {
        add(sum, set, rows, digit);
      }
    }
    sum.store(sums);
  }
};

// The blocks of one call, a word of a tap each, in the order of their weights: `here` rows, `ahead` in the next block.
// `complete`: whether the sums have to be complete after the block.
template <typename Weights, typename Visit>
IIRSNN_INLINE void each_block(const Additions& work, const Visit& visit) {
  const typename Weights::weight_t* rows = static_cast<const typename Weights::weight_t*>(work.weights);
  int left = work.channels;
  for (int word = 0; word < work.words; ++word) {
    const uint64_t mask =
        (word == 0 ? work.first_mask : ~uint64_t(0)) & (word == work.words - 1 ? work.last_mask : ~uint64_t(0));
    const int skipped = word == 0 ? __builtin_ctzll(work.first_mask) : 0;
    const Channels channels{skipped, mask >> skipped};
    const int here = left < kWord - skipped ? left : kWord - skipped;
    left -= here;
    for (int t = 0; t < work.tap_count; ++t, rows += here * work.pitch) {
      const int ahead = t + 1 < work.tap_count ? here : left < kWord ? left : kWord;
      const int block = word * work.tap_count + t;
      const auto carry = [&](int of) { return work.carries ? Carry(work.carries[of]) : Carry::none; };
      const bool last = block + 1 == work.words * work.tap_count;
      visit(work.taps[t], work.bits + work.first_word + word, channels, rows, here, ahead, carry(block),
            last || carry(block + 1) != Carry::none);
    }
  }
}

// The positions of one tap, with the bits that they read and their sums.
template <typename sum_t, typename Visit>
IIRSNN_INLINE void each_position(const Additions& work, const Tap& tap, const uint64_t* bits, const Visit& visit) {
  for (int64_t image = 0; image < work.images; ++image) {
    for (int y = 0; y < tap.rows; ++y) {
      const uint64_t* in = bits + tap.in + image * work.image_in + y * work.row_in;
      sum_t* sums =
          static_cast<sum_t*>(work.sums) + (tap.out + image * work.image_out + y * work.row_out) * int64_t(work.width);
      for (int x = tap.columns; x > 0; --x, in += work.column_in, sums += work.width) visit(in, sums);
    }
  }
}

// A block is small enough to stay in the L1 cache while all positions of the strip visit it. The visits share out the
// rows of the next block among them and ask for them early: memory cannot guess the order in which events read rows.
// With few visits most rows would be fetched in vain.
constexpr int64_t kVisitsToPrefetch = 8;
// From so many visits on, narrow rows are widened once for all of them.
constexpr int64_t kVisitsToWiden = 24;

// Outputs whose sums fit the registers.
template <typename sum_t, int kWidth, int kBytes>
constexpr int part_width() {
#if defined(__x86_64__)
  if (kBytes == 16 && kWidth * int(sizeof(sum_t)) > 12 * kBytes) return kWidth / 2;
#endif
  return kWidth;
}

template <typename Weights, int kWidth, bool kPlain>
struct TileLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Additions* work_, Work* done_) {
    const Additions work = *work_;
    Work done;
    using weight_t = typename Weights::weight_t;
    using sum_t = typename Weights::sum_t;
    constexpr int kPart = part_width<sum_t, kWidth, kBytes>();
    const TileVisit<Weights, kPart, kBytes> stored(work.pitch);
    Work again;  // of the second part
    constexpr bool kIntegers = std::is_same_v<sum_t, int16_t>;
    using Wide = typename Weights::Wide;
    constexpr bool kNarrow = !std::is_same_v<Weights, Wide>;
    alignas(64) typename Wide::weight_t wide[kNarrow ? kWord * kWidth : 1];
    each_block<Weights>(work, [&](const Tap& tap, const uint64_t* bits, const Channels& channels, const weight_t* rows,
                                  int here, int ahead, Carry carry, bool) IIRSNN_INLINE_LAMBDA {
      if (kIntegers && carry != Carry::none) carry_over<kBytes>(work, 0);
      if constexpr (kIntegers && !kPlain) {
        if (carry == Carry::by_digit) {
          for (int digit = 0; digit < work.planes; ++digit) {
            each_position<sum_t>(work, tap, bits + digit * work.plane,
                                 [&](const uint64_t* in, sum_t* sums) IIRSNN_INLINE_LAMBDA {
                                   const uint64_t set = channels.of(*in);
                                   done.count(set, digit);
                                   for (int part = 0; part < kWidth; part += kPart) {
                                     stored.plain(set, rows + part, sums + part);
                                   }
                                 });
            carry_over<kBytes>(work, digit);
          }
          return;
        }
      }
      const int64_t visits = work.images * tap.rows * tap.columns;
      const weight_t* const next = rows + here * work.pitch;
      const int64_t share = (ahead + visits - 1) / (visits > 0 ? visits : 1);
      const int64_t wanted = visits >= kVisitsToPrefetch ? ahead : 0;
      int64_t asked = 0;
      const auto all = [&](const auto& visit, const auto* rows) IIRSNN_INLINE_LAMBDA {
        for (int part = 0; part < kWidth; part += kPart) {
          Work& count = part ? again : done;
          each_position<sum_t>(work, tap, bits, [&](const uint64_t* in, sum_t* sums) IIRSNN_INLINE_LAMBDA {
            for (const int64_t last = std::min(asked + share, wanted); asked < last; ++asked) {
              for (int p = 0; p < kWidth; p += kPart) stored.prefetch(next + asked * work.pitch + p);
            }
            if constexpr (kPlain) {
              count.count(*in, 0);
              visit.plain(*in, rows + part, sums + part);
            } else {
              count.count(channels.of(*in), 0);
              visit.pooled(in, work.plane, work.planes, channels, rows + part, sums + part, count);
            }
          });
        }
      };
      if constexpr (kNarrow) {
        if (visits >= kVisitsToWiden) {
          for (int c = 0; c < here; ++c) {
            for (int part = 0; part < kWidth; part += kPart) {
              decltype(stored)::Sum::widen(rows + c * work.pitch + part, wide + c * kWidth + part);
            }
          }
          return all(TileVisit<Wide, kPart, kBytes>(kWidth), static_cast<const typename Wide::weight_t*>(wide));
        }
      }
      all(stored, rows);
    });
    if (kIntegers) carry_over<kBytes>(work, 0);
    done_->events += done.events;
    done_->doublings += done.doublings;
  }
};

// Rows are long and each is met a few times at most, so they come from memory: four at a time, which are known so early
// that the next ones can be asked for.
template <typename Weights>
struct StreamLoop {
  using weight_t = typename Weights::weight_t;
  using sum_t = typename Weights::sum_t;
  template <int kBytes>
  using Sum = typename Weights::template Sum<Weights::kUnit, kBytes>;
  static constexpr int kRows = 4;
  static constexpr int kAhead = 8192 / int(sizeof(weight_t));  // outputs of each row
  static constexpr bool kIntegers = std::is_same_v<sum_t, int16_t>;

  struct Group {
    const weight_t* rows[kRows];  // beyond count, the first one again
    sum_t* sums;
    int count, digit;
    IIRSNN_INLINE bool takes(const sum_t* to, int of) const { return count < kRows && sums == to && digit == of; }
  };

  template <int kBytes, int kCount, bool kPlain>
  static IIRSNN_INLINE void add_part(const Group& group, int from, int to, const Group& next, int shift) {
    const weight_t *rows[kCount], *ahead[kRows];  // in registers: stores to the sums could change the group's
    for (int k = 0; k < kCount; ++k) rows[k] = group.rows[k];
    for (int k = 0; k < kRows; ++k) ahead[k] = next.rows[k] + shift;
    sum_t* const sums = group.sums;
    const int digit = group.digit;
    for (int i = from; i < to; i += Weights::kUnit) {
      if (sizeof(weight_t) > 1 || i % 64 == 0) {  // once a cache line
        for (int k = 0; k < kRows; ++k) __builtin_prefetch(ahead[k] + i, 0, 2);
      }
      Sum<kBytes> sum;
      sum.load(sums + i);
      IIRSNN_REGISTERS
      for (int k = 0; k < kCount; ++k) sum.add(rows[k] + i, kPlain ? 0 : digit);
      sum.store(sums + i);
    }
  }
  // Adds a group and asks for `soon` at the distance `shift`, then for `later`.
  template <int kBytes, int kCount>
  static IIRSNN_INLINE void add(const Group& group, const Group& soon, const Group& later, int shift, int width) {
    if (group.digit == 0) {
      add_part<kBytes, kCount, true>(group, 0, width - shift, soon, shift);
      add_part<kBytes, kCount, true>(group, width - shift, width, later, shift - width);
    } else {
      add_part<kBytes, kCount, false>(group, 0, width - shift, soon, shift);
      add_part<kBytes, kCount, false>(group, width - shift, width, later, shift - width);
    }
  }

  template <int kBytes>
  static IIRSNN_INLINE void run(const Additions* work_, Work* done_) {
    const Additions work = *work_;
    Work done;
    std::vector<Group> groups;  // to be added; known so early that their rows can be asked for
    const int width = work.width, groups_ahead = kAhead / width;
    // rows that count 2^digit times, of which the sums take 2^shift
    const auto collect = [&](uint64_t bits, int digit, int shift, const weight_t* rows, sum_t* sums)
                             IIRSNN_INLINE_LAMBDA {
                               done.count(bits, digit);
                               while (bits) {
                                 if (groups.empty() || !groups.back().takes(sums, shift)) {
                                   const weight_t* first = rows + __builtin_ctzll(bits) * work.pitch;
                                   groups.push_back({{first, first, first, first}, sums, 0, shift});
                                 }
                                 Group& group = groups.back();
                                 for (; bits && group.count < kRows; bits &= bits - 1) {
                                   group.rows[group.count++] = rows + __builtin_ctzll(bits) * work.pitch;
                                 }
                               }
                             };
    each_block<Weights>(work, [&](const Tap& tap, const uint64_t* bits, const Channels& channels, const weight_t* rows,
                                  int here, int ahead, Carry carry, bool complete) IIRSNN_INLINE_LAMBDA {
      if (kIntegers && carry != Carry::none) carry_over<kBytes>(work, 0);
      const bool by_digit = kIntegers && carry == Carry::by_digit;
      // of many positions one or another needs almost every row of the next block, so they share out all of them
      const bool share = ahead > 0 && work.images * tap.rows * tap.columns >= kVisitsToPrefetch;
      const weight_t* const next = rows + here * work.pitch;
      for (int digit = 0; digit < (by_digit ? work.planes : 1); ++digit) {
        each_position<sum_t>(work, tap, bits, [&](const uint64_t* in, sum_t* sums) IIRSNN_INLINE_LAMBDA {
          if (by_digit) return collect(channels.of(in[digit * work.plane]), digit, 0, rows, sums);
          for (int d = 0; d < work.planes; ++d) collect(channels.of(in[d * work.plane]), d, d, rows, sums);
        });
        const int64_t count = groups.size(), kept = complete || by_digit || share ? 0 : groups_ahead + 2;
        for (int64_t i = 0; i < count - kept; ++i) {
          Group block = groups[i];
          const Group *soon = &block, *later = soon;
          int shift = 0;
          if (share) {
            for (int64_t k = 0; k < kRows; ++k) {
              const int64_t last = std::min<int64_t>((i + 1) * ahead / count, ahead - 1);
              block.rows[k] = next + std::min(i * ahead / count + k, last) * work.pitch;
            }
          } else {
            soon = &groups[std::min(i + groups_ahead, count - 1)];
            later = &groups[std::min(i + groups_ahead + 1, count - 1)];
            shift = kAhead % width;
          }
          switch (groups[i].count) {
            case 4:
              add<kBytes, 4>(groups[i], *soon, *later, shift, width);
              break;
            case 3:
              add<kBytes, 3>(groups[i], *soon, *later, shift, width);
              break;
            case 2:
              add<kBytes, 2>(groups[i], *soon, *later, shift, width);
              break;
            default:
              add<kBytes, 1>(groups[i], *soon, *later, shift, width);
          }
        }
        groups.erase(groups.begin(), groups.begin() + std::max<int64_t>(count - kept, 0));
        if (by_digit) carry_over<kBytes>(work, digit);
      }
    });
    if (kIntegers) carry_over<kBytes>(work, 0);
    done_->events += done.events;
    done_->doublings += done.doublings;
  }
};

template <typename Weights, int kWidth>
void add_events(const Additions& work, Work& done) {
  if (work.whole && work.planes == 1) {
    run<TileLoop<Weights, kWidth, true>>(&work, &done);
  } else {
    run<TileLoop<Weights, kWidth, false>>(&work, &done);
  }
}

// ---- The first layer ----

// Sums of kPositions positions by kProducts outputs stay in registers over all taps and channels.
constexpr int kProducts = 16;

struct ProductTap {
  const float* in;       // of column `first`, in the first channel
  const float* weights;  // of the first output
  int first, last;       // columns that it reaches
};

template <int kPositions, int kBytes>
IIRSNN_INLINE void multiply(const Products& work, const ProductTap* taps, int tap_count, int x, int part, float* sums) {
  using Floats = Register<float, kBytes>;
  constexpr int kLanes = kBytes / 4, kRegisters = kProducts / kLanes;
  Floats v[kPositions][kRegisters];
  float* const at = sums + int64_t(x) * work.width + part;
  IIRSNN_REGISTERS
  for (int p = 0; p < kPositions; ++p) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[p][i] = load_register<Floats>(at + p * work.width + i * kLanes);
  }
  const int64_t column = work.column_in;
  for (int t = 0; t < tap_count; ++t) {
    const float *in = taps[t].in, *row = taps[t].weights + part;
    const int64_t from = (x - taps[t].first) * column;
    const auto add = [&](auto all) IIRSNN_INLINE_LAMBDA {
      for (int c = 0; c < work.channels; ++c, in += work.channel_in, row += work.pitch) {
        Floats w[kRegisters];
        IIRSNN_REGISTERS
        for (int i = 0; i < kRegisters; ++i) w[i] = load_register<Floats>(row + i * kLanes);
        IIRSNN_REGISTERS
        for (int p = 0; p < kPositions; ++p) {
          if (!decltype(all)::value && (x + p < taps[t].first || x + p >= taps[t].last)) continue;
          const Floats value = spread<kBytes>(in[from + p * column]);
          IIRSNN_REGISTERS
          for (int i = 0; i < kRegisters; ++i) v[p][i] += w[i] * value;
        }
      }
    };
    if (taps[t].first <= x && x + kPositions <= taps[t].last) {
      add(std::true_type());
    } else {
      add(std::false_type());
    }
  }
  IIRSNN_REGISTERS
  for (int p = 0; p < kPositions; ++p) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) store_register(at + p * work.width + i * kLanes, v[p][i]);
  }
}

struct ProductLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Products* work_) {
    const Products work = *work_;
    constexpr int kPositions = kBytes == 64 ? 8 : kBytes == 32 ? 4 : 2;
    std::vector<ProductTap> taps(work.tap_count);
    int rows = 0;
    for (int t = 0; t < work.tap_count; ++t) {
      rows = std::max(rows, int(work.taps[t].out / work.row_out) + work.taps[t].rows);
    }
    for (int64_t image = 0; image < work.images; ++image) {
      for (int y = 0; y < rows; ++y) {
        float* sums = work.sums + (image * work.image_out + y * work.row_out) * int64_t(work.width);
        int count = 0, left = 1 << 30, right = 0;  // columns of any tap
        for (int t = 0; t < work.tap_count; ++t) {
          const Tap& tap = work.taps[t];
          const int top = int(tap.out / work.row_out), begin = int(tap.out % work.row_out);
          if (y < top || y >= top + tap.rows || tap.columns == 0) continue;
          taps[count++] = {work.image + tap.in + image * work.image_in + (y - top) * work.row_in +
                               work.first_channel * work.channel_in,
                           work.weights + int64_t(t) * work.channels * work.pitch, begin, begin + tap.columns};
          left = std::min(left, begin);
          right = std::max(right, begin + tap.columns);
        }
        for (int part = 0; part < work.width; part += kProducts) {
          int x = left;
          for (; x + kPositions <= right; x += kPositions) {
            multiply<kPositions, kBytes>(work, taps.data(), count, x, part, sums);
          }
          for (; x < right; ++x) multiply<1, kBytes>(work, taps.data(), count, x, part, sums);
        }
      }
    }
  }
};

// ---- Neurons ----

template <bool kInteger, int kBytes>
IIRSNN_INLINE Register<float, kBytes> current(const Neurons& work, const char* sums, int output, const uint64_t* skip) {
  using Floats = Register<float, kBytes>;
  using Ints = Register<int32_t, kBytes>;
  Floats h;
  if constexpr (kInteger) {
    h = __builtin_convertvector(load_register<Ints>(sums), Floats);
    h = h * load_loose<Floats>(work.scale + output) + load_loose<Floats>(work.bias + output);
  } else {
    h = load_register<Floats>(sums);
  }
  if (skip) {
    constexpr int32_t kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints lane = load_loose<Ints>(kLanes);
    Ints count{};
    for (int digit = 0; digit < work.skip_planes; ++digit) {
      const int32_t bits = int32_t(skip[digit * work.skip_plane] >> (output % kWord) & 0xffff);
      count += (((bits - Ints{}) >> lane) & 1) << digit;
    }
    h += __builtin_convertvector(count, Floats) * spread<kBytes>(work.skip_unit);
  }
  return h;
}

IIRSNN_INLINE int64_t added(const Neurons& work, const uint64_t* skip) {
  int64_t bits = 0;
  for (int digit = 0; skip && digit < work.skip_planes; ++digit) {
    bits += __builtin_popcountll(skip[digit * work.skip_plane]);
  }
  return bits;
}

template <bool kInteger, bool kSkip>
struct FireOnce {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Neurons* work_, Fired* fired) {
    const Neurons work = *work_;
    int64_t count = 0, skips = 0;
    const char* sums = static_cast<const char*>(work.sums);
    for (int64_t image = 0; image < work.images; ++image) {
      for (int64_t p = 0; p < work.positions; ++p, sums += work.width * 4) {
        const int64_t at = image * work.image_words + p * work.words;
        for (int word = 0; word * kWord < work.outputs; ++word) {
          const uint64_t* skip = kSkip ? work.skip + at + word : nullptr;
          skips += added(work, skip);
          const int outputs = work.outputs - word * kWord < kWord ? work.outputs - word * kWord : kWord;
          uint64_t bits = 0;
          using Floats = Register<float, kBytes>;
          const auto some = [&](int i) IIRSNN_INLINE_LAMBDA {
            const int output = word * kWord + i;
            const Floats h = current<kInteger, kBytes>(work, sums + output * 4, output, skip);
            bits |= sign_bits<kBytes>(h > load_loose<Floats>(work.threshold + output)) << i;
          };
          if (outputs == kWord) {
            IIRSNN_REGISTERS
            for (int i = 0; i < kWord; i += kBytes / 4) some(i);
          } else {
            for (int i = 0; i < outputs; i += kBytes / 4) some(i);
          }
          if (outputs < kWord) bits &= (uint64_t(1) << outputs) - 1;
          work.spikes[at + word] = bits;
          count += __builtin_popcountll(bits);
        }
      }
    }
    fired->spikes += count;
    fired->skips += skips;
  }
};

template <bool kInteger, Reset kReset>
struct FireOverTime {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Neurons* work_, Fired* fired) {
    const Neurons work = *work_;
    int64_t count = 0, skips = 0;
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
            const uint64_t* skip = work.skip ? work.skip + at : nullptr;
            IIRSNN_REGISTERS
            for (int i = 0; i < 16; i += kBytes / 4) {
              store_register(h + i, current<kInteger, kBytes>(work, sums + i * 4, output + i, skip));
            }
            if (shift == 0) skips += added(work, skip);
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
    fired->spikes += count;
    fired->skips += skips;
  }
};

template <bool kInteger>
void fire_as(const Neurons& work, Fired& fired) {
  if (work.timesteps == 1) {
    return work.skip ? run<FireOnce<kInteger, true>>(&work, &fired) : run<FireOnce<kInteger, false>>(&work, &fired);
  }
  switch (work.reset) {
    case Reset::soft:
      return run<FireOverTime<kInteger, Reset::soft>>(&work, &fired);
    case Reset::hard:
      return run<FireOverTime<kInteger, Reset::hard>>(&work, &fired);
    case Reset::none:
      return run<FireOverTime<kInteger, Reset::none>>(&work, &fired);
    case Reset::soft_delayed:
      return run<FireOverTime<kInteger, Reset::soft_delayed>>(&work, &fired);
  }
}

}  // namespace

namespace {

template <typename Weights>
void add_integer_tile(const Additions& work, Work& done) {
  switch (work.width) {
    case 32:
      return add_events<Weights, 32>(work, done);
    case 64:
      return add_events<Weights, 64>(work, done);
    case 96:
      return add_events<Weights, 96>(work, done);
    default:
      return add_events<Weights, 128>(work, done);
  }
}

}  // namespace

void add_tile(Precision precision, const Additions& work, Work& done) {
  switch (precision) {
    case Precision::fp32:
      switch (work.width) {
        case 16:
          return add_events<Fp32, 16>(work, done);
        case 32:
          return add_events<Fp32, 32>(work, done);
        case 48:
          return add_events<Fp32, 48>(work, done);
        default:
          return add_events<Fp32, 64>(work, done);
      }
    case Precision::bf16:
      return work.width == 32 ? add_events<Bf16, 32>(work, done) : add_events<Bf16, 64>(work, done);
    case Precision::int8:
      return add_integer_tile<Integer<int8_t>>(work, done);
  }
}

void add_stream(Precision precision, const Additions& work, Work& done) {
  switch (precision) {
    case Precision::fp32:
      return run<StreamLoop<Fp32>>(&work, &done);
    case Precision::bf16:
      return run<StreamLoop<Bf16>>(&work, &done);
    case Precision::int8:
      return run<StreamLoop<Integer<int8_t>>>(&work, &done);
  }
}

void add_products(const Products& work) { run<ProductLoop>(&work); }

Fired fire(const Neurons& work) {
  Fired fired;
  if (work.integer) {
    fire_as<true>(work, fired);
  } else {
    fire_as<false>(work, fired);
  }
  return fired;
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
