// How the CPU kernels walk the neurons. A thread takes chunks; a chunk is a run of blocks; a block goes through all its
// timesteps, one row after the other, before the next block starts. All of these depend on the shape alone, never on
// the number of threads or the instruction set, so that sums come in one order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "lif/lif.h"
#include "lif/with_reset.h"
#include "simd/lanes.h"
#include "simd/memory.h"

namespace iirsnn {

constexpr int kBlock = 1024;             // neurons of a block at most; a multiple of the 64 that packing pads to
constexpr int kSegment = 16;             // timesteps between checkpoints
constexpr int64_t kChunk = 16 * kBlock;  // neurons a thread takes at least
constexpr int64_t kMaxChunks = 256;
constexpr int kHeldTerms = 128;     // of a neuron, that rows of a column sum as acc_t, at most
constexpr int kColumn = 4096;       // neurons of one at least, where a pass has as many
constexpr int kNarrow = 512;        // neurons of a channel from which on there are no columns
constexpr int kWholeChannel = 256;  // the same, from which on blocks may be of whole channels
constexpr int kSmallMap = 16;       // neurons of a channel, below which rows are added up neuron by neuron first

// Numbers that go together in a kernel.
template <typename acc_t>
constexpr int kLanes = kVectorBytes / sizeof(acc_t);

// Neurons of a row of scratch memory at most, rounded up as packing does: a small layer needs little of it, and asking
// for more costs it more than all the rest.
inline int row_neurons(const LifShape& shape) { return int(std::min<int64_t>(kBlock, round_up(shape.neurons, kWord))); }

// From row to row: a cache line more, or they would share sets of the L1 cache.
template <typename acc_t>
int row_stride(const LifShape& shape) {
  return row_neurons(shape) + 64 / int(sizeof(acc_t));
}

// f(a number of the dtype).
template <typename F>
auto with_scalar(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::float16:
      return f(Half());
    default:
      return f(BFloat16());
  }
}

// Whether what a kernel writes, [T, N], would push all else out of the caches.
inline bool large(const LifShape& shape) {
  const int64_t bytes = with_scalar(shape.dtype, [](auto scalar) { return int64_t(sizeof(scalar)); });
  return shape.timesteps * shape.neurons * bytes >= int64_t(32) << 20;
}

// Neurons of a block: whole vectors, and whole passes over all channels where one fits. Half as many where membranes of
// all timesteps, or parameters of each neuron, would leave no room in the L1 cache; but memory wants long rows.
inline int block_neurons(const LifShape& shape, bool whole_channels = false) {
  if (whole_channels) return int(std::max<int64_t>(1, kBlock / shape.inner) * shape.inner);
  const bool crowded = shape.channels > 1 ? shape.timesteps > 1 : shape.timesteps > 4 && !large(shape);
  const int most = crowded ? kBlock / 2 : kBlock;
  if (shape.channels == 1 || shape.channels * shape.inner > most) return most;
  const int64_t passes = std::lcm(shape.channels * shape.inner, int64_t(64));
  return passes > most ? most : int(most / passes * passes);
}

// Whether blocks may be of whole channels, each walked from its first neuron to its last: where few of them are
// computed twice for that. Of 16-bit numbers, more of which go together, rows of parameters and sums are faster.
inline bool whole_channels(const LifShape& shape) {
  const bool wide_numbers = shape.dtype == DType::float32 || shape.dtype == DType::float64;
  return wide_numbers && shape.channels > 1 && shape.inner >= kWholeChannel && shape.inner <= kChunk;
}

// How a kernel walks a chunk: in blocks of up to kBlock neurons; in blocks of whole channels; or in columns, a part of
// the channels through some passes over all of them.
enum class Walk { blocks, channels, columns };

// Columns of narrow channels: rows of parameters and sums are no longer than one, and serve many passes.
struct Columns {
  explicit Columns(const LifShape& shape) : neurons(shape.neurons) {
    if (shape.channels == 1 || shape.inner >= kNarrow || neurons < kColumn) return;
    // short passes go together, and those that are no whole words
    const int64_t words = std::lcm(shape.channels * shape.inner, int64_t(kWord));
    pass = ceil_div(kColumn / 2, words) * words;
    passes = neurons / pass;
    if (passes < 2) return;
    // what is done once a column shows where it has few passes, and more where maps are small
    const int64_t enough = shape.timesteps == 1 ? 16 : 8;
    const int64_t each = std::max<int64_t>(16, (shape.inner < kSmallMap ? 128 : 64) / shape.timesteps);
    const int64_t most = std::clamp<int64_t>(neurons / kChunk, 1, kMaxChunks);
    columns = std::clamp<int64_t>(pass / kColumn, 1, most);
    if (columns > enough) columns -= columns % enough;
    while (columns < enough && enough % columns != 0) --columns;
    runs = std::min({std::max({int64_t(1), enough / columns, passes / each}), passes, most / columns});
  }
  int64_t chunks() const { return columns * runs; }
  // Where in a pass column k begins.
  int64_t edge(int64_t k) const { return k * (pass / kWord) / columns * kWord; }
  int64_t longest() const { return columns ? round_up(ceil_div(pass, columns), kWord) : 0; }

  int64_t neurons, pass = 0, passes = 0;
  int64_t columns = 0, runs = 0;  // of a pass, and of passes; 0: none
};

