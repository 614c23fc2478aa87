// Which neurons a block takes where every channel has parameters and sums of its own, and how its sums come together.
#pragma once

#include <algorithm>

#include "lif/cuda/launch.h"

namespace iirsnn::cuda {

constexpr int kWalkThreads = 128, kWalkWarps = kWalkThreads / 32;
// Kernels name the blocks that must fit on a multiprocessor, if only 1: ptxas spills a few bytes to fit one more.
constexpr int64_t kWalkBlocks = 2048;  // enough for every device of today; a constant, so that sums have the same bits
constexpr int64_t kLine = 128;         // bytes that threads side by side should read

// A thread takes packets of kSize neighbours: of one channel, or where channels are innermost (in columns) of kSize
// channels, the same in each packet. The packets of a channel at one timestep lie in rows. `cols` threads stand side by
// side on different channels, so that they read whole lines where rows are short; `splits` blocks share the packets of
// a group of channels.
struct Walk {
  int64_t channels, inner, packets, per_row, row;  // row: neurons from one row to the next
  int64_t groups, splits;
  Divider by_per_row;
  int cols;
};

inline bool in_columns(const LifShape& shape) { return shape.channels > 1 && shape.inner == 1; }

inline Walk walk_of(const LifShape& shape, int size) {
  const bool columns = in_columns(shape) && size > 1;
  const int64_t inner = shape.channels == 1 ? shape.neurons : shape.inner, apart = columns ? size : 1;
  const int64_t per_row = columns ? 1 : inner / size, beside = shape.channels / apart;
  int cols = 1;
  while (cols < 32 && cols < beside && cols * per_row * size * size_of(shape.dtype) < kLine) cols *= 2;
  const int64_t packets = shape.neurons / (shape.channels * (columns ? 1 : size)), rows = kWalkThreads / cols;
  const int64_t groups = ceil_div(beside, cols);
  const int64_t splits = std::clamp(ceil_div(packets, rows), int64_t(1), std::max(kWalkBlocks / groups, int64_t(1)));
  return {shape.channels, inner, packets, per_row, shape.channels * inner, groups, splits, Divider(per_row), cols};
}

// Neurons of a packet: 16 bytes, in columns four neurons, so that not many parameters have to be held; 1 where rows are
// no whole packets, or start off them.
template <typename... pointers_t>
int walk_packet(const LifShape& shape, int64_t stride, pointers_t... pointers) {
  const int64_t bytes = size_of(shape.dtype), whole = 16 / bytes;
  const int64_t size = in_columns(shape) ? std::min<int64_t>(whole, 4) : whole;
  const int64_t run = in_columns(shape) ? shape.channels : shape.channels == 1 ? shape.neurons : shape.inner;
  const int64_t strides = shape.timesteps == 1 ? 0 : (shape.x_stride_t | stride) * bytes;
  const bool aligned = (strides | (reinterpret_cast<intptr_t>(pointers) | ...)) % (size * bytes) == 0;
  return run % size == 0 && aligned ? int(size) : 1;
}

// Calls f(neurons of a packet, whether in columns).
template <typename scalar_t, typename F>
void with_packet(const LifShape& shape, int size, const F& f) {
  if (size == 1)
    f(constant<1>{}, constant<false>{});
  else if (in_columns(shape))
    f(constant<(kPacket<scalar_t> < 4 ? kPacket<scalar_t> : 4)>{}, constant<true>{});
  else
    f(constant<kPacket<scalar_t>>{}, constant<false>{});
}

template <int kSize, bool kColumns>
struct Place {
  static constexpr int kChannels = kColumns ? kSize : 1;
  unsigned group, split;
  int64_t channel;  // the thread's first
  int64_t first, step, end;

  explicit __device__ __forceinline__ Place(const Walk& walk) {
    group = blockIdx.x % unsigned(walk.groups), split = blockIdx.x / unsigned(walk.groups);
    const int rows = kWalkThreads / walk.cols;
    channel = (int64_t(group) * walk.cols + threadIdx.x % walk.cols) * kChannels;
    first = int64_t(split) * rows + threadIdx.x / walk.cols;
    step = walk.splits * rows;
    end = channel < walk.channels ? walk.packets : 0;
  }
  // Where packet i starts in a timestep.
  __device__ __forceinline__ int64_t at(const Walk& walk, int64_t i) const {
    const int64_t row = walk.by_per_row(i);
    return channel * walk.inner + row * walk.row + (i - row * walk.per_row) * kSize;
  }
};

// Doubles of shared memory that sum_group takes for kCount sums a thread.
template <int kCount>
constexpr int kGroupDoubles = kWalkWarps * 32 * kCount;

// Sums of the threads that stand on the same channels, over all blocks of a group. partials: [groups, splits, values],
// values = cols * kCount; counters: [groups], 0 before and after. In the last block to come here it returns true, and
// `total` holds value i of column c at [c * kCount + i]. Always the same order of additions.
template <int kCount, int kSize, bool kColumns>
__device__ __forceinline__ bool sum_group(double* total, double (&mine)[kCount], const Walk& walk,
                                          const Place<kSize, kColumns>& place, double* partials, uint32_t* counters) {
  __shared__ uint32_t arrived;
  const int values = walk.cols * kCount, thread = threadIdx.x, lane = thread % 32;
  for (int apart = 16; apart >= walk.cols; apart /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) mine[i] += __shfl_xor_sync(kWarp, mine[i], apart);
  }
  if (lane < walk.cols) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total[thread / 32 * values + lane * kCount + i] = mine[i];
  }
  __syncthreads();
  double* const group = partials + int64_t(place.group) * walk.splits * values;
  for (int value = thread; value < values; value += kWalkThreads) {
    double sum = 0;
    for (int warp = 0; warp < kWalkWarps; ++warp) sum += total[warp * values + value];
    if (walk.splits == 1)
      total[value] = sum;
    else
      group[int64_t(place.split) * values + value] = sum;
  }
  if (walk.splits > 1) {
    __threadfence();
    __syncthreads();
    if (thread == 0) arrived = atomicAdd(counters + place.group, 1u);
    __syncthreads();
    if (arrived + 1 != walk.splits) return false;
    if (thread == 0) counters[place.group] = 0;
    __threadfence();
    // several threads to a value where there are enough: values is a power of two
    const int ways = max(kWalkThreads / values, 1), beside = kWalkThreads / ways;
    for (int value = thread % beside; value < values; value += beside) {
      double sum = 0;
      for (int64_t split = thread / beside; split < walk.splits; split += ways)
        sum += __ldcg(group + split * values + value);
      total[thread / beside * values + value] = sum;
    }
    __syncthreads();
    for (int value = thread; value < values; value += kWalkThreads)
      for (int way = 1; way < ways; ++way) total[value] += total[way * values + value];
  }
  __syncthreads();
  return true;
}

// Bytes of the partial sums of `count` a column.
inline int64_t partial_bytes(const Walk& walk, int64_t count) {
  return walk.splits == 1 ? 0 : walk.groups * walk.splits * walk.cols * count * int64_t(sizeof(double));
}

// Those of `count` a channel, however x turns out to be aligned.
inline int64_t walk_partial_bytes(const LifShape& shape, int64_t count) {
  const int size = walk_packet(shape, 0, static_cast<const void*>(nullptr));
  return std::max(partial_bytes(walk_of(shape, 1), count),
                  partial_bytes(walk_of(shape, size), count * (in_columns(shape) ? size : 1)));
}

}  // namespace iirsnn::cuda
