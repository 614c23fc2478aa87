// Parameters of one element a channel, and sums over channels, as kernels over a block of neurons meet them.
//
// A block is cut into pieces. In a piece of one channel, kernels spread its parameters over registers and sum in
// registers. In a piece of several they read parameters from rows of one element a neuron, and sum into such rows.
// Where channels are wide, a piece of several is no more than the vector that crosses from one to the next; where they
// are narrow it is the whole block, in a column whose rows serve many passes. No row grows with the map. Sums are
// double, but for the terms of a neuron that rows hold. Kernels that may compute a neuron twice walk blocks of whole
// channels: each is a piece, of any length.
#pragma once

#include <array>
#include <vector>

#include "lif/cpu/blocks.h"

namespace iirsnn {

// What kernels read of a channel: all from kGain on of a current that is normalised.
enum { kThreshold, kLeak, kInverse, kGain, kShift, kMean, kGradMean, kSlope, kParameters };
constexpr int kWide = 4;  // vectors of a channel, in memory, from which on it can be pieces of a block

struct Piece {
  int end;          // of its neurons, which follow those of the piece before
  int64_t channel;  // -1: several that rows alone tell apart
  int shared;       // how many of them are of this channel, where the others are of the next; else 0
  bool several() const { return shared > 0 || channel < 0; }
};

template <typename acc_t>
struct Parameters {
  const Piece* pieces;  // whole vectors each, up to the block's last one; null: whole channels
  Piece first;          // of whole channels
  int64_t channels;
  const acc_t* values[kParameters];  // [channels], or null
  const acc_t* rows[kParameters];    // of neuron i of a block at [i], where its piece is of several channels
};

template <typename acc_t>
class Channels {
 public:
  using Values = std::array<const acc_t*, kParameters>;

  // values: [channels] each, or null where no kernel reads it
  Channels(const LifShape& shape, const Values& values, Walk walk);

  // Those of a block, until the next call.
  const Parameters<acc_t>& of(const Range& range);
  // Whether no block has a piece of one channel: then kernels may take blocks of several passes.
  bool several() const { return !whole() && !wide_; }
  // Whether blocks are of whole channels, without rows.
  bool whole() const { return walk_ == Walk::channels; }
  Walk walk() const { return walk_; }

 private:
  void cut(const Range& range);
  void fill(const Range& range);
  void add_piece(int end, int64_t channel, int shared);
  acc_t* row(int k) const { return rows_.get() + slots_[k] * stride_; }

  const LifShape shape_;
  const Values values_;
  const Walk walk_;
  const bool wide_;
  const int64_t stride_;
  int used_[kParameters] = {}, slots_[kParameters] = {}, count_ = 0;  // of the values that are given, and their rows
  Buffer<acc_t> rows_;
  std::array<Piece, 2 * kBlock / (kWide * kLanes<acc_t>)+2> pieces_{};
  int pieces_used_ = 0;
  Parameters<acc_t> parameters_{};
  int64_t first_ = 0, filled_ = 0;  // the neuron of a period that the rows start with, and how many they hold
};

// Sums over the neurons of each channel, `count` of them; without that of the leak where membranes start from 0.
template <typename acc_t>
class ChannelSums {
 public:
  ChannelSums(const LifShape& shape, int count, bool charged, Walk walk);

  // Where kernels add sum k of a block, at [k * stride()]: of a piece of several channels, each neuron's.
  acc_t* rows(const Range& range);
  int64_t stride() const { return stride_; }
  // After the kernels; totals [count, channels] are added to.
  void add(const Range& range, const Parameters<acc_t>& parameters, double* totals);

 private:
  const LifShape shape_;
  const int count_;
  const bool charged_, columns_, wide_;
  const int64_t stride_, most_;  // passes that rows_ hold before they are added up
  Buffer<acc_t> rows_;
  const bool folds_;
  Buffer<double> sums_;  // like rows, where those are added up neuron by neuron first
  int64_t held_ = 0;
};

// Partial sums [chunks, count, C] of a walk: those of a chunk to 0, of the first those of all channels; and all, in
// order, into those of the first.
void clear_sums(const LifShape& shape, Walk walk, int64_t chunk, int count, double* sums);
void add_sums(const LifShape& shape, Walk walk, int count, double* sums);

}  // namespace iirsnn
