// The forward pass by events. A list holds those of one input row, by column and channel; an output position adds, for
// each kernel row, the weights of the events under it, which stand one after the other. Weights of one kernel row and
// one block of channels, 24 KiB, stay in the L1 cache while all positions of a chunk visit them: rows from the L2 cache
// would take twice as long as the additions.
#include <algorithm>

#include "simd/memory.h"
#include "simd/versions.h"
#include "spike/spike_plan.h"
#include "spike/spike_readers.h"
#include "spike/spike_rows.h"

namespace iirsnn::sparse {
namespace {

// The weights of a tile and a block as [kernel row][kernel column][channel of the block][kWidth], times `scale`.
template <typename scalar_t, int kWidth, int kBytes>
IIRSNN_INLINE void load_weights(const Forward& work, int64_t group, int64_t output, int64_t channel, int64_t block,
                                float scale, float* to) {
  const Conv& conv = work.conv;
  const int64_t taps = conv.kernel_h * conv.kernel_w, outputs = conv.group_outputs() - output;
  const int64_t channels = std::min(block, conv.group_channels() - channel);
  using Floats = Register<float, kBytes>;
  constexpr int L = kFloats<kBytes>;
  const scalar_t* weight = static_cast<const scalar_t*>(work.weight);
  for (int64_t tap = 0; tap < taps; ++tap, to += block * kWidth) {
    if (work.transposed) {
      const int64_t pitch = taps * conv.group_outputs();
      const scalar_t* from =
          weight + (group * conv.group_channels() + channel) * pitch + (taps - 1 - tap) * conv.group_outputs() + output;
      for (int64_t c = 0; c < channels; ++c) {
        IIRSNN_REGISTERS
        for (int64_t k = 0; k < kWidth; k += L) {
          Floats row{};
          if (k < outputs) row = load_up_to<kBytes>(from + c * pitch + k, outputs - k);
          store_register(to + c * kWidth + k, row);
        }
      }
      continue;
    }
    const int64_t pitch = taps * conv.group_channels();
    const scalar_t* from =
        weight + (group * conv.group_outputs() + output) * pitch + tap * conv.group_channels() + channel;
    const Floats factor = spread<kBytes>(scale);
    for (int64_t c = 0; c < channels; c += L) {
      for (int64_t k = 0; k < kWidth; k += L) {
        Floats rows[L];
        if (c + L <= channels && k + L <= outputs) {
          IIRSNN_REGISTERS
          for (int64_t i = 0; i < L; ++i) rows[i] = load_part<kBytes>(from + (k + i) * pitch + c) * factor;
          transpose<kBytes>(rows);
          IIRSNN_REGISTERS
          for (int64_t i = 0; i < L; ++i) store_register(to + (c + i) * kWidth + k, rows[i]);
          continue;
        }
        for (int64_t i = 0; i < L; ++i) {
          rows[i] = Floats{};
          if (k + i < outputs) rows[i] = load_up_to<kBytes>(from + (k + i) * pitch + c, channels - c) * factor;
        }
        transpose<kBytes>(rows);
        for (int64_t i = 0; i < L && c + i < channels; ++i) store_register(to + (c + i) * kWidth + k, rows[i]);
      }
    }
  }
}

// One chunk: what its lists and loops need.
struct ForwardChunk {
  int64_t first_image, images, first_row, rows;  // of the output
  int64_t in_row, in_rows;                       // of the input: rows that the chunk reads of an image
  const uint32_t* entries;                       // of all blocks and rows
  const float* values;
  const int64_t* starts;  // [group][block][image][row][column]: first entry; one more at the end
};

// Adds a block's weights to the sums [image][row][column][kWidth] of a chunk.
template <int kWidth, bool kValues, int kBytes>
IIRSNN_INLINE void add_block(const Conv& conv, const ForwardChunk& chunk, int64_t block, const int64_t* starts,
                             const float* weights, float* sums) {
  const int64_t row_bytes = kWidth * 4;
  const int64_t together = conv.dilation_w == 1 ? conv.kernel_w : 1;  // kernel columns under which events adjoin
  for (int64_t ky = 0; ky < conv.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < conv.kernel_w; kx += together) {
      const uintptr_t tap = reinterpret_cast<uintptr_t>(weights) + (ky * conv.kernel_w + kx) * block * row_bytes;
      float* sum = sums;
      for (int64_t image = 0; image < chunk.images; ++image) {
        for (int64_t y = chunk.first_row; y < chunk.first_row + chunk.rows; ++y) {
          const int64_t in_y = y * conv.stride_h - conv.padding_h + ky * conv.dilation_h;
          if (in_y < 0 || in_y >= conv.height) {
            sum += conv.out_width * kWidth;
            continue;
          }
          const int64_t* start = starts + (image * chunk.in_rows + in_y - chunk.in_row) * conv.width;
          int64_t left = kx * conv.dilation_w - conv.padding_w;
          for (int64_t x = 0; x < conv.out_width; ++x, left += conv.stride_w, sum += kWidth) {
            const int64_t from = std::min(std::max<int64_t>(left, 0), conv.width);
            const int64_t to = std::min(std::max<int64_t>(left + together, 0), conv.width);
            // entries count rows from column 0 of the image on
            accumulate<kWidth, 1, kValues, kBytes>(tap - left * block * row_bytes, chunk.entries, chunk.values,
                                                   start[from], start[to], sum);
          }
        }
      }
    }
  }
}

template <typename scalar_t, typename Reader, int kWidth, int kBytes>
IIRSNN_INLINE void forward_tile(const Forward& work, const ForwardPlan& plan, const ForwardChunk& chunk, int64_t group,
                                int64_t output, float* weights, float* sums) {
  const Conv& conv = work.conv;
  const int64_t positions = chunk.images * chunk.rows * conv.out_width;
  const int64_t first_output = group * conv.group_outputs() + output, outputs = conv.group_outputs() - output;
  const float scale = Reader::kValues ? 1.0f : work.source.table[1];
  const int64_t block_starts = chunk.images * chunk.in_rows * conv.width;
  constexpr int L = kFloats<kBytes>;
  Row<kWidth, kBytes> bias;
  alignas(64) float biases[kWidth] = {};
  for (int64_t k = 0; work.bias && k < kWidth && k < outputs; ++k) biases[k] = work.bias[first_output + k];
  bias.load(biases);
  for (int64_t p = 0; p < positions; ++p) bias.store(sums + p * kWidth);
  for (int64_t b = 0; b < plan.blocks; ++b) {
    load_weights<scalar_t, kWidth, kBytes>(work, group, output, b * plan.block, plan.block, scale, weights);
    add_block<kWidth, Reader::kValues, kBytes>(conv, chunk, plan.block,
                                               chunk.starts + (group * plan.blocks + b) * block_starts, weights, sums);
  }
  scalar_t* out = static_cast<scalar_t*>(work.out) + first_output;
  for (int64_t image = 0; image < chunk.images; ++image) {
    scalar_t* to =
        out + ((chunk.first_image + image) * conv.out_height + chunk.first_row) * conv.out_width * conv.outputs;
    for (int64_t p = chunk.rows * conv.out_width; p > 0; --p, to += conv.outputs, sums += kWidth) {
      if (outputs >= kWidth) {
        IIRSNN_REGISTERS
        for (int64_t k = 0; k < kWidth; k += L) {
          store_part<kBytes>(load_register<Register<float, kBytes>>(sums + k), to + k);
        }
        continue;
      }
      for (int64_t k = 0; k < kWidth && k < outputs; k += L) {
        store_up_to<kBytes>(load_register<Register<float, kBytes>>(sums + k), to + k, outputs - k);
      }
    }
  }
}

// Entries are those of rows of kTile floats; a narrower tile has rows of half the bytes.
template <typename Reader, int kBytes>
IIRSNN_INLINE int64_t list_events(const Forward& work, const ForwardPlan& plan, const ForwardChunk& chunk,
                                  uint32_t* entries, float* values, int64_t* starts) {
  const Conv& conv = work.conv;
  const Reader reader(work.source, conv.channels);
  int64_t count = 0;
  for (int64_t group = 0; group < conv.groups; ++group) {
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const int64_t first = b * plan.block, channels = std::min(plan.block, conv.group_channels() - first);
      for (int64_t image = 0; image < chunk.images; ++image) {
        const int64_t at = ((chunk.first_image + image) * conv.height + chunk.in_row) * conv.width;
        for (int64_t p = 0; p < chunk.in_rows * conv.width; ++p) {
          *starts++ = count;
          const int64_t column = p % conv.width;
          for (int64_t c = 0; c < channels; c += kWord) {
            const int64_t channel = group * conv.group_channels() + first + c;
            uint64_t bits = reader.template set<kBytes>(at + p, channel, int(std::min<int64_t>(kWord, channels - c)));
            const uint32_t base = uint32_t((column * plan.block + c) * kRowBytes);
            for (; bits; bits &= bits - 1) {
              const int bit = __builtin_ctzll(bits);
              if (Reader::kValues) values[count] = reader.value(at + p, channel + bit);
              entries[count++] = base + uint32_t(bit * kRowBytes);
            }
          }
        }
      }
    }
  }
  *starts = count;
  return count;
}

