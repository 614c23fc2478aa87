// Both products are made of the same step: for each event of a list, add a row of 16 or 32 floats to sums in registers.
//
// Forward: a list holds the events of one input row, by column and channel; an output position adds, for each kernel
// row, the weights of the events under it, which stand one after the other. Weights of one kernel row and one block of
// channels, 24 KiB, stay in the L1 cache while all positions of a chunk visit them.
//
// Weight gradient: a list holds the events of one channel, by row and column; a weight adds the gradient at each event,
// shifted. The gradient of a chunk of positions, 24 KiB, stays in the L1 cache while all channels of a block visit it.
//
// Rows from the L2 cache would take twice as long as the additions.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "simd/versions.h"
#include "spike/spike.h"

namespace iirsnn::sparse {
namespace {

constexpr int kTile = 32;                 // outputs of a row
constexpr int64_t kCached = 24 << 10;     // bytes of rows to keep in the L1 cache
constexpr int64_t kChunk = 1024;          // output positions whose sums stay in the L2 cache
constexpr int64_t kRowBytes = kTile * 4;  // of a whole row
constexpr int64_t kGradBlock = kWord;     // channels of a block of the weight gradient

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }
int64_t mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

// 64-byte aligned, uninitialised.
template <typename item_t>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<item_t*>(std::aligned_alloc(64, ceil_div(count * sizeof(item_t) + 1, 64) * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  item_t* get() const { return data_; }
  item_t& operator[](int64_t i) const { return data_[i]; }

 private:
  item_t* data_;
};

// ---- Reading events ----

struct BitsReader {
  static constexpr bool kValues = false;
  const uint64_t* data;
  int64_t words;
  IIRSNN_INLINE BitsReader(const Source& source, int64_t channels)
      : data(static_cast<const uint64_t*>(source.data)), words((channels + kWord - 1) / kWord) {}
  // Bit i: channel first + i of a position is not zero; count <= 64.
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const uint64_t* at = data + position * words + first / kWord;
    const int shift = first % kWord;
    uint64_t bits = *at >> shift;
    if (shift && shift + count > kWord) bits |= at[1] << (kWord - shift);
    return count < kWord ? bits & ((uint64_t(1) << count) - 1) : bits;
  }
  IIRSNN_INLINE float value(int64_t, int64_t) const { return 1.0f; }
};

struct CountsReader {
  static constexpr bool kValues = true;
  const uint8_t* data;
  const float* table;
  int64_t channels;
  IIRSNN_INLINE CountsReader(const Source& source, int64_t channels)
      : data(static_cast<const uint8_t*>(source.data)), table(source.table), channels(channels) {}
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const uint8_t* at = data + position * channels + first;
    uint64_t bits = 0;
    for (int i = 0; i < count; i += 8) {
      uint64_t bytes = 0;
      std::memcpy(&bytes, at + i, count - i < 8 ? count - i : 8);
      constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
      const uint64_t high = (((bytes & kLow) + kLow) | bytes) & ~kLow;  // the highest bit of each byte that is not 0
      bits |= ((high >> 7) * 0x0102040810204080u >> 56) << i;
    }
    return bits;
  }
  IIRSNN_INLINE float value(int64_t position, int64_t channel) const {
    return table[data[position * channels + channel]];
  }
};

struct RealsReader {
  static constexpr bool kValues = true;
  const float* data;
  int64_t channels;
  IIRSNN_INLINE RealsReader(const Source& source, int64_t channels)
      : data(static_cast<const float*>(source.data)), channels(channels) {}
  template <int kBytes>
  IIRSNN_INLINE uint64_t set(int64_t position, int64_t first, int count) const {
    const float* at = data + position * channels + first;
    uint64_t bits = 0;
    for (int i = 0; i < count; i += kFloats<kBytes>)
      bits |= sign_bits<kBytes>(load_up_to<kBytes>(at + i, count - i) != 0.0f) << i;
    return bits;
  }
  IIRSNN_INLINE float value(int64_t position, int64_t channel) const { return data[position * channels + channel]; }
};

// ---- Sums in registers ----

template <int kWidth, int kBytes>
struct Row {
  using Floats = Register<float, kBytes>;
  static constexpr int kRegisters = kWidth / kFloats<kBytes>;
  Floats v[kRegisters];

