// Many outputs at few positions: long rows of weights, which come from memory.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "event/blocks.h"
#include "event/kernels.h"
#include "event/row_sums.h"
#include "simd/versions.h"

namespace iirsnn::event {
namespace {

// When the rows to come are asked for, four at a time. Their own prefetchers follow eight rows faster than processors
// with AVX2 answer (Zen 3, a linear layer: 23 against 19 GB/s), but for bf16 (512 x 512 channels at 2x2: 0.37 against
// 0.29 ms). Those with AVX-512 gain, but for fp32 where a strip has more than one position (Cascade Lake, a linear
// layer of 16 images: 8.7 against 6.4 ms).
enum class Asks { never, alone, always };
template <int kBytes, typename weight_t>
constexpr Asks kAsks = sizeof(weight_t) == 2   ? Asks::always
                       : kBytes < 64           ? Asks::never
                       : sizeof(weight_t) == 4 ? Asks::alone
                                               : Asks::always;

// Rows are long and each is met a few times at most, so they come from memory: several at a time.
template <typename Weights>
struct StreamLoop {
  using weight_t = typename Weights::weight_t;
  using sum_t = typename Weights::sum_t;
  template <int kBytes>
  using Sum = typename Weights::template Sum<Weights::kUnit, kBytes>;
  template <bool kAsk>
  static constexpr int kRows = kAsk ? 4 : 8;
  static constexpr int kAhead = 8192 / int(sizeof(weight_t));  // outputs of each row
  static constexpr bool kIntegers = std::is_same_v<sum_t, int16_t>;

  template <int kMost>
  struct Rows {
    const weight_t* rows[kMost];  // beyond count, the first one again
    sum_t* sums;
    int count, digit;

    IIRSNN_INLINE Rows(const weight_t* first, sum_t* sums, int digit) : sums(sums), count(0), digit(digit) {
      for (const weight_t*& row : rows) row = first;
    }
    IIRSNN_INLINE bool takes(const sum_t* to, int of) const { return count < kMost && sums == to && digit == of; }
  };

  template <int kBytes, bool kAsk, int kCount, bool kPlain, typename Group>
  static IIRSNN_INLINE void add_part(const Group& group, int from, int to, const Group& next, int shift) {
    const weight_t* rows[kCount];  // in registers: stores to the sums could change the group's
    for (int k = 0; k < kCount; ++k) rows[k] = group.rows[k];
    const weight_t* ahead[kRows<kAsk>];
    if (kAsk) {
      for (int k = 0; k < kRows<kAsk>; ++k) ahead[k] = next.rows[k] + shift;
    }
    sum_t* const sums = group.sums;
    const int digit = group.digit;
    for (int i = from; i < to; i += Weights::kUnit) {
      if (kAsk && (sizeof(weight_t) > 1 || i % 64 == 0)) {  // once a cache line
        for (int k = 0; k < kRows<kAsk>; ++k) __builtin_prefetch(ahead[k] + i, 0, 2);
      }
      Sum<kBytes> sum;
      sum.load(sums + i);
      IIRSNN_REGISTERS
      for (int k = 0; k < kCount; ++k) sum.add(rows[k] + i, kPlain ? 0 : digit);
      sum.end(kCount << (kPlain ? 0 : digit));
      sum.store(sums + i);
    }
  }
  // Adds a group and asks for `soon` at the distance `shift`, then for `later`.
  template <int kBytes, bool kAsk, int kCount, typename Group>
  static IIRSNN_INLINE void add(const Group& group, const Group& soon, const Group& later, int shift, int width) {
    if (group.digit == 0) {
      add_part<kBytes, kAsk, kCount, true>(group, 0, width - shift, soon, shift);
      add_part<kBytes, kAsk, kCount, true>(group, width - shift, width, later, shift - width);
    } else {
      add_part<kBytes, kAsk, kCount, false>(group, 0, width - shift, soon, shift);
      add_part<kBytes, kAsk, kCount, false>(group, width - shift, width, later, shift - width);
    }
  }

  // Of a group of any count.
  template <int kBytes, bool kAsk, int kCount, typename Group>
  static IIRSNN_INLINE void add_any(const Group& group, const Group& soon, const Group& later, int shift, int width) {
    if constexpr (kCount > 1) {
      if (group.count < kCount) return add_any<kBytes, kAsk, kCount - 1>(group, soon, later, shift, width);
    }
    add<kBytes, kAsk, kCount>(group, soon, later, shift, width);
  }

