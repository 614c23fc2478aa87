// Which neurons a block takes where every channel has parameters and sums of its own, and how its sums come together.
#pragma once

#include <algorithm>
#include <atomic>

#include "lif/cuda/launch.h"

namespace iirsnn::cuda {

constexpr int kWalkThreads = 128, kWalkWarps = kWalkThreads / 32;
// Kernels name the blocks that must fit on a multiprocessor, if only 1: ptxas spills a few bytes to fit one more. How
// many fit without that is the architecture's, of which the host knows nothing.
#if defined(__CUDA_ARCH__)
constexpr int kArchitecture = __CUDA_ARCH__;
#else
constexpr int kArchitecture = 0;
#endif
constexpr int64_t kWalkBlocks = 2048;  // at most: enough for every device of today
constexpr int64_t kLine = 128;         // bytes that threads side by side should read
constexpr int64_t kCluster = 32;       // blocks whose sums one of them adds up, before one adds up those of clusters
constexpr int64_t kFew = 2048;         // sums that one block adds up at once, 16 a thread

// A thread takes packets of kSize neighbours: of one channel, or where channels are innermost (in columns) of kSize
// channels, the same in each packet. The packets of a channel at one timestep lie in rows. `cols` threads stand side by
// side on different channels, so that they read whole lines where rows are short; `splits` blocks share the packets of
// a group of channels.
struct Walk {
  int64_t channels, inner, packets, per_row, row;  // row: neurons from one row to the next
  int64_t groups, splits;
  Divider by_per_row;
  int cols;

  __host__ __device__ int64_t clusters() const { return (splits + kCluster - 1) / kCluster; }
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

// Blocks of a kernel that the current device holds at once. `memory`: shared, in bytes, of a block.
template <auto kKernel>
int64_t resident_blocks(int memory) {
  static std::atomic<int64_t> kept{-1};  // device, memory, blocks of the call before
  int device = 0, processors = 0, each = 0;
  cudaGetDevice(&device);
  const int64_t key = int64_t(device) << 24 | memory, before = kept.load(std::memory_order_relaxed);
  if (before >> 24 == key) return before & 0xffffff;
  const auto kernel = reinterpret_cast<const void*>(kKernel);
  if (cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kWalkThreads, memory) != cudaSuccess)
    return cudaGetLastError(), kWalkBlocks;  // the launch will say why
  const int64_t blocks = std::min<int64_t>(processors * each, 0xffffff);
  kept.store(key << 24 | blocks, std::memory_order_relaxed);
  return blocks;
}

// For a kernel with sums: all of its blocks at once. One ends by handing over its sums, a wait of some microseconds,
// and so would each that takes its place. Sums have the same bits on the same kind of device.
template <auto kKernel>
Walk at_once(Walk walk, int memory) {
  const int64_t most = resident_blocks<kKernel>(memory) / walk.groups;
  walk.splits = std::clamp(most, int64_t(1), walk.splits);
  return walk;
}

// For a kernel without sums: blocks for several turns, so that some start while others end. `each`: packets that a
// thread asks for at once, which every thread of a block shall have.
template <auto kKernel>
Walk in_turns(Walk walk, int memory, int64_t turns, int64_t each) {
  const int64_t rows = kWalkThreads / walk.cols, most = std::max(ceil_div(walk.packets, rows * each), int64_t(1));
  walk.splits = std::clamp(turns * resident_blocks<kKernel>(memory) / walk.groups, int64_t(1), most);
  return walk;
}

// Neurons of a packet: `most`, in columns four, so that not many parameters have to be held; 1 where rows are no whole
// packets, or start off them.
template <typename... pointers_t>
int walk_packet(const LifShape& shape, int64_t most, int64_t stride, pointers_t... pointers) {
  const int64_t bytes = size_of(shape.dtype), size = in_columns(shape) ? std::min<int64_t>(most, 4) : most;
  const int64_t run = in_columns(shape) ? shape.channels : shape.channels == 1 ? shape.neurons : shape.inner;
  const int64_t strides = shape.timesteps == 1 ? 0 : (shape.x_stride_t | stride) * bytes;
  const bool aligned = strides % (size * bytes) == 0 && (reinterpret_cast<intptr_t>(pointers) | ...) % 16 == 0;
  return run % size == 0 && aligned ? int(size) : 1;
}

inline int64_t whole_packet(const LifShape& shape) { return 16 / size_of(shape.dtype); }

// Calls f(neurons of a packet, whether in columns). kHalf: packets of 8 bytes are wanted outside columns as well.
template <typename scalar_t, bool kHalf, typename F>
void with_packet(const LifShape& shape, int size, const F& f) {
  constexpr int kWhole = kPacket<scalar_t>, kFour = std::min(kWhole, 4);
  if (size == 1) return f(constant<1>{}, constant<false>{});
  if (in_columns(shape)) return f(constant<kFour>{}, constant<true>{});
  if constexpr (kHalf && kFour < kWhole) {
    if (size == kFour) return f(constant<kFour>{}, constant<false>{});
  }
  f(constant<kWhole>{}, constant<false>{});
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
    if constexpr (kColumns) return channel + i * walk.row;
    const int64_t row = walk.by_per_row(i);
    return channel * walk.inner + row * walk.row + (i - row * walk.per_row) * kSize;
  }
};

