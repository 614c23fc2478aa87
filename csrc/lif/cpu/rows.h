// What the kernels over rows of neurons share. A row is walked in parts: 64 bytes of numbers; of 16-bit floats no less
// than two registers.
#pragma once

#include "lif/cpu/channels.h"
#include "simd/sums.h"
#include "simd/versions.h"

namespace iirsnn {

template <typename scalar_t, int kBytes>
struct Parts {
  using acc_t = typename Convert<scalar_t>::acc_t;
  using P = Lanes<acc_t, kBytes, std::max(64, sizeof(scalar_t) == 2 ? 2 * kBytes : kBytes)>;
  // What goes through all timesteps in registers: a vector, or as much of it as four of them hold.
  using Held = Lanes<acc_t, kBytes, std::min(4 * kBytes, kVectorBytes)>;
};

// The parameters of a part: loaded for each, or where its piece is of one channel held in registers.
template <typename P, bool kOfSeveral, typename acc_t>
class PartParameters {
 public:
  static constexpr bool kSeveral = kOfSeveral;

  IIRSNN_INLINE PartParameters(const Parameters<acc_t>& p, const Piece& piece) : channel_(piece.channel) {
    IIRSNN_REGISTERS
    for (int k = 0; k < kParameters; ++k) {
      rows_[k] = p.rows[k];
      if constexpr (!kSeveral) all_[k] = P(p.values[k] ? p.values[k][piece.channel] : acc_t(0));
    }
  }
  IIRSNN_INLINE int64_t channel() const { return channel_; }
  // Of the part from neuron i of the block on.
  IIRSNN_INLINE P of(int which, int i) const {
    if constexpr (kSeveral) return load<P>(rows_[which] + i);
    return all_[which];
  }
  IIRSNN_INLINE Neuron<P> neuron(int i, acc_t v_reset) const {
    return {of(kThreshold, i), of(kInverse, i), of(kLeak, i), P(v_reset)};
  }

 private:
  const int64_t channel_;
  const acc_t* rows_[kParameters];
  P all_[kParameters];
};

// f(parameters of parts, begin, end) for each piece of the n neurons of a block.
template <typename P, typename acc_t, typename F>
IIRSNN_INLINE void for_each_piece(const Parameters<acc_t>& p, int n, F f) {
  Piece piece = p.first;
  for (int begin = 0, k = 0; begin < n; begin = piece.end, ++k) {
    if (p.pieces) {
      piece = p.pieces[k];
    } else if (k > 0) {
      piece = {begin + p.first.end, next_channel(p.channels, piece.channel), 0};
    }
    if (piece.several()) {
      f(PartParameters<P, true, acc_t>(p, piece), begin, piece.end);
    } else {
      f(PartParameters<P, false, acc_t>(p, piece), begin, piece.end);
    }
  }
}

// Rounded to scalar_t, as a current in memory would be; of a NaN, its lower half is 0.
template <typename scalar_t, typename P>
IIRSNN_INLINE P rounded(const P& value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    using Bits = typename Number<P>::bits_t;
    const Bits bits = bit_cast<Bits>(value);
    return bit_cast<P>((bits + Bits(0x7fffu) + ((bits >> 16) & Bits(1u))) & Bits(0xffff0000u));
  } else {
    return value;
  }
}

// x: that of neuron i of the block.
template <bool kNormalised, typename P, typename scalar_t, typename PartParameters>
IIRSNN_INLINE P current_at(const scalar_t* x, const PartParameters& p, int i) {
  const P current = load<P>(x);
  if constexpr (!kNormalised) return current;
  return rounded<scalar_t>(current * p.of(kGain, i) + p.of(kShift, i));
}

// grad_x of a current that was normalised, from its gradient g and x - mean:
// gain (g - mean(g) - x_hat mean(g x_hat)).
template <typename P, typename PartParameters>
IIRSNN_INLINE P input_gradient(const P& g, const P& centred, const PartParameters& p, int i) {
  return (g - p.of(kGradMean, i) - centred * p.of(kSlope, i)) * p.of(kGain, i);
}

// Asks for the scalars of a part of a row that comes next: 3 T rows are more than a processor follows by itself.
template <typename P, typename scalar_t>
IIRSNN_INLINE void prefetch(const scalar_t* row) {
  constexpr int kLine = 64 / sizeof(scalar_t);
  IIRSNN_REGISTERS
  for (int i = 0; i < P::kSize; i += kLine) __builtin_prefetch(row + i);
}

