// Neurons of one channel lie in rows (inner > 1), or channels are innermost (inner = 1). The sums of a row are held in
// registers; those of columns in a row of sums, one a channel, that stays in the L1 cache; where neither is as wide as
// a vector, each neuron's are stored first. Sums come in one order on every instruction set and for any number of
// threads.
#include "lif/cpu/bn_lif_cpu.h"

#include <limits>
#include <memory>

#include "lif/cpu/cpu_lif.h"

namespace iirsnn {
namespace {

constexpr int kLanes = kVectorBytes / sizeof(float);
constexpr int kDoubles = kVectorBytes / sizeof(double);
constexpr int kHeldBlocks = 8;  // whose sums over columns are floats

bool in_columns(const LifShape& shape) {
  return shape.inner == 1 && shape.channels % kLanes == 0 && shape.channels <= kBlock;
}

template <typename F>
void dispatch(DType dtype, F f) {
  if (dtype == DType::float32) return f(float());
  f(BFloat16());
}

// ---- Statistics ----

// kDoubles numbers as doubles.
template <int kBytes>
struct Doubles {
  using V = Lanes<double, kBytes>;
  using Floats = typename Lanes<float, kBytes / 2>::Register;
  using Bits = typename Lanes<uint32_t, kBytes / 2>::Register;
  using Halves = typename Lanes<uint16_t, kBytes / 4>::Register;

  static IIRSNN_INLINE V load(const float* from) {
    V value;
    for (int k = 0; k < V::kRegisters; ++k) {
      Floats floats;
      memcpy(&floats, from + k * (kBytes / 8), sizeof(floats));
      value.r[k] = __builtin_convertvector(floats, typename V::Register);
    }
    return value;
  }
  static IIRSNN_INLINE V load(const BFloat16* from) {
    V value;
    for (int k = 0; k < V::kRegisters; ++k) {
      Halves halves;
      memcpy(&halves, from + k * (kBytes / 8), sizeof(halves));
      const Bits bits = __builtin_convertvector(halves, Bits) << 16;
      Floats floats;
      memcpy(&floats, &bits, sizeof(floats));
      value.r[k] = __builtin_convertvector(floats, typename V::Register);
    }
    return value;
  }
};

// n neurons, from x on; adds to totals and squares.
template <typename scalar_t>
struct Moments {
  const scalar_t* x;
  int64_t x_stride, timesteps;
  int n;
  int channels;  // of a column
  double* totals;
  double* squares;
};

template <typename scalar_t>
struct RowMoments {  // of one channel
  template <int kBytes>
  static IIRSNN_INLINE void run(const Moments<scalar_t>* b) {
    using V = Lanes<double, kBytes>;
    V total = V(0.0), square = V(0.0);
    double rest_total = 0, rest_square = 0;
    for (int64_t t = 0; t < b->timesteps; ++t) {
      const scalar_t* x = b->x + t * b->x_stride;
      int i = 0;
      for (; i + kDoubles <= b->n; i += kDoubles) {
        const V value = Doubles<kBytes>::load(x + i);
        total = total + value;
        square = square + value * value;
      }
      for (; i < b->n; ++i) {
        const double value = to_acc(x[i]);
        rest_total += value;
        rest_square += value * value;
      }
    }
    *b->totals += sum(total) + rest_total;
    *b->squares += sum(square) + rest_square;
  }
};

template <typename scalar_t>
struct ColumnMoments {  // of kDoubles channels
  template <int kBytes>
  static IIRSNN_INLINE void run(const Moments<scalar_t>* b) {
    using V = Lanes<double, kBytes>;
    V total = load<V>(b->totals), square = load<V>(b->squares);
    for (int64_t t = 0; t < b->timesteps; ++t) {
      const scalar_t* x = b->x + t * b->x_stride;
      for (int i = 0; i < b->n; i += b->channels) {
        __builtin_prefetch(x + i + kBlock);  // of the next block: a column is no stream that a processor sees
        const V value = Doubles<kBytes>::load(x + i);
        total = total + value;
        square = square + value * value;
      }
    }
    store(b->totals, total);
    store(b->squares, square);
  }
};

template <typename scalar_t>
struct PositionMoments {  // each its own sums
  template <int kBytes>
  static IIRSNN_INLINE void run(const Moments<scalar_t>* b) {
    double *totals = b->totals, *squares = b->squares;
    for (int64_t t = 0; t < b->timesteps; ++t) {
      const scalar_t* x = b->x + t * b->x_stride;
      IIRSNN_VECTORIZE
      for (int i = 0; i < b->n; ++i) {
        const double value = to_acc(x[i]);
        totals[i] += value;
        squares[i] += value * value;
      }
    }
  }
};

template <typename scalar_t>
void moments(const LifShape& shape, const scalar_t* x, double* sums, int64_t first_chunk, int64_t last_chunk) {
  const auto row = version<RowMoments<scalar_t>>();
  const auto column = version<ColumnMoments<scalar_t>>();
  const auto positions = version<PositionMoments<scalar_t>>();
  const int64_t channels = shape.channels, inner = shape.inner;
  const bool columns = in_columns(shape), rows = channels == 1 || inner >= kDoubles;
  // positions repeat after a number of neurons that holds every channel and is long enough for vectors
  const int64_t period = channels * inner, repeat = period * std::max<int64_t>(1, kBlock / period);
  std::vector<double> table(columns || rows ? 0 : kMoments * repeat);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    double *totals = sums + chunk * kMoments * channels, *squares = totals + channels;
    std::fill(table.begin(), table.end(), 0.0);
    for_each_block(shape, chunk, chunk + 1, kBlock, [&](int64_t begin, int n, int64_t) {
      Moments<scalar_t> block{x + begin, shape.x_stride_t, shape.timesteps, n, int(channels), totals, squares};
      if (columns) {
        for (int i = 0; i < n && i < channels; i += kDoubles) {
          const int64_t channel = (begin + i) % channels;
          block.x = x + begin + i;
          block.n = n - i;
          block.totals = totals + channel;
          block.squares = squares + channel;
          column(&block);
        }
      } else if (rows) {
        for_each_row(shape, begin, n, [&](int first, int last, int64_t channel) {
          block.x = x + begin + first;
          block.n = last - first;
          block.totals = totals + channel;
          block.squares = squares + channel;
          row(&block);
        });
      } else {
        for (int first = 0; first < n; first += block.n) {
          const int64_t at = (begin + first) % repeat;
          block.x = x + begin + first;
          block.n = int(std::min<int64_t>(n - first, repeat - at));
          block.totals = table.data() + at;
          block.squares = block.totals + repeat;
          positions(&block);
        }
      }
    });
    for (int64_t i = 0; i < int64_t(table.size()) / kMoments; ++i) {
      totals[i / inner % channels] += table[i];
      squares[i / inner % channels] += table[repeat + i];
    }
  }
}

// ---- What the kernels read of a channel ----

enum { kThreshold, kLeak, kInverse, kGain, kShift, kMean, kParameters };
using BnLifParameters = Parameters<float, kParameters>;

class BnLifChannels {
 public:
  explicit BnLifChannels(const BnLif& args)
      : derived_(derived(args)), values_(values(args, derived_.data())), pieces(args.shape, values_) {}

