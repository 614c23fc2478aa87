// The walk over the events of one call: block by block of its weights, position by position.
#pragma once

#include <cstdint>

#include "event/kernels.h"

namespace iirsnn::event {

// The channels of a word that take part: the lowest is bit 0 of what `of` gives, as its row is the first of the
// block's.
struct Channels {
  int first;
  uint64_t mask;
  IIRSNN_INLINE uint64_t of(uint64_t word) const { return word >> first & mask; }
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

}  // namespace iirsnn::event
