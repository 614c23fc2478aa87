// Real values between layers that no neuron parts: float [frame][row][column][channel]. A frame is one timestep of one
// image. Every sum is made in one order, whatever the processor and the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "event/bits.h"
#include "event/kernels.h"
#include "event/plan.h"

namespace iirsnn::event {

// One row of a pool's output.
struct ValuePoolRow {
  const float* in;  // from the frame on
  float* out;       // from the row on
  int64_t in_width, channels;
  const Axis& rows;
  const std::vector<Axis>& columns;
};
void pool_largest(const ValuePoolRow& work);
// Sums over an area: that of every window, or 0: of those values that lie in it.
void pool_averages(const ValuePoolRow& work, int64_t area);

// sums [position][width] += unit * values [position][channels], `channels` of them; strides count numbers.
void add_values(const float* values, int64_t stride, float unit, float* sums, int64_t width, int64_t positions,
                int64_t channels);
// The same of counts, from the channel `from` on. Returns the bits that it read.
int64_t add_counted(const CountsIn& in, float unit, float* sums, int64_t from, int64_t channels, int64_t width,
                    int64_t positions);

// A convolution with an output for each channel: sums += value * weight. Work as of add_products, but weights
// [tap][pitch] and the first channel is that of the first output.
void add_each_product(const Products& work);

}  // namespace iirsnn::event
