#include "lif/cpu/channels.h"

#include "lif/cpu/sums.h"
#include "simd/sums.h"
#include "simd/versions.h"

namespace iirsnn {
namespace {

int64_t row_of(const LifShape& shape, Walk walk) {
  return walk == Walk::columns ? Columns(shape).longest() : row_neurons(shape);
}

// Where channels are too narrow to be pieces of their own, rows are filled: once, if that is not too long.
template <typename acc_t>
bool wide(const LifShape& shape, Walk walk) {
  if (walk == Walk::columns) return false;
  const int64_t vectors = shape.inner / kLanes<acc_t>;
  if (shape.channels == 1 || vectors >= 4 * kWide) return true;
  return shape.timesteps == 1 && vectors >= kWide;
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

template <typename acc_t>
struct SumRow {  // one a neuron -> added to totals of channels; reads up to a vector more than n
  template <int kBytes>
  static IIRSNN_INLINE void run(const LifShape* shape, const acc_t* row, int64_t begin, int n, double* totals) {
    using V = Lanes<acc_t, kBytes, 64>;
    if (shape->inner == 1) {
      for_each_pass(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        double* to = totals + channel - first;
        IIRSNN_VECTORIZE
        for (int i = first; i < last; ++i) to[i] += double(row[i]);
      });
    } else if (shape->inner < V::kSize) {
      for_each_channel(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        double result = row[first];
        IIRSNN_ROLLED
        for (int i = first + 1; i < last; ++i) result += double(row[i]);
        totals[channel] += result;
      });
    } else {
      for_each_channel(*shape, begin, n, [&](int first, int last, int64_t channel) IIRSNN_INLINE_LAMBDA {
        Sums<kBytes> result = Sums<kBytes>(0.0);
        int i = first;
        for (; i + V::kSize <= last; i += V::kSize) add_up(result, load<V>(row + i));
        add_up(result, first_lanes(load<V>(row + i), last - i));
        totals[channel] += sum(result);
      });
    }
  }
};

template <typename acc_t>
struct FoldRow {  // one a neuron -> added to sums of neurons; leaves zeros
  template <int kBytes>
  static IIRSNN_INLINE void run(acc_t* row, int n, double* sums) {
    IIRSNN_VECTORIZE
    for (int i = 0; i < n; ++i) {
      sums[i] += double(row[i]);
      row[i] = acc_t(0);
    }
  }
};

template <typename acc_t>
struct SumShared {  // vectors of two channels in a block of wide ones -> added to totals of channels; leaves zeros
  template <int kBytes>
  static IIRSNN_INLINE void run(acc_t* row, const Range* range, const Parameters<acc_t>* parameters, double* totals) {
    using V = Lanes<acc_t, kBytes>;
    const Piece* piece = parameters->pieces;
    for (int first = 0; first < range->n; first = piece++->end) {
      if (!piece->several()) continue;
      const V numbers = load<V>(row + first);
      Sums<kBytes> sums = Sums<kBytes>(0.0), rest = sums;
      add_up(sums, first_lanes(numbers, piece->shared));
      add_up(rest, other_lanes(numbers, piece->shared));
      totals[piece->channel] += sum(sums);
      totals[next_channel(parameters->channels, piece->channel)] += sum(rest);
      store(row + first, V(acc_t(0)));
    }
  }
};

}  // namespace

template <typename acc_t>
Channels<acc_t>::Channels(const LifShape& shape, const Values& values, Walk walk)
    : shape_(shape),
      values_(values),
      walk_(walk),
      wide_(wide<acc_t>(shape, walk)),
      stride_(shape.channels == 1 || walk == Walk::channels ? 0 : 2 * kLanes<acc_t> + row_of(shape, walk)),
      rows_([&] {
        for (int k = 0; k < kParameters; ++k) {
          if (!values[k]) continue;
          slots_[k] = count_;
          used_[count_++] = k;
        }
        return count_ * stride_;
      }()) {
  parameters_.channels = shape.channels;
  std::copy(values.begin(), values.end(), parameters_.values);
}

template <typename acc_t>
const Parameters<acc_t>& Channels<acc_t>::of(const Range& range) {
  if (whole()) {
    parameters_.first = {int(shape_.inner), channel_of(shape_, range.begin), 0};
    return parameters_;
  }
  pieces_used_ = 0;
  for (int k = 0; k < kParameters; ++k) parameters_.rows[k] = row(k);
  if (wide_) {
    cut(range);
  } else {
    fill(range);
  }
  parameters_.pieces = pieces_.data();
  return parameters_;
}

