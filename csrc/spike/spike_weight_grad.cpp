// The weight gradient by events. A list holds those of one channel, by row and column; a weight adds the gradient at
// each event, shifted. The gradient of a chunk of positions, 24 KiB, stays in the L1 cache while all channels of a
// block visit it.
#include <algorithm>

#include "simd/memory.h"
#include "simd/versions.h"
#include "spike/spike_plan.h"
#include "spike/spike_readers.h"
#include "spike/spike_rows.h"

namespace iirsnn::sparse {
namespace {

// The events of a block's channels in some images: entries in bytes from the gradient of an output position.
struct ChannelLists {
  int64_t capacity;  // of a channel
  uint32_t* entries;
  float* values;
  uint32_t* starts;  // [row][remainder of the column by the stride][channel], one more row at the end
};

// Events in the order of row, remainder of the column, image, column, so that those under one tap adjoin.
template <typename Reader, int kBytes>
IIRSNN_INLINE void list_channels(const WeightGrad& work, const GradPlan& plan, int64_t channel, int64_t channels,
                                 int64_t first_image, int64_t images, const ChannelLists& lists) {
  const Conv& conv = work.conv;
  const Reader reader(work.source, conv.channels);
  uint32_t counts[kGradBlock] = {};
  uint32_t* start = lists.starts;
  for (int64_t y = 0; y < conv.height; ++y) {
    for (int64_t remainder = 0; remainder < conv.stride_w; ++remainder, start += kGradBlock) {
      std::memcpy(start, counts, sizeof(counts));
      for (int64_t image = 0; image < images; ++image) {
        const int64_t at = ((first_image + image) * conv.height + y) * conv.width;
        const int64_t row = (y / conv.stride_h * images + image) * plan.pitch;
        for (int64_t x = remainder; x < conv.width; x += conv.stride_w) {
          const uint32_t entry = uint32_t((row + x / conv.stride_w) * kRowBytes);
          for (uint64_t bits = reader.template set<kBytes>(at + x, channel, int(channels)); bits; bits &= bits - 1) {
            const int bit = __builtin_ctzll(bits);
            const int64_t to = bit * lists.capacity + counts[bit]++;
            lists.entries[to] = entry;
            if (Reader::kValues) lists.values[to] = reader.value(at + x, channel + bit);
          }
        }
      }
    }
  }
  std::memcpy(start, counts, sizeof(counts));
}

// The sums [channel][kernel row][kernel column][kTile] of a tile get the gradients of one chunk of output rows.
template <bool kValues, int kBytes>
IIRSNN_INLINE void add_gradients(const Conv& conv, const GradPlan& plan, const ChannelLists& lists, int64_t channels,
                                 int64_t images, int64_t first_row, int64_t rows, uintptr_t grad, float* sums) {
  const bool adjoin = conv.stride_h == 1 && conv.stride_w == 1;
  const int64_t most = adjoin && conv.dilation_w == 1 ? 3 : 1;  // taps whose events are the same
  for (int64_t ky = 0; ky < conv.kernel_h; ++ky) {
    const int64_t offset =
        ky * conv.dilation_h - conv.padding_h;  // from an output row times the stride to its input row
    const int64_t from = std::max(first_row, ceil_div(std::max<int64_t>(-offset, 0), conv.stride_h));
    const int64_t to = std::min(first_row + rows, floor_div(conv.height - 1 - offset, conv.stride_h) + 1);
    if (from >= to) continue;
    const int64_t shift_y = -floor_div(offset, conv.stride_h);
    for (int64_t kx = 0; kx < conv.kernel_w;) {
      const int64_t taps = std::min(most, conv.kernel_w - kx);
      const int64_t column = kx * conv.dilation_w - conv.padding_w;
      const int64_t remainder = mod(column, conv.stride_w), shift_x = -floor_div(column, conv.stride_w);
      const uintptr_t rows_at = grad + ((shift_y - first_row) * images * plan.pitch + shift_x) * kRowBytes;
      for (int64_t c = 0; c < channels; ++c) {
        float* sum = sums + ((c * conv.kernel_h + ky) * conv.kernel_w + kx) * kTile;
        const uint32_t* entries = lists.entries + c * lists.capacity;
        const float* values = lists.values + (kValues ? c * lists.capacity : 0);
        const uint32_t* starts = lists.starts + remainder * kGradBlock + c;
        const int64_t step = conv.stride_w * kGradBlock;
        if (adjoin) {
          const int64_t first = starts[(from + offset) * step], last = starts[(to + offset) * step];
          if (taps == 3) {
            accumulate<kTile, 3, kValues, kBytes>(rows_at, entries, values, first, last, sum);
          } else if (taps == 2) {
            accumulate<kTile, 2, kValues, kBytes>(rows_at, entries, values, first, last, sum);
          } else {
            accumulate<kTile, 1, kValues, kBytes>(rows_at, entries, values, first, last, sum);
          }
        } else {
          for (int64_t y = from; y < to; ++y) {
            const uint32_t* start = starts + (y * conv.stride_h + offset) * step;
            accumulate<kTile, 1, kValues, kBytes>(rows_at, entries, values, start[0], start[kGradBlock], sum);
          }
        }
      }
      kx += taps;
    }
  }
}

// [channel][kernel position][kTile] of `count` copies, added up and times `scale`, to the weight's gradient.
template <typename scalar_t, int kBytes>
IIRSNN_INLINE void write_tile(const WeightGrad& work, int64_t group, int64_t channel, int64_t output, const float* sums,
                              int64_t count, int64_t copy, float scale) {
  const Conv& conv = work.conv;
  const int64_t taps = conv.kernel_h * conv.kernel_w, pitch = taps * conv.group_channels();
  const int64_t channels = std::min(kGradBlock, conv.group_channels() - channel);
  const int64_t outputs = std::min<int64_t>(kTile, conv.group_outputs() - output);
  scalar_t* grad_weight =
      static_cast<scalar_t*>(work.grad_weight) + (group * conv.group_outputs() + output) * pitch + channel;
  for (int64_t tap = 0; tap < taps; ++tap) {
    using Floats = Register<float, kBytes>;
    constexpr int L = kFloats<kBytes>;
    const Floats factor = spread<kBytes>(scale);
    for (int64_t c = 0; c < channels; c += L) {
      for (int64_t k = 0; k < outputs; k += L) {
        Floats rows[L];
        const bool full = c + L <= channels;
        IIRSNN_REGISTERS
        for (int64_t i = 0; i < L; ++i) {
          rows[i] = Floats{};
          if (!full && c + i >= channels) continue;
          const float* from = sums + ((c + i) * taps + tap) * kTile + k;
          for (int64_t s = 0; s < count; ++s) rows[i] += load_register<Floats>(from + s * copy);
          rows[i] *= factor;
        }
        transpose<kBytes>(rows);
        for (int64_t i = 0; i < L && k + i < outputs; ++i) {
          store_up_to<kBytes>(rows[i], grad_weight + (k + i) * pitch + tap * conv.group_channels() + c, channels - c);
        }
      }
    }
  }
}

template <typename scalar_t, typename Reader>
struct WeightGradLoop {
  // A unit is a split of the images and a block of channels.
  template <int kBytes>
  static IIRSNN_INLINE void run(const WeightGrad* work_, int64_t first_unit, int64_t last_unit) {
    const WeightGrad work = *work_;
    const Conv& conv = work.conv;
    const GradPlan plan = grad_plan(conv);
    const int64_t taps = conv.kernel_h * conv.kernel_w, positions = conv.height * conv.width;
    const int64_t tile_floats = kGradBlock * taps * kTile, block_floats = plan.tiles * tile_floats;
    ChannelLists lists{};
    lists.capacity = plan.images * positions;
    const Buffer<uint32_t> entries(kGradBlock * lists.capacity);
    const Buffer<float> values(Reader::kValues ? kGradBlock * lists.capacity : 0);
    const Buffer<uint32_t> starts((conv.height * conv.stride_w + 1) * kGradBlock);
    const Buffer<float> own(work.splits > 1 ? 0 : block_floats);
    const int64_t grad_floats = (plan.images * plan.rows * plan.pitch + 2 * plan.left) * kTile;
    const Buffer<float> grads(grad_floats);
    lists.entries = entries.get();
    lists.values = values.get();
    lists.starts = starts.get();
    std::memset(grads.get(), 0, grad_floats * sizeof(float));
    const float scale = Reader::kValues ? 1.0f : work.source.table[1];

    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t all_blocks = conv.groups * plan.blocks, split = unit / all_blocks;
      const int64_t group = unit % all_blocks / plan.blocks, channel = unit % plan.blocks * kGradBlock;
      const int64_t channels = std::min(kGradBlock, conv.group_channels() - channel);
      float* sums = work.splits > 1 ? work.partials + unit * block_floats : own.get();
      std::memset(sums, 0, block_floats * sizeof(float));
      for (int64_t u = plan.units * split / work.splits; u < plan.units * (split + 1) / work.splits; ++u) {
        const int64_t first_image = u * plan.images, images = std::min(plan.images, conv.images - first_image);
        list_channels<Reader, kBytes>(work, plan, group * conv.group_channels() + channel, channels, first_image,
                                      images, lists);
        for (int64_t tile = 0; tile < plan.tiles; ++tile) {
          const int64_t output = tile * kTile, outputs = conv.group_outputs() - output;
          for (int64_t row = 0; row < conv.out_height; row += plan.rows) {
            const int64_t rows = std::min(plan.rows, conv.out_height - row);
            float* to = grads.get() + plan.left * kTile;
            for (int64_t y = 0; y < rows; ++y) {
              for (int64_t image = 0; image < images; ++image, to += plan.pitch * kTile) {
                const scalar_t* from =
                    static_cast<const scalar_t*>(work.grad) +
                    ((first_image + image) * conv.out_height + row + y) * conv.out_width * conv.outputs +
                    group * conv.group_outputs() + output;
                for (int64_t x = 0; x < conv.out_width; ++x, from += conv.outputs) {
                  IIRSNN_REGISTERS
                  for (int64_t k = 0; k < kTile; k += kFloats<kBytes>) {
                    Register<float, kBytes> value{};
                    if (k < outputs) value = load_up_to<kBytes>(from + k, outputs - k);
                    store_register(to + x * kTile + k, value);
                  }
                }
              }
            }
            add_gradients<Reader::kValues, kBytes>(conv, plan, lists, channels, images, row, rows,
                                                   reinterpret_cast<uintptr_t>(grads.get() + plan.left * kTile),
                                                   sums + tile * tile_floats);
          }
        }
      }
      if (work.splits > 1) continue;
      for (int64_t tile = 0; tile < plan.tiles; ++tile) {
        write_tile<scalar_t, kBytes>(work, group, channel, tile * kTile, sums + tile * tile_floats, 1, 0, scale);
      }
    }
  }
};

template <typename scalar_t>
struct FinishLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const WeightGrad* work_, int64_t first_unit, int64_t last_unit) {
    const WeightGrad work = *work_;
    const Conv& conv = work.conv;
    const GradPlan plan = grad_plan(conv);
    const int64_t tile_floats = kGradBlock * conv.kernel_h * conv.kernel_w * kTile;
    const float scale = work.source.kind == Kind::bits ? work.source.table[1] : 1.0f;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t block = unit / plan.tiles, tile = unit % plan.tiles;
      write_tile<scalar_t, kBytes>(work, block / plan.blocks, block % plan.blocks * kGradBlock, tile * kTile,
                                   work.partials + unit * tile_floats, work.splits,
                                   conv.groups * plan.blocks * plan.tiles * tile_floats, scale);
    }
  }
};

}  // namespace

void weight_grad(const WeightGrad& work, int64_t first_unit, int64_t last_unit) {
  const bool half = work.dtype == DType::bfloat16;
  if (work.source.kind == Kind::counts) {
    return half ? run<WeightGradLoop<BFloat16, CountsReader>>(&work, first_unit, last_unit)
                : run<WeightGradLoop<float, CountsReader>>(&work, first_unit, last_unit);
  }
  half ? run<WeightGradLoop<BFloat16, BitsReader>>(&work, first_unit, last_unit)
       : run<WeightGradLoop<float, BitsReader>>(&work, first_unit, last_unit);
}

void weight_grad_finish(const WeightGrad& work, int64_t first_unit, int64_t last_unit) {
  work.dtype == DType::bfloat16 ? run<FinishLoop<BFloat16>>(&work, first_unit, last_unit)
                                : run<FinishLoop<float>>(&work, first_unit, last_unit);
}

}  // namespace iirsnn::sparse
