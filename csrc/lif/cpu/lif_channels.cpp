#include "lif/cpu/channels.h"
#include "simd/versions.h"

namespace iirsnn {
namespace {

bool in_one_channel(const LifShape& shape, const Range& range) {
  return shape.channels == 1 || range.begin % shape.inner + range.n <= shape.inner;
}

// As for_each_channel, where each channel has one neuron: for each pass over the channels, whose first is `channel`.
template <typename F>
IIRSNN_INLINE void for_each_pass(const LifShape& shape, int64_t begin, int n, F f) {
  int64_t channel = begin % shape.channels;
  for (int first = 0; first < n; channel = 0) {
    const int last = shape.channels - channel < n - first ? first + int(shape.channels - channel) : n;
    f(first, last, channel);
    first = last;
  }
}

// ---- Parameters ----

template <typename acc_t>
struct SpreadRow {  // values of channels -> one a neuron; writes up to a register more than n
  template <int kBytes>
  static IIRSNN_INLINE void run(const LifShape* shape, const acc_t* values, int64_t begin, int n, acc_t* row) {
    constexpr int kSize = kBytes / sizeof(acc_t);
    if (shape->inner == 1) {
      for_each_pass(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        memcpy(row + first, values + channel, (last - first) * sizeof(acc_t));
      });
      return;
    }
    for_each_channel(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
      const auto value = spread<kBytes>(values[channel]);
      for (int i = first; i < last; i += kSize) store_loose(row + i, value);
    });
  }
};

// ---- Sums ----

// The sum of the lanes, halving them.
template <typename acc_t>
acc_t fold_lanes(const acc_t* lanes) {
  acc_t sums[kLanes<acc_t>];
  std::copy_n(lanes, kLanes<acc_t>, sums);
  for (int half = kLanes<acc_t> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <typename acc_t>
struct SumRow {  // one a neuron -> added to totals of channels; reads up to a vector more than n
  template <int kBytes>
  static IIRSNN_INLINE void run(const LifShape* shape, const acc_t* row, int64_t begin, int n, double* totals) {
    using V = Lanes<acc_t, kBytes>;
    using Bits = typename Number<V>::bits_t;
    using bits_t = typename Number<acc_t>::bits_t;
    if (shape->inner == 1) {
      for_each_pass(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        double* to = totals + channel - first;
        IIRSNN_VECTORIZE
        for (int i = first; i < last; ++i) to[i] += double(row[i]);
      });
    } else if (shape->inner < V::kSize / 2) {
      for_each_channel(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        acc_t result = row[first];
        for (int i = first + 1; i < last; ++i) result += row[i];
        totals[channel] += double(result);
      });
    } else {
      bits_t kept[2 * V::kSize];  // from [kSize - rest] on: a vector of `rest` lanes
      for (int i = 0; i < 2 * V::kSize; ++i) kept[i] = i < V::kSize ? ~bits_t(0) : bits_t(0);
      for_each_channel(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        V result = V(acc_t(0));
        int i = first;
        for (; i + V::kSize <= last; i += V::kSize) result = result + load<V>(row + i);
        const Bits rest = bit_cast<Bits>(load<V>(row + i)) & load<Bits>(kept + V::kSize - (last - i));
        totals[channel] += double(sum(result + bit_cast<V>(rest)));
      });
    }
  }
};

}  // namespace

template <typename acc_t>
Channels<acc_t>::Channels(const LifShape& shape, const Values& values)
    : shape_(shape),
      values_(values),
      period_(shape.channels * shape.inner),
      once_(period_ <= kLongRow && shape.neurons >= 4 * period_),
      stride_((once_ ? period_ : 0) + kRow<acc_t> + 2 * kLanes<acc_t>),
      rows_(kParameters * stride_) {}

template <typename acc_t>
const Parameters<acc_t>& Channels<acc_t>::of(const Range& range) {
  parameters_.along = !in_one_channel(shape_, range);
  if (!parameters_.along) {
    const int64_t channel = channel_of(shape_, range.begin);
    for (int k = 0; k < kParameters; ++k) {
      parameters_.at[k] = broadcast(k);
      if (values_[k] && channel != channel_) std::fill_n(broadcast(k), kLanes<acc_t>, values_[k][channel]);
    }
    channel_ = channel;
    return parameters_;
  }
  const int64_t phase = range.begin % period_;
  const int n = (range.n + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>;
  if (phase < first_ || phase + n > first_ + filled_) {
    first_ = once_ ? 0 : phase;
    filled_ = once_ ? period_ + kBlock : n;
    for (int k = 0; k < kParameters; ++k) {
      if (values_[k]) run<SpreadRow<acc_t>>(&shape_, values_[k], first_, int(filled_), row(k));
    }
  }
  for (int k = 0; k < kParameters; ++k) parameters_.at[k] = row(k) + (phase - first_);
  return parameters_;
}

template <typename acc_t>
ChannelSums<acc_t>::ChannelSums(const LifShape& shape, int count)
    : shape_(shape),
      count_(count),
      hold_(block_neurons(shape) % (shape.channels * shape.inner) == 0 ? kHeldBlocks : 1),
      lanes_(count * kRow<acc_t>),
      rows_(count * kRow<acc_t> + kLanes<acc_t>) {}

template <typename acc_t>
acc_t* ChannelSums<acc_t>::rows(const Range& range) {
  return in_one_channel(shape_, range) ? lanes_.data() : rows_.data();
}

template <typename acc_t>
void ChannelSums<acc_t>::add(const Range& range, double* totals) {
  if (in_one_channel(shape_, range)) {
    double* total = totals + channel_of(shape_, range.begin);
    for (int k = 0; k < count_; ++k) total[k * shape_.channels] += double(fold_lanes(lanes_.data() + k * kRow<acc_t>));
  } else {
    if (held_++ == 0) begin_ = range.begin;
    width_ = std::max(width_, range.n);
  }
  if (held_ == 0 || (held_ < hold_ && !range.last)) return;
  for (int k = 0; k < count_; ++k) {
    acc_t* row = rows_.data() + k * kRow<acc_t>;
    run<SumRow<acc_t>>(&shape_, row, begin_, width_, totals + k * shape_.channels);
    std::fill_n(row, kBlock, acc_t(0));
  }
  held_ = width_ = 0;
}

template class Channels<float>;
template class Channels<double>;
template class ChannelSums<float>;
template class ChannelSums<double>;

}  // namespace iirsnn
