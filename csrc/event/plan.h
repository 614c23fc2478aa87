// How a layer's work is cut into tasks, and where it meets what: functions of shapes and weights alone.
#pragma once

#include <cstdint>
#include <vector>

#include "event/kernels.h"
#include "event/shape.h"
#include "event/stored_weights.h"

namespace iirsnn::event {

// What a window makes of an image. std::invalid_argument where the window does not fit.
Shape output_shape(const Shape& in, int64_t channels, const Window& window);

// Positions whose window lies over one tap inside an image: those `first` to `last` - 1 along one axis.
struct Span {
  int64_t first, last, in;  // in: where in the image the first one's tap is
};
Span span(int64_t from, int64_t to, int64_t tap, int64_t stride, int64_t before, int64_t size);

// What one position of a pool looks at along an axis: from, from + step, ... below `to`, all inside the image.
struct Axis {
  int64_t from, to, step;

  int64_t size() const { return ceil_div(to - from, step); }
};
Axis window_axis(int64_t position, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t size);
Axis adaptive_axis(int64_t position, int64_t size, int64_t positions);
// The least common multiple of the sizes of all positions.
int64_t axis_multiple(int64_t size, int64_t positions);

// Whether a layer keeps its rows of weights whole: with so few positions an image each row is met once or not at all.
bool whole_rows(bool real, int64_t groups, const Shape& out);

// Outputs from one whole row to the next: an odd number of cache lines, so that a column does not fall into few sets.
int64_t row_pitch(Precision precision, int64_t padded);

// Outputs of one tile that read the same channels.
struct Piece {
  int64_t first, channels;         // that it reads
  int64_t reached;                 // outputs that one event reaches
  int64_t offset = 0;              // of its weights, in elements
  std::vector<uint8_t> carries{};  // of int8 weights: Carry [word][tap]
};

// One tile's outputs [from, to) of all `outputs`, cut where the channels that they read change.
std::vector<Piece> pieces(int64_t from, int64_t to, int64_t outputs, int64_t channels, int64_t groups);

// A convolution's weights [outputs][group_channels][taps].
struct Filters {
  StoredWeights weight;
  int64_t outputs, groups, group_channels, taps;

  float at(int64_t output, int64_t channel, int64_t tap) const {
    return weight[(output * group_channels + channel) * taps + tap];
  }
};

// Where 16-bit sums of the outputs [from, to) over the channels [first, end) have to be carried over: Carry
// [word][tap]. A sum, and any part of one, is at most the sum of |weight| times the largest count, `most`: whatever the
// order of additions, none overflows before that bound does. By digit a block adds at most 64 * 127 = 8128.
std::vector<uint8_t> carries(const Filters& filters, int64_t from, int64_t to, int64_t first, int64_t end,
                             int64_t most);

// Outputs of a tile of a layer with so many of them, padded. Additions to one register wait for each other, and the
// four registers of AVX-512 (`wide`) that hold 64 floats are too few (Cascade Lake: 24 G additions/s, 33 with eight).
int tile_width(Precision precision, int64_t padded, bool grouped, bool wide);

// What there is to cut: a layer over `images` images.
struct Load {
  Shape out;
  int64_t images;
  int64_t steps;   // whose sums are kept apart: 1 where the current is constant
  int64_t padded;  // outputs, with padding
  Precision precision;
  bool rows;  // whole rows of weights
  int tile;   // see tile_width
  int threads;
};

// A task: outputs [output, output + width) of rows [top, bottom) of images [first, last).
struct Strip {
  int64_t tile;
  bool stream;
  int64_t output, width, outputs;  // outputs: the first of them that are real
  int64_t first, last, top, bottom;

  int64_t positions(const Load& load) const { return (last - first) * load.steps * (bottom - top) * load.out.width; }
};

// The strips of a layer: at least a few for every thread, where it is large enough.
std::vector<Strip> cut(const Load& load);

// The kernel taps of rows [top, bottom), in the order of the weights. `line` and `pixel`: strides of the source.
// `lined`: images that lie in a row where a layer has one position each; else 1.
std::vector<Tap> taps(const Window& window, const Shape& in, int64_t out_width, int64_t top, int64_t bottom,
                      int64_t line, int64_t pixel, int64_t lined);

}  // namespace iirsnn::event
