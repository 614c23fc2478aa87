// Parameters of one element a channel, and sums over channels, as kernels over a block of neurons meet them.
//
// A block within one channel reads its parameters broadcast and sums in registers. A block of several reads them from
// rows of one element a neuron, and sums into such rows. Rows are filled for the block, or where all channels of an
// image are few neurons once for all of them: no table grows with the map.
#pragma once

#include <array>
#include <vector>

#include "lif/cpu/blocks.h"

namespace iirsnn {

// What kernels read of a channel; the last three of a current that is normalised.
enum { kThreshold, kLeak, kInverse, kGain, kShift, kMean, kParameters };
constexpr int kMostSums = 4;
constexpr int kLongRow = 8 * kBlock;  // neurons of all channels whose rows are filled once
constexpr int kHeldBlocks = 8;        // whose sums rows hold as acc_t, before they are added up as doubles

template <typename acc_t>
struct Parameters {
  const acc_t* at[kParameters];  // of neuron i of a block: [i], or [0]
  bool along;                    // one a neuron; else one vector of equal ones
};

template <typename acc_t>
class Channels {
 public:
  using Values = std::array<const acc_t*, kParameters>;

  // values: [channels] each, or null where no kernel reads it
  Channels(const LifShape& shape, const Values& values);

  // Those of a block, until the next call.
  const Parameters<acc_t>& of(const Range& range);

 private:
  acc_t* broadcast(int k) const { return rows_.data() + k * stride_; }
  acc_t* row(int k) const { return broadcast(k) + kLanes<acc_t>; }

  const LifShape shape_;
  const Values values_;
  const int64_t period_;
  const bool once_;
  const int64_t stride_;
  Scratch<acc_t> rows_;
  Parameters<acc_t> parameters_{};
  int64_t channel_ = -1;            // that is broadcast
  int64_t first_ = 0, filled_ = 0;  // the neuron of a period that the rows start with, and how many they hold
};

// Sums over the neurons of each channel, `count` of them.
template <typename acc_t>
class ChannelSums {
 public:
  ChannelSums(const LifShape& shape, int count);

  // Where a kernel puts sum k of a block, at [k * kRow]: adds each neuron's, or where the block is of one channel
  // writes those of a vector's lanes.
  acc_t* rows(const Range& range);
  // After the kernel; totals [count, channels] are added to.
  void add(const Range& range, double* totals);

 private:
  const LifShape shape_;
  const int count_, hold_;
  Scratch<acc_t> lanes_, rows_;
  int held_ = 0, width_ = 0;  // blocks and neurons in rows_
  int64_t begin_ = 0;         // of the first of them
};

}  // namespace iirsnn