template <typename scalar_t, typename Reader>
struct ForwardLoop {
  template <int kBytes>
  static IIRSNN_INLINE void run(const Forward* work_, int64_t threads, int64_t first_unit, int64_t last_unit) {
    const Forward work = *work_;
    const Conv& conv = work.conv;
    const ForwardPlan plan = forward_plan(conv, threads);
    const int64_t rows_in =
        std::min(conv.height, (plan.rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1);
    const int64_t capacity = plan.images * rows_in * conv.width;
    const Buffer<uint32_t> entries(capacity * conv.channels);
    const Buffer<float> values(Reader::kValues ? capacity * conv.channels : 0);
    const Buffer<int64_t> starts(capacity * plan.blocks * conv.groups + 1);
    const Buffer<float> sums(plan.images * plan.rows * conv.out_width * kTile);
    const Buffer<float> weights(conv.kernel_h * conv.kernel_w * plan.block * kTile);
    const int64_t group_tiles = plan.tiles / conv.groups;
    int64_t listed = -1;
    ForwardChunk chunk{};
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t place = unit / plan.tile_parts, part = unit % plan.tile_parts;
      if (place != listed) {
        listed = place;
        chunk.first_image = place / plan.row_chunks * plan.images;
        chunk.images = std::min(plan.images, conv.images - chunk.first_image);
        chunk.first_row = place % plan.row_chunks * plan.rows;
        chunk.rows = std::min(plan.rows, conv.out_height - chunk.first_row);
        const int64_t top = chunk.first_row * conv.stride_h - conv.padding_h;
        const int64_t bottom = top + (chunk.rows - 1) * conv.stride_h + (conv.kernel_h - 1) * conv.dilation_h + 1;
        chunk.in_row = std::min(std::max<int64_t>(top, 0), conv.height);
        chunk.in_rows = std::max<int64_t>(std::min(bottom, conv.height) - chunk.in_row, 0);
        list_events<Reader, kBytes>(work, plan, chunk, entries.get(), values.get(), starts.get());
        chunk.entries = entries.get();
        chunk.values = values.get();
        chunk.starts = starts.get();
      }
      for (int64_t tile = plan.tiles * part / plan.tile_parts; tile < plan.tiles * (part + 1) / plan.tile_parts;
           ++tile) {
        forward_tile<scalar_t, Reader, kTile, kBytes>(work, plan, chunk, tile / group_tiles, tile % group_tiles * kTile,
                                                      weights.get(), sums.get());
      }
    }
  }
};

}  // namespace

void forward(const Forward& work, int64_t threads, int64_t first_unit, int64_t last_unit) {
  const bool half = work.dtype == DType::bfloat16;
  switch (work.source.kind) {
    case Kind::bits:
      return half ? run<ForwardLoop<BFloat16, BitsReader>>(&work, threads, first_unit, last_unit)
                  : run<ForwardLoop<float, BitsReader>>(&work, threads, first_unit, last_unit);
    case Kind::counts:
      return half ? run<ForwardLoop<BFloat16, CountsReader>>(&work, threads, first_unit, last_unit)
                  : run<ForwardLoop<float, CountsReader>>(&work, threads, first_unit, last_unit);
    case Kind::reals:
      return run<ForwardLoop<float, RealsReader>>(&work, threads, first_unit, last_unit);
  }
}

}  // namespace iirsnn::sparse
