#include "event/values.h"

#include <algorithm>
#include <limits>

namespace iirsnn::event {
namespace {

// f(value [channels]) of every pixel in the window of each column of a row; begin(out) before, end(out, pixels) after.
template <typename Begin, typename Each, typename End>
void pool(const ValuePoolRow& work, const Begin& begin, const Each& each, const End& end) {
  for (size_t x = 0; x < work.columns.size(); ++x) {
    float* const to = work.out + int64_t(x) * work.channels;
    const Axis& columns = work.columns[x];
    begin(to);
    for (int64_t y = work.rows.from; y < work.rows.to; y += work.rows.step) {
      for (int64_t column = columns.from; column < columns.to; column += columns.step) {
        each(to, work.in + (y * work.in_width + column) * work.channels);
      }
    }
    end(to, work.rows.size() * columns.size());
  }
}

}  // namespace

void pool_largest(const ValuePoolRow& work) {
  pool(
      work, [&](float* to) { std::fill_n(to, work.channels, -std::numeric_limits<float>::infinity()); },
      [&](float* to, const float* value) {
        for (int64_t c = 0; c < work.channels; ++c) to[c] = value[c] > to[c] ? value[c] : to[c];
      },
      [](float*, int64_t) {});
}

void pool_averages(const ValuePoolRow& work, int64_t area) {
  pool(
      work, [&](float* to) { std::fill_n(to, work.channels, 0.0f); },
      [&](float* to, const float* value) {
        for (int64_t c = 0; c < work.channels; ++c) to[c] += value[c];
      },
      [&](float* to, int64_t pixels) {
        const float divisor = float(area ? area : pixels);
        for (int64_t c = 0; c < work.channels; ++c) to[c] /= divisor;
      });
}

void add_values(const float* values, int64_t stride, float unit, float* sums, int64_t width, int64_t positions,
                int64_t channels) {
  for (int64_t p = 0; p < positions; ++p, values += stride, sums += width) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += values[c] * unit;
  }
}

int64_t add_counted(const CountsIn& in, float unit, float* sums, int64_t from, int64_t channels, int64_t width,
                    int64_t positions) {
  int64_t read = 0;
  for (int64_t p = 0; p < positions; ++p, sums += width) {
    for (int64_t word = from / kWord; word * kWord < from + channels; ++word) {
      const uint64_t* const digits = in.bits + p * in.words + word;
      const int64_t first = std::max(from - word * kWord, int64_t(0)), last = from + channels - word * kWord;
      uint64_t mask = ~uint64_t(0) << first, any = 0;
      if (last < kWord) mask &= (uint64_t(1) << last) - 1;
      for (int64_t digit = 0; digit < in.planes; ++digit) {
        read += __builtin_popcountll(digits[digit * in.plane] & mask);
        any |= digits[digit * in.plane] & mask;
      }
      for (; any; any &= any - 1) {
        const int channel = __builtin_ctzll(any);
        int32_t count = 0;
        for (int64_t digit = 0; digit < in.planes; ++digit) {
          count |= int32_t(digits[digit * in.plane] >> channel & 1) << digit;
        }
        sums[word * kWord + channel - from] += float(count) * unit;
      }
    }
  }
  return read;
}

void add_each_product(const Products& work) {
  for (int t = 0; t < work.tap_count; ++t) {
    const Tap& tap = work.taps[t];
    const float* const weights = work.weights + int64_t(t) * work.pitch;
    for (int64_t image = 0; image < work.images; ++image) {
      for (int y = 0; y < tap.rows; ++y) {
        const float* in = work.image + work.first_channel + tap.in + image * work.image_in + y * work.row_in;
        float* sums = work.sums + (tap.out + image * work.image_out + y * work.row_out) * work.width;
        for (int x = 0; x < tap.columns; ++x, in += work.column_in, sums += work.width) {
          for (int c = 0; c < work.channels; ++c) sums[c] += in[c] * weights[c];
        }
      }
    }
  }
}

}  // namespace iirsnn::event
