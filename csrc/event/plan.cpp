#include "event/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>

namespace iirsnn::event {
namespace {

// Positions of a strip: enough of them to read a block of weights once for many, few enough to stay in the L2 cache.
constexpr int64_t kPositions = 256, kFewPositions = 32;
constexpr int64_t kStreamBytes = 512 << 10;
constexpr int64_t kStreamBlock = 256 << 10;  // of weights that several positions read
constexpr int64_t kFewestPositions = 4;
constexpr int64_t kMostOfWindow = 1 << 16;
// Of a layer with whole rows: from so many positions on, tiles of them are worth reading them once for each tile.
constexpr int64_t kPositionsToTile = 32;

int64_t positions(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t after) {
  return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace

Shape output_shape(const Shape& in, int64_t channels, const Window& w) {
  check(w.kernel.y > 0 && w.kernel.x > 0 && w.stride.y > 0 && w.stride.x > 0 && w.dilation.y > 0 && w.dilation.x > 0,
        "window: expected a positive kernel, stride and dilation");
  for (const Pair& p : {w.kernel, w.stride, w.dilation, w.before, w.after}) {
    check(p.y >= 0 && p.x >= 0 && p.y <= kMostOfWindow && p.x <= kMostOfWindow,
          "window: expected numbers from 0 to " + std::to_string(kMostOfWindow));
  }
  check(in.height + w.before.y + w.after.y > w.dilation.y * (w.kernel.y - 1) &&
            in.width + w.before.x + w.after.x > w.dilation.x * (w.kernel.x - 1),
        "window: expected a kernel that fits the padded input of " + std::to_string(in.height) + " x " +
            std::to_string(in.width) + ", got " + std::to_string(w.kernel.y) + " x " + std::to_string(w.kernel.x));
  return {channels, positions(in.height, w.kernel.y, w.stride.y, w.dilation.y, w.before.y, w.after.y),
          positions(in.width, w.kernel.x, w.stride.x, w.dilation.x, w.before.x, w.after.x)};
}

Span span(int64_t from, int64_t to, int64_t tap, int64_t stride, int64_t before, int64_t size) {
  const int64_t shift = before - tap;  // in = position * stride - shift
  const int64_t first = std::max(from, shift > 0 ? ceil_div(shift, stride) : 0);
  const int64_t last = std::min(to, size + shift > 0 ? ceil_div(size + shift, stride) : 0);
  return {first, std::max(first, last), first * stride - shift};
}

Axis window_axis(int64_t position, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t size) {
  const int64_t start = position * stride - before, outside = start < 0 ? ceil_div(-start, dilation) : 0;
  const int64_t from = start + outside * dilation;
  return {from, std::max(from, std::min(size, start + (kernel - 1) * dilation + 1)), dilation};
}

Axis adaptive_axis(int64_t position, int64_t size, int64_t positions) {
  return {position * size / positions, ceil_div((position + 1) * size, positions), 1};
}

int64_t axis_multiple(int64_t size, int64_t positions) {
  int64_t multiple = 1;
  for (int64_t i = 0; i < positions; ++i) {
    multiple = std::lcm(multiple, adaptive_axis(i, size, positions).size());
    check(multiple < kMostOfWindow, "adaptive pool: expected windows whose areas have a smaller common multiple");
  }
  return multiple;
}

bool whole_rows(bool real, int64_t groups, const Shape& out) {
  return !real && groups == 1 && out.height * out.width <= kFewestPositions;
}

int64_t row_pitch(Precision precision, int64_t padded) {
  const int64_t lines = ceil_div(padded * weight_bytes(precision), 64);
  return (lines + 1 - lines % 2) * 64 / weight_bytes(precision);
}

std::vector<Piece> pieces(int64_t from, int64_t to, int64_t outputs, int64_t channels, int64_t groups) {
  to = std::min(to, outputs);
  if (groups == 1) return {Piece{0, channels, to - from}};
  const int64_t group_outputs = outputs / groups, group_channels = channels / groups;
  std::vector<Piece> found;
  while (from < to) {
    const int64_t group = from / group_outputs;
    const int64_t whole = from == group * group_outputs ? (to - from) / group_outputs : 0;
    const int64_t next = whole ? from + whole * group_outputs : std::min(to, (group + 1) * group_outputs);
    found.push_back(
        {group * group_channels, std::max<int64_t>(whole, 1) * group_channels, std::min(next - from, group_outputs)});
    from = next;
  }
  return found;
}

std::vector<uint8_t> carries(const Filters& filters, int64_t from, int64_t to, int64_t first, int64_t end,
                             int64_t most) {
  const int64_t group_outputs = filters.outputs / filters.groups, group_channels = filters.group_channels;
  to = std::min(to, filters.outputs);
  std::vector<int64_t> sums(to - from), block(to - from);
  std::vector<uint8_t> result;
  for (int64_t next; first < end; first = next) {
    next = std::min(end, (first / kWord + 1) * kWord);
    for (int64_t tap = 0; tap < filters.taps; ++tap) {
      int64_t largest = 0, largest_block = 0;
      for (int64_t k = from; k < to; ++k) {
        int64_t& sum = block[k - from] = 0;
        const int64_t group = k / group_outputs * group_channels;
        for (int64_t c = std::max(first, group); c < std::min(next, group + group_channels); ++c) {
          sum += most * int64_t(std::fabs(filters.at(k, c - group, tap)));
        }
        largest_block = std::max(largest_block, sum);
        largest = std::max(largest, sums[k - from] + sum);
      }
      constexpr int64_t kLimit = std::numeric_limits<int16_t>::max();
      const Carry carry = largest_block > kLimit ? Carry::by_digit : largest > kLimit ? Carry::before : Carry::none;
      for (int64_t k = 0; k < to - from; ++k) {
        sums[k] = carry == Carry::by_digit ? 0 : carry == Carry::before ? block[k] : sums[k] + block[k];
      }
      result.push_back(uint8_t(carry));
    }
  }
  return result;
}

int tile_width(Precision precision, int64_t padded, bool grouped, bool wide) {
  return is_integer(precision) || (wide && padded % 128 == 0 && !grouped) ? 128 : 64;
}

std::vector<Strip> cut(const Load& load) {
  const int64_t height = load.out.height, width = load.out.width, padded = load.padded, threads = load.threads;
  const int64_t image = load.steps * height * width, all = load.images * image;
  const bool stream = load.rows && all < kPositionsToTile;
  int64_t outputs = load.tile, images = load.images, rows = height;
  if (stream) {
    int64_t fits = kStreamBytes / (all * int64_t(sizeof(float)));
    if (all > 1) fits = std::min(fits, kStreamBlock / (kWord * weight_bytes(load.precision)));
    outputs =
        std::min({padded, round_up(ceil_div(padded, threads), kWord), std::max<int64_t>(fits / kWord, 4) * kWord});
  } else {
    const int64_t tiles = ceil_div(padded, outputs);
    int64_t wanted = kPositions;
    while (threads > 1 && wanted > kFewPositions && tiles * ceil_div(all, wanted) < 3 * threads) wanted /= 2;
    images = std::max<int64_t>(1, std::min(load.images, wanted / image));
    if (image > wanted) {
      rows = std::max<int64_t>(1, std::min(height, wanted / (load.steps * width)));
      rows = ceil_div(height, ceil_div(height, rows));
    }
  }
  std::vector<Strip> strips;
  for (int64_t output = 0; output < padded; output += outputs) {
    const int64_t here = std::min(outputs, padded - output);
    for (int64_t first = 0; first < load.images; first += images) {
      for (int64_t top = 0; top < height; top += rows) {
        strips.push_back({load.rows ? 0 : output / outputs, stream, output, here,
                          std::min(here, load.out.channels - output), first, std::min(load.images, first + images), top,
                          std::min(height, top + rows)});
      }
    }
  }
  return strips;
}

std::vector<Tap> taps(const Window& w, const Shape& in, int64_t out_width, int64_t top, int64_t bottom, int64_t line,
                      int64_t pixel, int64_t lined) {
  std::vector<Tap> found;
  found.reserve(w.kernel.y * w.kernel.x);
  for (int64_t ky = 0; ky < w.kernel.y; ++ky) {
    const Span ys = span(top, bottom, ky * w.dilation.y, w.stride.y, w.before.y, in.height);
    for (int64_t kx = 0; kx < w.kernel.x; ++kx) {
      const Span xs = span(0, out_width, kx * w.dilation.x, w.stride.x, w.before.x, in.width);
      Tap tap{0, 0, 0, 0};  // of a tap that lies over the image nowhere: no address outside it is ever formed
      if (ys.first < ys.last && xs.first < xs.last) {
        tap = {ys.in * line + xs.in * pixel, (ys.first - top) * out_width + xs.first, int(ys.last - ys.first),
               int((xs.last - xs.first) * lined)};
      }
      found.push_back(tap);
    }
  }
  return found;
}

}  // namespace iirsnn::event
