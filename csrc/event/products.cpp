// Real-valued input: a dense convolution.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "event/kernels.h"
#include "simd/versions.h"

namespace iirsnn::event {
namespace {

// Sums of kPositions positions by kProducts outputs stay in registers over all taps and channels.
constexpr int kProducts = 16;

struct ProductTap {
  const float* in;       // of column `first`, in the first channel
  const float* weights;  // of the first output
  int first, last;       // columns that it reaches
};

template <int kPositions, int kBytes>
IIRSNN_INLINE void multiply(const Products& work, const ProductTap* taps, int tap_count, int x, int part, float* sums) {
  using Floats = Register<float, kBytes>;
  constexpr int kLanes = kBytes / 4, kRegisters = kProducts / kLanes;
  Floats v[kPositions][kRegisters];
  float* const at = sums + int64_t(x) * work.width + part;
  IIRSNN_REGISTERS
  for (int p = 0; p < kPositions; ++p) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[p][i] = load_register<Floats>(at + p * work.width + i * kLanes);
  }
  const int64_t column = work.column_in;
  for (int t = 0; t < tap_count; ++t) {
    const float *in = taps[t].in, *row = taps[t].weights + part;
    const int64_t from = (x - taps[t].first) * column;
    const auto add = [&](auto all) IIRSNN_INLINE_LAMBDA {
      for (int c = 0; c < work.channels; ++c, in += work.channel_in, row += work.pitch) {
        Floats w[kRegisters];
        IIRSNN_REGISTERS
        for (int i = 0; i < kRegisters; ++i) w[i] = load_register<Floats>(row + i * kLanes);
        IIRSNN_REGISTERS
        for (int p = 0; p < kPositions; ++p) {
          if (!decltype(all)::value && (x + p < taps[t].first || x + p >= taps[t].last)) continue;
          const Floats value = spread<kBytes>(in[from + p * column]);
          IIRSNN_REGISTERS
          for (int i = 0; i < kRegisters; ++i) v[p][i] += w[i] * value;
        }
      }
    };
    if (taps[t].first <= x && x + kPositions <= taps[t].last) {
      add(std::true_type());
    } else {
      add(std::false_type());
    }
  }
  IIRSNN_REGISTERS
  for (int p = 0; p < kPositions; ++p) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) store_register(at + p * work.width + i * kLanes, v[p][i]);
  }
}

struct ProductLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Products* work_) {
    const Products work = *work_;
    constexpr int kPositions = kBytes == 64 ? 8 : kBytes == 32 ? 4 : 2;
    std::vector<ProductTap> taps(work.tap_count);
    int rows = 0;
    for (int t = 0; t < work.tap_count; ++t) {
      rows = std::max(rows, int(work.taps[t].out / work.row_out) + work.taps[t].rows);
    }
    for (int64_t image = 0; image < work.images; ++image) {
      for (int y = 0; y < rows; ++y) {
        float* sums = work.sums + (image * work.image_out + y * work.row_out) * int64_t(work.width);
        int count = 0, left = 1 << 30, right = 0;  // columns of any tap
        for (int t = 0; t < work.tap_count; ++t) {
          const Tap& tap = work.taps[t];
          const int top = int(tap.out / work.row_out), begin = int(tap.out % work.row_out);
          if (y < top || y >= top + tap.rows || tap.columns == 0) continue;
          taps[count++] = {work.image + tap.in + image * work.image_in + (y - top) * work.row_in +
                               work.first_channel * work.channel_in,
                           work.weights + int64_t(t) * work.channels * work.pitch, begin, begin + tap.columns};
          left = std::min(left, begin);
          right = std::max(right, begin + tap.columns);
        }
        for (int part = 0; part < work.width; part += kProducts) {
          int x = left;
          for (; x + kPositions <= right; x += kPositions) {
            multiply<kPositions, kBytes>(work, taps.data(), count, x, part, sums);
          }
          for (; x < right; ++x) multiply<1, kBytes>(work, taps.data(), count, x, part, sums);
        }
      }
    }
  }
};

}  // namespace

void add_products(const Products& work) { run<ProductLoop>(&work); }

}  // namespace iirsnn::event