 private:
  using Values = std::array<const float*, kParameters>;
  // A NaN that `rounded` leaves one: its lower half is 0, as in every product with a bfloat16 that is NaN.
  static float quiet(float value) { return value == value ? value : std::numeric_limits<float>::quiet_NaN(); }
  static std::vector<float> derived(const BnLif& args) {  // gain, shift, 1 / threshold
    const int64_t channels = args.shape.channels;
    std::vector<float> table(3 * channels);
    for (int64_t c = 0; c < channels; ++c) {
      const float gain = args.weight ? args.rstd[c] * args.weight[c] : args.rstd[c];
      table[c] = quiet(gain);
      table[channels + c] = quiet((args.bias ? args.bias[c] : 0.0f) - args.mean[c] * gain);
      table[2 * channels + c] = 1.0f / args.threshold[c];
    }
    return table;
  }
  static Values values(const BnLif& args, const float* derived) {
    const int64_t channels = args.shape.channels;
    return {args.threshold, args.leak, derived + 2 * channels, derived, derived + channels, args.mean};
  }
  const std::vector<float> derived_;
  const Values values_;

 public:
  const Channels<float, kParameters> pieces;
};

// Rounded to scalar_t, as a current in memory would be; of a NaN, its lower half is 0.
template <typename scalar_t, typename V>
IIRSNN_INLINE V rounded(const V& value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    using Bits = typename Number<V>::bits_t;
    const Bits bits = bit_cast<Bits>(value);
    return bit_cast<V>((bits + Bits(0x7fffu) + ((bits >> 16) & Bits(1u))) & Bits(0xffff0000u));
  } else {
    return value;
  }
}

