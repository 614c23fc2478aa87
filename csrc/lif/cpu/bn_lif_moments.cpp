// Sums over x and its square. Neurons of one channel lie in rows, whose sums are held in registers; or channels are
// innermost, in columns whose sums stay in the L1 cache; where neither is as wide as a vector, each neuron has its own.
#include <vector>

#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/channels.h"
#include "simd/sums.h"
#include "simd/versions.h"

namespace iirsnn {
namespace {

constexpr int kDoubles = kVectorBytes / sizeof(double);

bool in_columns(const LifShape& shape) {
  return shape.inner == 1 && shape.channels % kDoubles == 0 && shape.channels <= kBlock;
}

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
      value.r[k] = doubles_of<kBytes>(floats);
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
      value.r[k] = doubles_of<kBytes>(floats);
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
    for_each_block(shape, chunk, [&](const Range& range) {
      const int64_t begin = range.begin;
      const int n = range.n;
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
        for_each_channel(shape, begin, n, [&](int first, int last, int64_t channel) {
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

}  // namespace

void moments_cpu(const LifShape& shape, const void* x, double* sums, int64_t first_chunk, int64_t last_chunk) {
  const int64_t size = kMoments * shape.channels;
  std::fill(sums + first_chunk * size, sums + last_chunk * size, 0.0);
  if (shape.dtype == DType::float32) return moments(shape, static_cast<const float*>(x), sums, first_chunk, last_chunk);
  moments(shape, static_cast<const BFloat16*>(x), sums, first_chunk, last_chunk);
}

void moments_finish_cpu(const LifShape& shape, double* sums) { add_sums(shape, Walk::blocks, kMoments, sums); }

}  // namespace iirsnn