  IIRSNN_INLINE void zero() {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] = Floats{};
  }
  IIRSNN_INLINE void load(const float* from) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] = load_register<Floats>(from + i * kFloats<kBytes>);
  }
  IIRSNN_INLINE void store(float* to) const {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) store_register(to + i * kFloats<kBytes>, v[i]);
  }
  IIRSNN_INLINE void add(const Row& other) {
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) v[i] += other.v[i];
  }
  template <bool kValues>
  IIRSNN_INLINE void add(const char* row, float value) {
    const Floats factor = kValues ? spread<kBytes>(value) : Floats{};
    IIRSNN_REGISTERS
    for (int i = 0; i < kRegisters; ++i) {
      const Floats part = load_register<Floats>(row + i * kBytes);
      v[i] += kValues ? part * factor : part;
    }
  }
};

// sums[tap] += the rows at `rows - tap * row` of the events [first, last), a float each where kValues.
// Two sums take turns where there are few: an addition takes several cycles, and one can start in each.
template <int kPart, int kWidth, int kTaps, bool kValues, int kBytes>
IIRSNN_INLINE void accumulate_part(const char* rows, const uint32_t* entries, const float* values, int64_t first,
                                   int64_t last, float* sums) {
  constexpr bool kTwo = kTaps * kWidth < 64;
  Row<kPart, kBytes> sum[kTaps], other[kTaps];
  IIRSNN_REGISTERS
  for (int tap = 0; tap < kTaps; ++tap) {
    sum[tap].load(sums + tap * kWidth);
    if (kTwo) other[tap].zero();
  }
  int64_t e = first;
  if (kTwo) {
    for (; e + 2 <= last; e += 2) {
      IIRSNN_REGISTERS
      for (int tap = 0; tap < kTaps; ++tap) {
        sum[tap].template add<kValues>(rows + entries[e] - tap * kWidth * 4, kValues ? values[e] : 0.0f);
        other[tap].template add<kValues>(rows + entries[e + 1] - tap * kWidth * 4, kValues ? values[e + 1] : 0.0f);
      }
    }
  }
  for (; e < last; ++e) {
    IIRSNN_REGISTERS
    for (int tap = 0; tap < kTaps; ++tap) {
      sum[tap].template add<kValues>(rows + entries[e] - tap * kWidth * 4, kValues ? values[e] : 0.0f);
    }
  }
  IIRSNN_REGISTERS
  for (int tap = 0; tap < kTaps; ++tap) {
    if (kTwo) sum[tap].add(other[tap]);
    sum[tap].store(sums + tap * kWidth);
  }
}

template <int kWidth, int kTaps, bool kValues, int kBytes>
IIRSNN_INLINE void accumulate(const char* rows, const uint32_t* entries, const float* values, int64_t first,
                              int64_t last, float* sums) {
#if defined(__x86_64__)
  constexpr int kPart = kBytes == 16 ? 16 : kWidth;  // sums in 16 registers
#else
  constexpr int kPart = kWidth;
#endif
  for (int part = 0; part < kWidth; part += kPart) {
    accumulate_part<kPart, kWidth, kTaps, kValues, kBytes>(rows + part * 4, entries, values, first, last, sums + part);
  }
}

// ---- Forward ----

// How a forward pass is cut up.
struct ForwardPlan {
  int64_t block, blocks;         // channels of a block, blocks of a group
  int64_t images, image_chunks;  // images of a chunk
  int64_t rows, row_chunks;      // output rows of a chunk; all of them where images > 1
  int64_t tiles, tile_parts;     // tiles of all groups; parts that they are shared out in

  explicit ForwardPlan(const Conv& conv, int64_t threads) {
    const int64_t fit = kCached / kRowBytes / conv.kernel_w / kWord * kWord;
    block = std::min(std::max<int64_t>(fit, kWord), ceil_div(conv.group_channels(), kWord) * kWord);
    blocks = ceil_div(conv.group_channels(), block);
    const int64_t positions = conv.out_height * conv.out_width;
    images = std::max<int64_t>(1, std::min(kChunk / positions, conv.images));
    rows = images > 1 ? conv.out_height : std::min(conv.out_height, std::max<int64_t>(1, kChunk / conv.out_width));
    image_chunks = ceil_div(conv.images, images);
    row_chunks = ceil_div(conv.out_height, rows);
    tiles = conv.groups * ceil_div(conv.group_outputs(), kTile);
    const int64_t wanted = threads == 1 ? 1 : 3 * threads, chunks = image_chunks * row_chunks;
    tile_parts = std::min(tiles, std::max<int64_t>(1, wanted / chunks));
  }
  int64_t units() const { return image_chunks * row_chunks * tile_parts; }
};

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
      const char* tap = reinterpret_cast<const char*>(weights) + (ky * conv.kernel_w + kx) * block * row_bytes;
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
    const ForwardPlan plan(conv, threads);
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

