#include "event/bits.h"

#include <algorithm>

namespace iirsnn::event {
namespace {

// sum += 2^digit in the channels of `carry`: a binary addition of 64 counts at once.
inline void add_digit(uint64_t* sum, int64_t plane, uint64_t carry, int64_t digit) {
  for (; carry; ++digit) {
    const uint64_t old = sum[digit * plane];
    sum[digit * plane] = old ^ carry;
    carry &= old;
  }
}

inline void add_count(const CountsIn& in, int64_t at, int64_t times, uint64_t* sum, int64_t plane) {
  for (int64_t shift = 0; times >> shift; ++shift) {
    if (!(times >> shift & 1)) continue;
    for (int64_t digit = 0; digit < in.planes; ++digit) {
      add_digit(sum, plane, in.bits[at + digit * in.plane], digit + shift);
    }
  }
}

}  // namespace

void pool_spikes(const PoolRow& work) {
  const int64_t words = work.in.words;
  for (size_t x = 0; x < work.columns.size(); ++x) {
    uint64_t* const to = work.out.bits + int64_t(x) * words;
    std::fill_n(to, words, uint64_t(0));
    for (int64_t y = work.rows.from; y < work.rows.to; y += work.rows.step) {
      for (int64_t column = work.columns[x].from; column < work.columns[x].to; column += work.columns[x].step) {
        const uint64_t* const from = work.in.bits + (y * work.in_width + column) * words;
        for (int64_t word = 0; word < words; ++word) to[word] |= from[word];
      }
    }
  }
}

void pool_counts(const PoolRow& work, int64_t row_multiple, int64_t column_multiple) {
  const int64_t words = work.in.words;
  for (int64_t digit = 0; digit < work.out.planes; ++digit) {
    std::fill_n(work.out.bits + digit * work.out.plane, int64_t(work.columns.size()) * words, uint64_t(0));
  }
  for (size_t x = 0; x < work.columns.size(); ++x) {
    const Axis& columns = work.columns[x];
    const int64_t times = row_multiple ? row_multiple / work.rows.size() * (column_multiple / columns.size()) : 1;
    for (int64_t y = work.rows.from; y < work.rows.to; y += work.rows.step) {
      for (int64_t column = columns.from; column < columns.to; column += columns.step) {
        const int64_t from = (y * work.in_width + column) * words;
        for (int64_t word = 0; word < words; ++word) {
          add_count(work.in, from + word, times, work.out.bits + int64_t(x) * words + word, work.out.plane);
        }
      }
    }
  }
}

int64_t add_counts(const CountsIn& in, int64_t times, const CountsOut& out, int64_t first, int64_t last) {
  int64_t read = 0;
  for (int64_t at = first * in.words; at < last * in.words; ++at) {
    for (int64_t digit = 0; digit < in.planes; ++digit) read += __builtin_popcountll(in.bits[at + digit * in.plane]);
    add_count(in, at, times, out.bits + at, out.plane);
  }
  return read;
}

void copy_channels(const CountsIn& in, int64_t from, int64_t channels, const CountsOut& out, int64_t to, int64_t first,
                   int64_t last) {
  for (int64_t position = first; position < last; ++position) {
    for (int64_t digit = 0; digit < in.planes; ++digit) {
      const uint64_t* const source = in.bits + digit * in.plane + position * in.words;
      uint64_t* const target = out.bits + digit * out.plane + position * out.words;
      for (int64_t done = 0, count; done < channels; done += count) {  // the part of one word of the target
        const int64_t reads = from + done, writes = to + done, shift = reads % kWord;
        count = std::min(channels - done, kWord - writes % kWord);
        uint64_t bits = source[reads / kWord] >> shift;
        if (shift + count > kWord) bits |= source[reads / kWord + 1] << (kWord - shift);
        if (count < kWord) bits &= (uint64_t(1) << count) - 1;
        target[writes / kWord] |= bits << (writes % kWord);
      }
    }
  }
}

}  // namespace iirsnn::event