// How neurons are divided into chunks where these are not of columns: into so many each. Sums are added up after each
// chunk: it has some passes, of small maps, whose sums cost the most, more, where enough chunks remain.
struct Chunks {
  explicit Chunks(const LifShape& shape, bool whole_channels = false)
      : neurons(shape.neurons), unit(whole_channels ? shape.inner : 1), count(Columns(shape).chunks()) {
    const int64_t pass = shape.channels * shape.inner, passes = shape.inner < kSmallMap ? 64 : 16;
    const int64_t least = std::max({kChunk, 16 * shape.channels, ceil_div(neurons, kMaxChunks)});
    const int64_t some = shape.channels == 1 ? 0 : std::min(passes * pass, neurons / 32);
    size = round_up(count ? ceil_div(neurons, count) : std::max(least, some), kBlock);
    if (!count) count = ceil_div(neurons, size);
  }
  int64_t begin(int64_t chunk) const { return std::min(chunk * size, neurons) / unit * unit; }

  int64_t neurons, unit;  // of all, and those that no chunk divides
  int64_t count, size;
};

inline Walk walk_of(const LifShape& shape) { return Columns(shape).columns > 0 ? Walk::columns : Walk::blocks; }

inline int64_t chunks_of(const LifShape& shape) { return Chunks(shape).count; }

// f(first, last) for the channels that a chunk meets.
template <typename F>
void for_channels_of(const LifShape& shape, Walk walk, int64_t chunk, F f) {
  const int64_t period = shape.channels * shape.inner;
  int64_t begin, end;
  if (walk == Walk::columns) {
    const Columns c(shape);
    begin = c.edge(chunk % c.columns);
    end = c.edge(chunk % c.columns + 1);
  } else {
    const Chunks chunks(shape, walk == Walk::channels);
    begin = chunks.begin(chunk);
    end = chunks.begin(chunk + 1);
  }
  const int64_t neurons = end - begin, first = begin % period;
  if (neurons >= period) return f(0, shape.channels);
  f(first / shape.inner, ceil_div(std::min(first + neurons, period), shape.inner));
  if (first + neurons > period) f(0, std::min(first / shape.inner, ceil_div(first + neurons - period, shape.inner)));
}

// Neurons [begin, begin + n) and the same ones of the passes that follow, where a block is of several: `at` neurons
// after the first of a column that is `width` wide, where it is of one.
struct Range {
  int64_t begin;
  int n;
  int passes;
  bool last;  // of its chunk, or of what is summed in one row
  int at, width;
};

// f(Range) for the blocks of a column, pass by pass. The last run has what is left of a pass as well, first of all, and
// what is left of a word on its own: all other blocks are whole vectors.
template <typename F>
void for_each_block_of_column(const Columns& c, int64_t chunk, int64_t block, int most_passes, F f) {
  const int64_t run = chunk / c.columns, column = chunk % c.columns, begin = c.edge(column), end = c.edge(column + 1);
  const auto blocks = [&](int64_t first, int64_t last, int64_t passes, bool done) {
    for (int64_t at = first; at < last; at += block) {
      const int64_t n = std::min(block, last - at);
      f(Range{at, int(n), int(passes), done && at + n == last, int(at - first), int(last - first)});
    }
  };
  if (run + 1 == c.runs) {
    const int64_t start = c.passes * c.pass, last = std::min(start + end, c.neurons), words = last / kWord * kWord;
    if (start + begin < last) {
      blocks(words, last, 1, true);
      blocks(start + begin, words, 1, false);
    }
  }
  const int64_t stop = (run + 1) * c.passes / c.runs;
  for (int64_t pass = run * c.passes / c.runs, some; pass < stop; pass += some) {
    some = std::min<int64_t>(most_passes, stop - pass);
    blocks(pass * c.pass + begin, pass * c.pass + end, some, pass + some == stop);
  }
}

// most: neurons of a block of a column; most_passes: that it may be of.
template <typename F>
void for_each_block(const LifShape& shape, int64_t chunk, Walk walk, int64_t most, int most_passes, F f) {
  if (walk == Walk::columns) return for_each_block_of_column(Columns(shape), chunk, most, most_passes, f);
  const bool whole_channels = walk == Walk::channels;
  const Chunks chunks(shape, whole_channels);
  const int64_t block = block_neurons(shape, whole_channels), end = chunks.begin(chunk + 1);
  for (int64_t begin = chunks.begin(chunk); begin < end; begin += block) {
    const int n = int(std::min(block, end - begin));
    f(Range{begin, n, 1, begin + n == end, 0, n});
  }
}
template <typename F>
void for_each_block(const LifShape& shape, int64_t chunk, F f) {
  for_each_block(shape, chunk, Walk::blocks, kBlock, 1, f);
}

inline int64_t channel_of(const LifShape& shape, int64_t neuron) { return neuron / shape.inner % shape.channels; }
IIRSNN_INLINE int64_t next_channel(int64_t channels, int64_t channel) {
  return channel + 1 < channels ? channel + 1 : 0;
}
// Neurons in a row of its channel, from this one on.
inline int64_t left_of_channel(const LifShape& shape, int64_t neuron) {
  return shape.channels == 1 ? shape.neurons - neuron : shape.inner - neuron % shape.inner;
}

// Calls f(first, last, channel) for the neurons of each channel among [begin, begin + n), counted from begin.
template <typename F>
IIRSNN_INLINE void for_each_channel(const LifShape& shape, int64_t begin, int n, F f) {
  int64_t channel = channel_of(shape, begin), left = left_of_channel(shape, begin);
  for (int first = 0; first < n; left = shape.inner) {
    const int last = left < n - first ? first + int(left) : n;
    f(first, last, channel);
    first = last;
    channel = next_channel(shape.channels, channel);
  }
}

}  // namespace iirsnn