// ---- Weight gradient ----

// How a weight gradient is cut up.
struct GradPlan {
  int64_t blocks;         // of kGradBlock channels of a group
  int64_t left, pitch;    // zero columns before a row of gradients; columns from row to row
  int64_t images, units;  // images whose events are listed together
  int64_t rows;           // output rows whose gradients are in the L1 cache together
  int64_t tiles;          // of a group

  explicit GradPlan(const Conv& conv) {
    blocks = ceil_div(conv.group_channels(), kGradBlock);
    const int64_t first = floor_div(conv.padding_w - (conv.kernel_w - 1) * conv.dilation_w, conv.stride_w);
    const int64_t last = floor_div(conv.width - 1 + conv.padding_w, conv.stride_w);
    left = std::max<int64_t>({0, -first, last - (conv.out_width - 1)});
    pitch = conv.out_width + left;
    const int64_t fit = kCached / kRowBytes;
    images = std::max<int64_t>(1, std::min(fit / (conv.out_height * pitch), conv.images));
    units = ceil_div(conv.images, images);
    rows = images > 1 ? conv.out_height : std::min(conv.out_height, std::max<int64_t>(1, fit / pitch));
    tiles = ceil_div(conv.group_outputs(), kTile);
  }
};

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
                                 int64_t images, int64_t first_row, int64_t rows, const char* grad, float* sums) {
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
      const char* rows_at = grad + ((shift_y - first_row) * images * plan.pitch + shift_x) * kRowBytes;
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
    const GradPlan plan(conv);
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
                                                   reinterpret_cast<const char*>(grads.get() + plan.left * kTile),
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
    const GradPlan plan(conv);
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

int64_t forward_units(const Forward& work, int64_t threads) { return ForwardPlan(work.conv, threads).units(); }

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

int64_t weight_grad_splits(const Conv& conv, int64_t threads) {
  const GradPlan plan(conv);
  const int64_t blocks = conv.groups * plan.blocks;
  int64_t splits = 1;
  while (blocks * splits % threads && blocks * splits < 4 * threads) ++splits;
  return std::max<int64_t>(1, std::min(splits, plan.units));
}

int64_t weight_grad_floats(const Conv& conv) {
  const GradPlan plan(conv);
  return conv.groups * plan.blocks * plan.tiles * kGradBlock * conv.kernel_h * conv.kernel_w * kTile;
}

int64_t weight_grad_units(const WeightGrad& work) {
  return work.splits * work.conv.groups * GradPlan(work.conv).blocks;
}

void weight_grad(const WeightGrad& work, int64_t first_unit, int64_t last_unit) {
  const bool half = work.dtype == DType::bfloat16;
  if (work.source.kind == Kind::counts) {
    return half ? run<WeightGradLoop<BFloat16, CountsReader>>(&work, first_unit, last_unit)
                : run<WeightGradLoop<float, CountsReader>>(&work, first_unit, last_unit);
  }
  half ? run<WeightGradLoop<BFloat16, BitsReader>>(&work, first_unit, last_unit)
       : run<WeightGradLoop<float, BitsReader>>(&work, first_unit, last_unit);
}

int64_t weight_grad_finish_units(const WeightGrad& work) {
  const GradPlan plan(work.conv);
  return work.splits > 1 ? work.conv.groups * plan.blocks * plan.tiles : 0;
}

void weight_grad_finish(const WeightGrad& work, int64_t first_unit, int64_t last_unit) {
  work.dtype == DType::bfloat16 ? run<FinishLoop<BFloat16>>(&work, first_unit, last_unit)
                                : run<FinishLoop<float>>(&work, first_unit, last_unit);
}

}  // namespace iirsnn::sparse