  template <int kBytes>
  static IIRSNN_INLINE void run(const Additions* work, Work* done) {
    constexpr Asks kWhen = kAsks<kBytes, weight_t>;
    if constexpr (kWhen != Asks::never) {
      if (kWhen == Asks::always || work->positions == 1) return walk<kBytes, true>(*work, done);
    }
    if constexpr (kWhen != Asks::always) walk<kBytes, false>(*work, done);
  }

  template <int kBytes, bool kAsk>
  static IIRSNN_INLINE void walk(const Additions work, Work* done_) {
    Work done;
    using Group = Rows<kRows<kAsk>>;
    const auto carry_over = [&](int digit) IIRSNN_INLINE_LAMBDA {
      if constexpr (kIntegers) event::carry_over<Sum<kBytes>::kRegister>(work, digit);
    };
    std::vector<Group> groups;  // to be added; known so early that their rows can be asked for
    const int width = work.width, groups_ahead = kAhead / width;
    // rows that count 2^digit times, of which the sums take 2^shift
    const auto collect = [&](uint64_t bits, int digit, int shift, const weight_t* rows, sum_t* sums)
                             IIRSNN_INLINE_LAMBDA {
                               done.count(bits, digit);
                               while (bits) {
                                 if (groups.empty() || !groups.back().takes(sums, shift)) {
                                   groups.emplace_back(rows + __builtin_ctzll(bits) * work.pitch, sums, shift);
                                 }
                                 Group& group = groups.back();
                                 for (; bits && group.count < kRows<kAsk>; bits &= bits - 1) {
                                   group.rows[group.count++] = rows + __builtin_ctzll(bits) * work.pitch;
                                 }
                               }
                             };
    each_block<Weights>(work, [&](const Tap& tap, const uint64_t* bits, const Channels& channels, const weight_t* rows,
                                  int here, int ahead, Carry carry, bool complete) IIRSNN_INLINE_LAMBDA {
      if (kIntegers && carry != Carry::none) carry_over(0);
      const bool by_digit = kIntegers && carry == Carry::by_digit;
      // of many positions one or another needs almost every row of the next block, so they share out all of them
      const bool share = kAsk && ahead > 0 && work.images * tap.rows * tap.columns >= kVisitsToPrefetch;
      const weight_t* const next = rows + here * work.pitch;
      for (int digit = 0; digit < (by_digit ? work.planes : 1); ++digit) {
        each_position<sum_t>(work, tap, bits, [&](const uint64_t* in, sum_t* sums) IIRSNN_INLINE_LAMBDA {
          if (by_digit) return collect(channels.of(in[digit * work.plane]), digit, 0, rows, sums);
          for (int d = 0; d < work.planes; ++d) collect(channels.of(in[d * work.plane]), d, d, rows, sums);
        });
        const int64_t count = groups.size(), open = kAsk ? groups_ahead + 2 : 1,
                      kept = complete || by_digit || share ? 0 : open;
        for (int64_t i = 0; i < count - kept; ++i) {
          Group block = groups[i];
          const Group *soon = &block, *later = soon;
          int shift = 0;
          if (share) {
            for (int64_t k = 0; k < kRows<kAsk>; ++k) {
              const int64_t last = std::min<int64_t>((i + 1) * ahead / count, ahead - 1);
              block.rows[k] = next + std::min(i * ahead / count + k, last) * work.pitch;
            }
          } else if (kAsk) {
            soon = &groups[std::min(i + groups_ahead, count - 1)];
            later = &groups[std::min(i + groups_ahead + 1, count - 1)];
            shift = kAhead % width;
          }
          add_any<kBytes, kAsk, kRows<kAsk>>(groups[i], *soon, *later, shift, width);
        }
        groups.erase(groups.begin(), groups.begin() + std::max<int64_t>(count - kept, 0));
        if (by_digit) carry_over(digit);
      }
    });
    carry_over(0);
    done_->events += done.events;
    done_->doublings += done.doublings;
  }
};

}  // namespace

void add_stream(Precision precision, const Additions& work, Work& done) {
  switch (precision) {
    case Precision::fp32:
      return run<StreamLoop<Fp32>>(&work, &done);
    case Precision::bf16:
      return run<StreamLoop<Bf16>>(&work, &done);
    case Precision::int8:
      return run<StreamLoop<Int8>>(&work, &done);
  }
}

}  // namespace iirsnn::event