// As for_each_block, from the last chunk to the first: what the pass before read last is still in the cache.
template <typename F>
void for_each_block_back(const LifShape& shape, int64_t first_chunk, int64_t last_chunk, F f) {
  for (int64_t chunk = last_chunk - 1; chunk >= first_chunk; --chunk)
    for_each_block(shape, chunk, chunk + 1, kBlock, f);
}

// Neurons [begin, begin + n): pointers to the first of them at t = 0.
template <typename scalar_t>
struct BnLifBlock {
  const BnLif* args;
  const BnLifChannels* channels;
  int64_t begin;
  const scalar_t* x;
  scalar_t* s;
  const scalar_t* grad_s;
  scalar_t* grad_x;
  float* checkpoints;     // one vector in kSegment timesteps, but for the first
  float (*held)[kBlock];  // [kBnLifSums]: of the neurons, or of channels in columns
  bool columns;
  double* totals;  // [kBnLifSums, C] of this chunk, added to
};

template <typename V>
IIRSNN_INLINE Neuron<V> neuron_at(const BnLifParameters& p, int k, double v_reset) {
  return {load<V>(p.at[kThreshold] + k), load<V>(p.at[kInverse] + k), load<V>(p.at[kLeak] + k), V(float(v_reset))};
}

// ---- Forward ----

template <typename scalar_t, Reset kReset, bool kSingle>
struct ForwardRow {  // kSingle: T = 1
  using Block = BnLifBlock<scalar_t>;
  using acc_t = float;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<float, kBytes>;
    b->channels->pieces.for_each_piece(b->begin, first, last,
                                       [&](int i, int end, const auto& p, int64_t) IIRSNN_INLINE_LAMBDA {
                                         for (; i < end; i += sizeof(V) / sizeof(float)) neurons<V>(*b, i, p);
                                       });
  }

 private:
  template <typename V>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const BnLifParameters& p) {
    const int k = p.step * i;
    const V gain = load<V>(p.at[kGain] + k), shift = load<V>(p.at[kShift] + k);
    const Neuron<V> neuron = neuron_at<V>(p, k, b.args->v_reset);
    const scalar_t* x = b.x + i;
    scalar_t* s = b.s + i;
    V h = rounded<scalar_t>(load<V>(x) * gain + shift);
    Memory<V>::store_spike(s, spike(h, neuron.threshold));
    if constexpr (kSingle) return;
    V v = discharge<kReset>(h, neuron);
    for (int64_t t = 1; t < b.args->shape.timesteps; ++t) {
      x += b.args->shape.x_stride_t;
      s += b.args->shape.neurons;
      h = charge<kReset>(rounded<scalar_t>(load<V>(x) * gain + shift), v, neuron);
      Memory<V>::store_spike(s, spike(h, neuron.threshold));
      v = discharge<kReset>(h, neuron);
    }
  }
};

// ---- Backward ----

