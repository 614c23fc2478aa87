// Pools, sums and selections of spikes and counts: 64 channels at once, without unpacking a bit.
#pragma once

#include <cstdint>
#include <vector>

#include "event/plan.h"

namespace iirsnn::event {

// Counts as the engine keeps them: words [frame][row][column][word of 64 channels], one such array ("plane") for each
// binary digit. A frame is one timestep of one image.
struct CountsIn {
  const uint64_t* bits;
  int64_t planes, plane;  // plane: words from one to the next
  int64_t words;          // of a position
};
struct CountsOut {
  uint64_t* bits;
  int64_t planes, plane;
  int64_t words;
};

// One row of a pool's output, in all planes. rows, columns: where in the source it looks.
struct PoolRow {
  CountsIn in;    // from the frame on
  CountsOut out;  // from the row on
  int64_t in_width;
  const Axis& rows;
  const std::vector<Axis>& columns;
};
void pool_spikes(const PoolRow& work);  // any spike in the window is one
// Sums; where multiples are given, each counted row_multiple / rows * column_multiple / columns of its window times.
void pool_counts(const PoolRow& work, int64_t row_multiple, int64_t column_multiple);

// Positions [first, last): out += in, `times` counted; returns the bits that it read.
int64_t add_counts(const CountsIn& in, int64_t times, const CountsOut& out, int64_t first, int64_t last);

// Positions [first, last): channels [from, from + channels) of the one are [to, to + channels) of the other, which is
// zero there.
void copy_channels(const CountsIn& in, int64_t from, int64_t channels, const CountsOut& out, int64_t to, int64_t first,
                   int64_t last);

}  // namespace iirsnn::event
