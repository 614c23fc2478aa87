// Parameters of one element a channel, as a kernel over neurons in memory order meets them; sums over channels.
//
// Long rows of one channel, of whole vectors, go one by one, each with its parameters broadcast. With many channels
// innermost, in whole vectors, each pass over them is a piece. All others go together, with tables of one element a
// neuron that repeat after C * inner neurons.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "lif/lif.h"
#include "simd/versions.h"

namespace iirsnn {

constexpr int kBlock = 1024;  // neurons of one call of a kernel at most; a multiple of the 64 that packing pads to

// Calls f(first, last, channel) for the rows of one channel among neurons [begin, begin + n), counted from begin.
template <typename F>
IIRSNN_INLINE void for_each_row(const LifShape& shape, int64_t begin, int n, F f) {
  if (shape.channels == 1) return f(0, n, int64_t(0));
  int64_t channel = begin / shape.inner % shape.channels, left = shape.inner - begin % shape.inner;
  for (int first = 0; first < n;) {
    const int last = left < n - first ? first + int(left) : n;
    f(first, last, channel);
    first = last;
    left = shape.inner;
    if (++channel == shape.channels) channel = 0;
  }
}

// Where the parameters of neurons are: of neuron i of a piece at [step * i].
template <typename acc_t, int kCount>
struct Parameters {
  const acc_t* at[kCount];
  int step;  // 1, or 0: one vector of equal elements for all of them
};

template <typename acc_t, int kCount>
class Channels {
 public:
  static constexpr int kLanes = kVectorBytes / sizeof(acc_t);

  // parameters: [channels] each, or null
  Channels(const LifShape& shape, const std::array<const acc_t*, kCount>& parameters)
      : shape_(shape), values_(parameters), period_(shape.channels * shape.inner) {
    rows_ = shape.channels == 1 || (shape.inner >= 64 && shape.inner % kLanes == 0);
    passes_ = !rows_ && shape.inner == 1 && shape.channels >= 64 && shape.channels % kLanes == 0;
    if (rows_ || passes_) return;
    tables_.reserve(kCount);
    for (auto& values : values_) {
      if (!values) continue;  // no kernel reads it
      std::vector<acc_t> table(period_ + kBlock);
      for (int64_t n = 0, c = 0; n < period_; ++c) {
        for (int64_t end = n + shape.inner; n < end; ++n) table[n] = values[c];
      }
      for (int64_t n = period_; n < int64_t(table.size()); ++n) table[n] = table[n - period_];
      tables_.push_back(std::move(table));
      values = tables_.back().data();
    }
  }

  // Calls f(first, last, parameters, channel) for pieces of neurons [begin + first, begin + last), counted from begin,
  // at most kBlock; channel is -1 for a piece of several channels.
  template <typename F>
  IIRSNN_INLINE void for_each_piece(int64_t begin, int first, int last, F f) const {
    Parameters<acc_t, kCount> parameters;
    alignas(kVectorBytes) acc_t broadcast[kCount][kLanes];
    const int64_t piece = rows_ ? shape_.inner : period_;  // at most
    int64_t channel = rows_ ? (begin + first) / shape_.inner % shape_.channels : -1;
    int64_t at = rows_ || passes_ ? (begin + first) % piece : begin % period_ + first;
    parameters.step = rows_ ? 0 : 1;
    while (first < last) {
      const bool whole = !(rows_ || passes_) || piece - at >= last - first;
      const int end = whole ? last : first + int(piece - at);
      for (int k = 0; k < kCount; ++k) {
        if (rows_ || !values_[k]) {
          const acc_t value = values_[k] ? values_[k][channel] : acc_t(0);
          for (int i = 0; i < kLanes; ++i) broadcast[k][i] = value;
          parameters.at[k] = broadcast[k];
        } else {
          parameters.at[k] = values_[k] + (at - first);
        }
      }
      f(first, end, parameters, channel);
      first = end;
      at = 0;
      if (rows_ && ++channel == shape_.channels) channel = 0;
    }
  }

  // For each of `count` rows of one element a neuron: the sums over channels, added to totals[k][channel].
  template <typename V>
  IIRSNN_INLINE void add_up(int64_t begin, int first, int last, int count, acc_t (*rows)[kBlock],
                            double* totals) const {
    constexpr int kSize = sizeof(V) / sizeof(acc_t);
    for (int k = 0; k < count; ++k) {
      double* total = totals + k * shape_.channels;
      acc_t* row = rows[k];
      if (shape_.inner == 1) {
        const int end = int(std::min<int64_t>(last, first + shape_.channels));
        for (int j = end; j < last; j += end - first) {  // the first pass takes in the others
          const int n = std::min(end - first, last - j);
          IIRSNN_VECTORIZE
          for (int i = 0; i < n; ++i) row[first + i] += row[j + i];
        }
        for_each_pass(begin, first, end, [&](int i, int end, int64_t c) IIRSNN_INLINE_LAMBDA {
          for (; i < end; ++i, ++c) total[c] += double(row[i]);
        });
      } else {
        row += first;
        for_each_row(shape_, begin + first, last - first, [&](int i, int end, int64_t c) IIRSNN_INLINE_LAMBDA {
          acc_t result = acc_t(0);
          if (end - i >= kSize) {
            V vector = load<V>(row + i);
            for (i += kSize; i + kSize <= end; i += kSize) vector = vector + load<V>(row + i);
            result = sum(vector);
          }
          for (; i < end; ++i) result += row[i];
          total[c] += double(result);
        });
      }
    }
  }

  int64_t count() const { return shape_.channels; }

 private:
  // With one neuron a channel: calls f(first, last, channel of the first) for each pass over the channels.
  template <typename F>
  IIRSNN_INLINE void for_each_pass(int64_t begin, int first, int last, F f) const {
    int64_t channel = (begin + first) % shape_.channels;
    for (int i = first; i < last;) {
      const int64_t left = shape_.channels - channel;
      const int end = left < last - i ? i + int(left) : last;
      f(i, end, channel);
      i = end;
      channel = 0;
    }
  }

  const LifShape shape_;
  std::array<const acc_t*, kCount> values_;
  const int64_t period_;
  bool rows_, passes_;
  std::vector<std::vector<acc_t>> tables_;
};

}  // namespace iirsnn