// Sums over the neurons of a piece: of one channel in registers, of several one a neuron in memory.
template <typename P, typename acc_t, int kCount, int kBytes, bool kSeveral>
class PieceSums {
 public:
  // rows: of several channels; totals: [kCount, channels].
  IIRSNN_INLINE PieceSums(acc_t* rows, int64_t stride, double* totals, int64_t channels)
      : rows_(rows), stride_(stride), totals_(totals), channels_(channels) {
    IIRSNN_REGISTERS
    for (int k = 0; k < kCount && !kSeveral; ++k) sums_[k] = Sums<kBytes>(0.0);
  }
  IIRSNN_INLINE void add(int k, int j, const P& numbers) {
    if constexpr (kSeveral) {
      acc_t* const to = rows_ + k * stride_ + j;
      store(to, load<P>(to) + numbers);
    } else {
      add_up(sums_[k], numbers);
    }
  }
  // Of a channel, if not of several.
  IIRSNN_INLINE void finish(int64_t channel) const {
    IIRSNN_REGISTERS
    for (int k = 0; k < kCount && !kSeveral; ++k) totals_[k * channels_ + channel] += sum(sums_[k]);
  }

 private:
  acc_t* const rows_;
  const int64_t stride_;
  double* const totals_;
  const int64_t channels_;
  Sums<kBytes> sums_[kCount > 0 ? kCount : 1];
};

// Of numbers whose first ones have been added.
template <typename Sums>
class SumsOfRest {
 public:
  IIRSNN_INLINE SumsOfRest(Sums& sums, int added) : sums_(sums), added_(added) {}
  template <typename P>
  IIRSNN_INLINE void add(int k, int j, const P& numbers) const {
    sums_.add(k, j, other_lanes(numbers, added_));
  }

 private:
  Sums& sums_;
  const int added_;
};

// Whether kernels write past the caches: what is large, and lies as streams want it.
template <typename scalar_t>
bool past_caches(const LifShape& shape, const void* to) {
  return large(shape) && reinterpret_cast<uintptr_t>(to) % 64 == 0 && shape.neurons * sizeof(scalar_t) % 64 == 0;
}

// What was written past the caches is there for whoever comes to know that the kernel is done.
inline void settle() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

// A block whose scalars no kernel reads in place: float16, or not whole vectors. Rows of them, as the kernels' scalars,
// zeros up to a whole vector.
template <typename scalar_t>
using kernel_t = std::conditional_t<std::is_same_v<scalar_t, Half>, float, scalar_t>;

template <typename scalar_t>
int whole_vectors(int n) {
  constexpr int kSize = kLanes<typename Convert<scalar_t>::acc_t>;
  return (n + kSize - 1) / kSize * kSize;
}
template <typename scalar_t>
bool staged(int n) {
  return std::is_same_v<scalar_t, Half> || n != whole_vectors<scalar_t>(n);
}
// Whether any block of some chunks is: of whole vectors all are but the last.
template <typename scalar_t>
bool some_staged(const LifShape& shape, Walk walk, int64_t last_chunk) {
  const bool last = walk == Walk::columns || last_chunk == chunks_of(shape);
  const bool rest = last && shape.neurons % kLanes<typename Convert<scalar_t>::acc_t> != 0;
  return std::is_same_v<scalar_t, Half> || rest;
}

void copy_row(const Half* from, float* to, int n);
void copy_row(const float* from, Half* to, int n);
template <typename scalar_t>
void copy_row(const scalar_t* from, scalar_t* to, int n) {
  std::copy_n(from, n, to);
}

// rows_stride: see row_stride.
template <typename scalar_t>
void stage(const scalar_t* from, int64_t stride, int64_t timesteps, int n, kernel_t<scalar_t>* rows,
           int64_t rows_stride) {
  for (int64_t t = 0; t < timesteps; ++t, rows += rows_stride) {
    copy_row(from + t * stride, rows, n);
    std::fill(rows + n, rows + whole_vectors<scalar_t>(n), kernel_t<scalar_t>{});
  }
}
template <typename scalar_t>
void unstage(const kernel_t<scalar_t>* rows, int64_t rows_stride, int64_t timesteps, int n, scalar_t* to,
             int64_t stride) {
  for (int64_t t = 0; t < timesteps; ++t) copy_row(rows + t * rows_stride, to + t * stride, n);
}

}  // namespace iirsnn
