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
constexpr int kHeldTerms = 16;     // of a neuron, that rows sum as acc_t, at most, where blocks are no longer
constexpr int kColumnTerms = 128;  // the same, of columns
constexpr int kColumn = 4096;      // neurons of one at least
constexpr int kSmallMap = 16;      // neurons of a channel, below which rows are added up neuron by neuron first

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
  if (whole_channels) return int(kBlock / shape.inner * shape.inner);
  const bool crowded = shape.channels > 1 ? shape.timesteps > 1 : shape.timesteps > 4 && !large(shape);
  const int most = crowded ? kBlock / 2 : kBlock;
  if (shape.channels == 1 || shape.channels * shape.inner > most) return most;
  const int64_t passes = std::lcm(shape.channels * shape.inner, int64_t(64));
  return passes > most ? most : int(most / passes * passes);
}

// Neurons of all channels that have rows filled once, or summed into, at most; of more timesteps there are more rows.
inline int64_t longest_row(const LifShape& shape) { return (shape.timesteps == 1 ? 64 : 32) * kBlock; }
inline int64_t held_passes(const LifShape& shape) { return std::max<int64_t>(1, kHeldTerms / shape.timesteps); }

// Whether blocks are of whole channels, each walked from its first neuron to its last: where few of them are computed
// twice for that. Of 16-bit numbers, more of which go together, rows of parameters and sums are faster.
inline bool whole_channels(const LifShape& shape) {
  const bool small_rest = shape.inner >= 8 * kSmallMap || shape.inner % 64 == 0;
  const bool wide_numbers = shape.dtype == DType::float32 || shape.dtype == DType::float64;
  return wide_numbers && shape.channels > 1 && shape.inner <= kBlock && small_rest;
}

// How a kernel walks a chunk: in blocks of up to kBlock neurons; in blocks of whole channels; or, where chunks are of
// whole passes, a part of the channels through some passes, each time as one block.
enum class Walk { blocks, channels, columns };

// How neurons are divided into chunks: into whole passes over all channels where these are longer than blocks, and rows
// are kept for one, so that no block has parts of two; else into so many neurons each. Sums are added up after each
// chunk: it has some passes, of small maps, whose sums cost the most, more, where enough chunks remain.
struct Chunks {
  explicit Chunks(const LifShape& shape, bool whole_channels = false)
      : pass(shape.channels * shape.inner), neurons(shape.neurons), unit(whole_channels ? shape.inner : 1) {
    const int64_t least = std::max({kChunk, 16 * shape.channels, ceil_div(neurons, kMaxChunks)});
    const int64_t passes = shape.inner < kSmallMap ? 64 : 16, enough = shape.timesteps == 1 ? 16 : 8;
    whole = shape.channels > 1 && pass > block_neurons(shape) && pass % kWord == 0 && pass <= longest_row(shape) &&
            neurons >= 8 * pass;
    if (whole) {
      const int64_t wanted = std::max(enough, round_up(neurons / (passes * pass), enough));
      count = std::max<int64_t>(1, std::min({wanted, neurons / pass, neurons / least}));
    } else {
      const int64_t some = shape.channels == 1 ? 0 : std::min(passes * pass, neurons / 32);
      size = round_up(std::max(least, some), kBlock);
      count = ceil_div(neurons, size);
    }
  }
  // Into how many columns a pass is divided, where chunks are of columns. As many chunks share the passes.
  int64_t columns() const {
    int64_t some = std::max<int64_t>(1, std::min(count, pass / kColumn));
    while (count % some != 0) --some;
    return some;
  }
  int64_t begin(int64_t chunk) const {
    return whole ? chunk * (neurons / pass) / count * pass : std::min(chunk * size, neurons) / unit * unit;
  }

  int64_t pass, neurons, unit;  // of a pass, of all, and those that no chunk divides
  int64_t count, size = 0;
  bool whole;
};

inline int64_t chunks_of(const LifShape& shape) { return Chunks(shape).count; }

// Neurons [begin, begin + n) of a chunk, and the same ones of the passes that follow, where it is of several.
struct Range {
  int64_t begin;
  int n;
  int passes;
  bool last;  // of its chunk
};

// Of the longest column.
inline int64_t column_neurons(const LifShape& shape) {
  const Chunks chunks(shape);
  return round_up(ceil_div(chunks.pass, chunks.columns()), kWord);
}

// for_each_block, where chunks are of columns: then a pass may belong to several.
template <typename F>
void for_each_pass_of_column(const Chunks& chunks, int64_t chunk, int most_passes, F f) {
  const int64_t columns = chunks.columns(), column = chunk % columns, runs = chunks.count / columns;
  const int64_t passes = chunks.neurons / chunks.pass, run = chunk / columns;
  const auto edge = [&](int64_t k) { return k * (chunks.pass / kWord) / columns * kWord; };
  const int64_t begin = edge(column), end = (run + 1) * passes / runs;
  for (int64_t pass = run * passes / runs, some; pass < end; pass += some) {
    some = std::min<int64_t>(most_passes, end - pass);
    f(Range{pass * chunks.pass + begin, int(edge(column + 1) - begin), int(some), pass + some >= end});
  }
}

// most_passes: that a block may be of.
template <typename F>
void for_each_block(const LifShape& shape, int64_t chunk, int most_passes, Walk walk, F f) {
  const bool whole_channels = walk == Walk::channels;
  const Chunks chunks(shape, whole_channels);
  if (walk == Walk::columns) return for_each_pass_of_column(chunks, chunk, most_passes, f);
  const int64_t block = block_neurons(shape, whole_channels), first = chunks.begin(chunk),
                end = chunks.begin(chunk + 1);
  const int64_t pass = chunks.whole ? chunks.pass : end - first;
  for (int64_t start = first, after; start < end; start = after) {
    const int64_t passes = chunks.whole ? std::min<int64_t>(most_passes, (end - start) / pass) : 1;
    after = start + passes * pass;
    const int64_t stop = std::min(start + pass, end);
    for (int64_t begin = start; begin < stop; begin += block) {
      const int n = int(std::min(block, stop - begin));
      f(Range{begin, n, int(passes), begin + block >= stop && after >= end});
    }
  }
}
template <typename F>
void for_each_block(const LifShape& shape, int64_t chunk, F f) {
  for_each_block(shape, chunk, 1, Walk::blocks, f);
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