template <typename scalar_t, Reset kReset, bool kSingle>
struct BackwardRow {  // kSingle: T = 1, without membrane, reset, carry and leak
  using Block = BnLifBlock<scalar_t>;
  using acc_t = float;
  static constexpr int kSums = kSingle ? kLeakSum : kBnLifSums;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<float, kBytes>;
    constexpr int kSize = sizeof(V) / sizeof(float);
    const int channels = int(b->args->shape.channels);
    const auto& pieces = b->channels->pieces;
    pieces.for_each_piece(b->begin, first, last,
                          [&](int i, int end, const auto& p, int64_t channel) IIRSNN_INLINE_LAMBDA {
                            const int start = i;
                            int column = int((b->begin + i) % channels);
                            V sums[kSums];
                            for (int k = 0; k < kSums; ++k) sums[k] = V(0.0f);
                            for (; i < end; i += kSize) {
                              neurons<V>(*b, i, p, sums);
                              if (channel >= 0) continue;
                              for (int k = 0; k < kSums; ++k) {
                                float* held = b->held[k] + (b->columns ? column : i);
                                store(held, b->columns ? load<V>(held) + sums[k] : sums[k]);
                                sums[k] = V(0.0f);
                              }
                              column += kSize;
                              if (column == channels) column = 0;
                            }
                            if (channel >= 0) {
                              for (int k = 0; k < kSums; ++k) b->totals[k * channels + channel] += double(sum(sums[k]));
                            } else if (!b->columns) {
                              pieces.template add_up<V>(b->begin, start, end, kSums, b->held, b->totals);
                            }
                          });
  }

 private:
  template <typename V>
  static IIRSNN_INLINE void neurons(const Block& b, int i, const BnLifParameters& p, V* sums) {
    constexpr int kSize = sizeof(V) / sizeof(float);
    const LifShape& shape = b.args->shape;
    const int k = p.step * i;
    const V zero = V(0.0f), scale = V(float(b.args->surrogate_scale)), mean = load<V>(p.at[kMean] + k);
    const V gain = load<V>(p.at[kGain] + k), shift = load<V>(p.at[kShift] + k);
    const Neuron<V> neuron = neuron_at<V>(p, k, b.args->v_reset);
    Carry<V> carry{zero, zero};
    const auto step = [&](const V& x, const scalar_t* grad_s, scalar_t* grad_x, const V& h,
                          const V& v) IIRSNN_INLINE_LAMBDA {
      const V slope = slope_at(b.args->surrogate, h, neuron, scale);
      const StepGrad<V> grad = backward_step<kReset>(load<V>(grad_s), h, v, slope, neuron, b.args->detach_reset, carry);
      store(grad_x, grad.x);
      sums[kGradSum] = sums[kGradSum] + grad.x;
      sums[kDotSum] = sums[kDotSum] + grad.x * (x - mean);
      sums[kThresholdSum] = sums[kThresholdSum] + grad.threshold;
      if constexpr (!kSingle) sums[kLeakSum] = sums[kLeakSum] + grad.leak;
    };
    const scalar_t* x = b.x + i;
    if constexpr (kSingle) {
      const V value = load<V>(x);
      step(value, b.grad_s + i, b.grad_x + i, rounded<scalar_t>(value * gain + shift), zero);
      return;
    }
    const int64_t last_segment = (shape.timesteps - 1) / kSegment;
    V v = zero, start[kSegment], membrane[kSegment];
    for (int64_t t = 0; t < last_segment * kSegment; ++t, x += shape.x_stride_t) {
      if (t % kSegment == 0) store(b.checkpoints + t / kSegment * kSize, v);
      v = discharge<kReset>(charge<kReset>(rounded<scalar_t>(load<V>(x) * gain + shift), v, neuron), neuron);
    }
    const scalar_t* grad_s = b.grad_s + (shape.timesteps - 1) * b.args->grad_s_stride_t + i;
    scalar_t* grad_x = b.grad_x + (shape.timesteps - 1) * shape.neurons + i;
    for (int64_t segment = last_segment;;) {
      const int length = int(std::min<int64_t>(kSegment, shape.timesteps - segment * kSegment));
      for (int t = 0; t < length; ++t, x += shape.x_stride_t) {
        start[t] = v;
        membrane[t] = charge<kReset>(rounded<scalar_t>(load<V>(x) * gain + shift), v, neuron);
        v = discharge<kReset>(membrane[t], neuron);
      }
      for (int t = length - 1; t >= 0; --t, grad_s -= b.args->grad_s_stride_t, grad_x -= shape.neurons) {
        x -= shape.x_stride_t;
        step(load<V>(x), grad_s, grad_x, membrane[t], start[t]);
      }
      if (segment-- == 0) break;
      v = load<V>(b.checkpoints + segment * kSize);
      x -= kSegment * shape.x_stride_t;
    }
  }
};

// grad_x = gain (g - mean(g) - x_hat mean(g x_hat)), where g, the gradient of the current, is what grad_x holds.
enum { kGradMean, kSlope, kInputMean, kInputGain, kGradParameters };

template <typename scalar_t>
struct GradBlock {
  const LifShape* shape;
  const Channels<float, kGradParameters>* channels;
  int64_t begin;
  const scalar_t* x;
  scalar_t* grad_x;
};

template <typename scalar_t>
struct GradRow {
  using Block = GradBlock<scalar_t>;
  using acc_t = float;

  template <int kBytes>
  static IIRSNN_INLINE void run(const Block* b, int first, int last) {
    using V = Vector<float, kBytes>;
    b->channels->for_each_piece(b->begin, first, last,
                                [&](int i, int end, const auto& p, int64_t) IIRSNN_INLINE_LAMBDA {
                                  for (; i < end; i += sizeof(V) / sizeof(float)) {
                                    const int k = p.step * i;
                                    const V grad_mean = load<V>(p.at[kGradMean] + k), slope = load<V>(p.at[kSlope] + k);
                                    const V mean = load<V>(p.at[kInputMean] + k), gain = load<V>(p.at[kInputGain] + k);
                                    for (int64_t t = 0; t < b->shape->timesteps; ++t) {
                                      scalar_t* grad_x = b->grad_x + t * b->shape->neurons + i;
                                      const V centred = load<V>(b->x + t * b->shape->x_stride_t + i) - mean;
                                      store(grad_x, (load<V>(grad_x) - grad_mean - centred * slope) * gain);
                                    }
                                  }
                                });
  }
};