template <typename acc_t>
void Channels<acc_t>::cut(const Range& range) {
  constexpr int kSize = kLanes<acc_t>;
  int64_t channel = channel_of(shape_, range.begin), left = left_of_channel(shape_, range.begin);
  for (int at = 0; at < range.n;) {
    const int inside = left < range.n - at ? int(left / kSize * kSize) : (range.n - at + kSize - 1) / kSize * kSize;
    if (inside > 0) add_piece(at + inside, channel, 0);
    at += inside;
    left -= inside;
    if (at >= range.n) break;
    const int64_t next = next_channel(shape_.channels, channel);
    if (left > 0) {
      for (int i = 0; i < count_; ++i) {  // whole vectors each, whose length is known
        const acc_t* values = values_[used_[i]];
        std::fill_n(row(used_[i]) + at, kSize, values[channel]);
        std::fill_n(row(used_[i]) + at + left, kSize, values[next]);
      }
      add_piece(at += kSize, channel, int(left));
      left -= kSize;
    }
    left += shape_.inner;
    channel = next;
  }
}

template <typename acc_t>
void Channels<acc_t>::fill(const Range& range) {
  const int64_t period = shape_.channels * shape_.inner;
  const int64_t first = (range.begin - range.at) % period;
  const int n = (range.n + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>;
  if (first != first_ || range.at + n > filled_) {
    first_ = first;
    filled_ = std::max(range.at + n, range.width);
    for (int i = 0; i < count_; ++i) {
      run<SpreadRow<acc_t>>(&shape_, values_[used_[i]], first_, int(filled_), row(used_[i]));
    }
  }
  for (int k = 0; k < kParameters; ++k) parameters_.rows[k] += range.at;
  add_piece(n, -1, 0);
}

template <typename acc_t>
void Channels<acc_t>::add_piece(int end, int64_t channel, int shared) {
  pieces_[pieces_used_++] = {end, channel, shared};
}

template <typename acc_t>
ChannelSums<acc_t>::ChannelSums(const LifShape& shape, int count, bool charged, Walk walk)
    : shape_(shape),
      count_(count),
      charged_(charged),
      columns_(walk == Walk::columns),
      wide_(wide<acc_t>(shape, walk)),
      stride_(2 * kLanes<acc_t> + (shape.channels == 1 ? 0 : row_of(shape, walk))),
      most_(std::max<int64_t>(1, kHeldTerms / shape.timesteps)),
      rows_(count * stride_),
      folds_(shape.inner > 1 && shape.inner < kSmallMap && row_of(shape, walk) >= 2 * shape.channels * shape.inner),
      sums_(folds_ ? count * stride_ : 0) {
  std::fill_n(rows_.get(), count * stride_, acc_t(0));
  if (folds_) std::fill_n(sums_.get(), count * stride_, 0.0);
}

template <typename acc_t>
acc_t* ChannelSums<acc_t>::rows(const Range& range) {
  return rows_.get() + range.at;
}

template <typename acc_t>
void ChannelSums<acc_t>::add(const Range& range, const Parameters<acc_t>& parameters, double* totals) {
  const bool pass_done = range.at + range.n == range.width;
  if (pass_done) held_ += range.passes;
  if (columns_ && !range.last && (!pass_done || held_ < most_)) return;
  held_ = 0;
  const int64_t width = range.width, begin = range.begin - range.at;
  for (int k = 0; k < count_; ++k) {
    if (k == kLeakSum && !charged_) continue;
    acc_t* row = rows_.get() + k * stride_;
    double* total = totals + k * shape_.channels;
    if (wide_) {
      run<SumShared<acc_t>>(row, &range, &parameters, total);
    } else if (folds_) {  // what belongs to the same neuron of a pass
      double* sums = sums_.get() + k * stride_;
      const int64_t period = std::min(shape_.channels * shape_.inner, width);
      for (int64_t i = 0; i < width; i += period) {
        run<FoldRow<acc_t>>(row + i, int(std::min(period, width - i)), sums);
      }
      run<SumRow<double>>(&shape_, sums, begin, int(period), total);
      std::fill_n(sums, period, 0.0);
    } else {
      run<SumRow<acc_t>>(&shape_, row, begin, int(width), total);
      std::fill_n(row, width, acc_t(0));
    }
  }
}

void clear_sums(const LifShape& shape, Walk walk, int64_t chunk, int count, double* sums) {
  double* const of_chunk = sums + chunk * count * shape.channels;
  const auto clear = [&](int64_t first, int64_t last) {
    for (int k = 0; k < count; ++k) std::fill_n(of_chunk + k * shape.channels + first, last - first, 0.0);
  };
  if (chunk == 0) return clear(0, shape.channels);
  for_channels_of(shape, walk, chunk, clear);
}

void add_sums(const LifShape& shape, Walk walk, int count, double* sums) {
  const int64_t chunks = chunks_of(shape);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const double* const of_chunk = sums + chunk * count * shape.channels;
    for_channels_of(shape, walk, chunk, [&](int64_t first, int64_t last) {
      for (int k = 0; k < count; ++k) {
        const int64_t row = k * shape.channels;
        for (int64_t c = row + first; c < row + last; ++c) sums[c] += of_chunk[c];
      }
    });
  }
}

template class Channels<float>;
template class Channels<double>;
template class Channels<int16_t>;
template class ChannelSums<float>;
template class ChannelSums<double>;

}  // namespace iirsnn