// Doubles of shared memory that sum_group takes for kCount sums a thread.
template <int kCount>
constexpr int kGroupDoubles = kWalkWarps * 32 * kCount;

// Counts up and returns how many were counted before. What the block wrote is seen by whom it counts before, and what
// those wrote by the block, after the barrier that has to follow.
__device__ __forceinline__ uint32_t count_up(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// total[0, values) is row `mine` of `count`. The last block to bring its row adds them all up into total, in the order
// of rows, and returns true there. counter: 0 before and after.
__device__ __forceinline__ bool add_rows(double* total, int values, double* rows, int64_t mine, int64_t count,
                                         uint32_t* counter) {
  __shared__ uint32_t arrived;
  const int thread = threadIdx.x;
#pragma unroll 1
  for (int value = thread; value < values; value += kWalkThreads) rows[mine * values + value] = total[value];
  __syncthreads();
  if (thread == 0) arrived = count_up(counter);
  __syncthreads();
  if (arrived + 1 != count) return false;
  if (thread == 0) *counter = 0;
  // several threads to a value where there are enough: values is a power of two
  const int ways = max(kWalkThreads / values, 1), beside = kWalkThreads / ways;
#pragma unroll 1
  for (int value = thread % beside; value < values; value += beside) {
    double sum = 0;
#pragma unroll 8
    for (int row = thread / beside; row < int(count); row += ways) sum += __ldcg(rows + row * int64_t(values) + value);
    total[thread / beside * values + value] = sum;
  }
  __syncthreads();
  if (thread < values && ways > 1) {
    double sum = total[thread];
#pragma unroll 4
    for (int way = 1; way < ways; ++way) sum += total[way * values + thread];
    total[thread] = sum;
  }
  __syncthreads();
  return true;
}

// Sums of the threads that stand on the same channels, over all blocks of a group: kFew by one block, more by clusters
// of kCluster, for else thousands of loads would wait for each other. partials: [groups, splits + clusters, values],
// values = cols * kCount; counters: [groups, 1 + clusters]. In the last block to come here it returns true, and `total`
// holds value i of column c at [c * kCount + i]. Always the same order of additions.
template <int kCount, int kSize, bool kColumns>
__device__ __forceinline__ bool sum_group(double* total, double (&mine)[kCount], const Walk& walk,
                                          const Place<kSize, kColumns>& place, double* partials, uint32_t* counters) {
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
#pragma unroll 1
  for (int value = thread; value < values; value += kWalkThreads) {
    double sum = 0;
    for (int warp = 0; warp < kWalkWarps; ++warp) sum += total[warp * values + value];
    total[value] = sum;
  }
  if (walk.splits > 1) {
    const int64_t clusters = walk.clusters(), cluster = place.split / kCluster, start = cluster * kCluster;
    double* const rows = partials + place.group * (walk.splits + clusters) * values;
    uint32_t* const counter = counters + place.group * (1 + clusters);
    if (walk.splits * values <= kFew) return add_rows(total, values, rows, place.split, walk.splits, counter);
    if (!add_rows(total, values, rows + start * values, place.split - start, min(kCluster, walk.splits - start),
                  counter + 1 + cluster))
      return false;
    return clusters == 1 || add_rows(total, values, rows + walk.splits * values, cluster, clusters, counter);
  }
  __syncthreads();
  return true;
}

// Bytes of the partial sums of `count` a column.
inline int64_t partial_bytes(const Walk& walk, int64_t count) {
  if (walk.splits == 1) return 0;
  return walk.groups * (walk.splits + walk.clusters()) * walk.cols * count * int64_t(sizeof(double));
}

inline int64_t counters_of(const Walk& walk) { return walk.groups * (1 + walk.clusters()); }

// However x turns out to be aligned.
inline int64_t walk_counters(const LifShape& shape, int64_t most) {
  const int size = walk_packet(shape, most, 0, static_cast<const void*>(nullptr));
  return std::max(counters_of(walk_of(shape, 1)), counters_of(walk_of(shape, size)));
}

// Of `count` sums a channel, however x turns out to be aligned.
inline int64_t walk_partial_bytes(const LifShape& shape, int64_t most, int64_t count) {
  const int size = walk_packet(shape, most, 0, static_cast<const void*>(nullptr));
  return std::max(partial_bytes(walk_of(shape, 1), count),
                  partial_bytes(walk_of(shape, size), count * (in_columns(shape) ? size : 1)));
}

}  // namespace iirsnn::cuda