// ---- Which kernel ----

template <template <typename, Reset, bool> class Row, typename scalar_t>
auto choose(const BnLif& args) {
  if (args.shape.timesteps == 1) return kernel<Row<scalar_t, Reset::none, true>>();
  return with_reset(args.reset, [](auto chosen) { return kernel<Row<scalar_t, decltype(chosen)::value, false>>(); });
}

}  // namespace

void moments_cpu(const LifShape& shape, const void* x, double* sums, int64_t first_chunk, int64_t last_chunk) {
  const int64_t size = kMoments * shape.channels;
  std::fill(sums + first_chunk * size, sums + last_chunk * size, 0.0);
  dispatch(shape.dtype, [&](auto scalar) {
    moments(shape, static_cast<const decltype(scalar)*>(x), sums, first_chunk, last_chunk);
  });
}

void add_chunks_cpu(const LifShape& shape, int count, double* sums) {
  const int64_t size = count * shape.channels, chunks = chunks_of(shape);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[chunk * size + i];
  }
}

void bn_lif_forward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  const BnLifChannels channels(args);
  dispatch(args.shape.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto row = choose<ForwardRow, scalar_t>(args);
    for_each_block_back(args.shape, first_chunk, last_chunk, [&](int64_t begin, int n, int64_t) {
      BnLifBlock<scalar_t> block{&args, &channels, begin};
      block.x = static_cast<const scalar_t*>(args.x) + begin;
      block.s = static_cast<scalar_t*>(args.s) + begin;
      row(block, n);
    });
  });
}

void bn_lif_backward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  const LifShape& shape = args.shape;
  const BnLifChannels channels(args);
  std::vector<float> checkpoints((shape.timesteps - 1) / kSegment * kLanes);
  const auto held = std::make_unique<float[][kBlock]>(kBnLifSums);
  const bool columns = in_columns(shape);
  const auto let_go = [&](double* totals) {
    for (int k = 0; k < kBnLifSums; ++k) {
      for (int64_t c = 0; c < shape.channels; ++c) totals[k * shape.channels + c] += double(held[k][c]);
      std::fill_n(held[k], shape.channels, 0.0f);
    }
  };
  dispatch(shape.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto row = choose<BackwardRow, scalar_t>(args);
    for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
      double* totals = args.sums + chunk * kBnLifSums * shape.channels;
      std::fill_n(totals, kBnLifSums * shape.channels, 0.0);
      int blocks = 0;
      for_each_block(shape, chunk, chunk + 1, kBlock, [&](int64_t begin, int n, int64_t) {
        BnLifBlock<scalar_t> block{&args, &channels, begin};
        block.x = static_cast<const scalar_t*>(args.x) + begin;
        block.grad_s = static_cast<const scalar_t*>(args.grad_s) + begin;
        block.grad_x = static_cast<scalar_t*>(args.grad_x) + begin;
        block.checkpoints = checkpoints.data();
        block.held = held.get();
        block.columns = columns;
        block.totals = totals;
        row(block, n);
        if (columns && ++blocks % kHeldBlocks == 0) let_go(totals);
      });
      if (columns) let_go(totals);
    }
  });
}

void bn_lif_grad_x_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  const LifShape& shape = args.shape;
  const int64_t channels = shape.channels;
  const double count = double(shape.timesteps) * double(shape.neurons / channels);
  std::vector<float> grad_mean(channels), slope(channels), gain(channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double rstd = args.rstd[c];
    grad_mean[c] = float(args.sums[kGradSum * channels + c] / count);
    slope[c] = float(args.sums[kDotSum * channels + c] / count * rstd * rstd);
    gain[c] = args.weight ? args.rstd[c] * args.weight[c] : args.rstd[c];
  }
  const Channels<float, kGradParameters> parameters(shape, {grad_mean.data(), slope.data(), args.mean, gain.data()});
  dispatch(shape.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    const auto row = kernel<GradRow<scalar_t>>();
    for_each_block_back(shape, first_chunk, last_chunk, [&](int64_t begin, int n, int64_t) {
      row({&shape, &parameters, begin, static_cast<const scalar_t*>(args.x) + begin,
           static_cast<scalar_t*>(args.grad_x) + begin},
          n);
    });
  });
}

}  // namespace iirsnn
