// Layers of a call: strips of sums, which events, values and products add to, and what their neurons give.
#include "event/running.h"

#include <algorithm>
#include <cstring>

namespace iirsnn::event {

void Running::layer(const Step& step, LayerReport& report) {
  const Load load{step.out, call_.images, steps(step), step.padded(), step.precision, step.rows, step.tile, threads_};
  const std::vector<Strip> strips = cut(load);
  int64_t size = 0;
  for (const Strip& strip : strips) size = std::max(size, strip.positions(load) * strip.width * 4);
  if (is_integer(step.precision)) size += size / 2;  // 16-bit sums beside the totals
  size = round_up(size, 64);
  const int workers = int(std::min<int64_t>(threads_, int64_t(strips.size())));
  if (call_.sums.size() < size * workers) call_.sums = Buffer<char>::zeros(size * workers);
  std::vector<Counts> parts(workers);
  parallel_for(int64_t(strips.size()), workers, [&](int64_t i, int worker) {
    char* mine = call_.sums.get() + worker * size;
    add_up(step, strips[i], mine, parts[worker]);
    finish(step, strips[i], mine, parts[worker]);
  });
  for (const Counts& part : parts) {
    report.spikes += part.spikes;
    report.additions += part.additions;
    report.multiplications += part.multiplications;
    report.weight_bytes += part.weight_bytes;
  }
  if (step.kind == Step::kNeurons) report.neurons = step.out.channels * step.out.height * step.out.width;
  traffic(step, report);
}

void Running::add_up(const Step& step, const Strip& strip, void* sums, Counts& counts) const {
  const int64_t count = (strip.last - strip.first) * steps(step), area = (strip.bottom - strip.top) * step.out.width,
                width = strip.width;
  if (is_integer(step.precision)) {
    std::memset(sums, 0, count * area * width * (sizeof(int32_t) + sizeof(int16_t)));
  } else {
    float* to = static_cast<float*>(sums);
    for (int64_t i = 0; i < count * area; ++i) std::copy_n(step.bias.data() + strip.output, width, to + i * width);
  }
  const bool single = step.out.height * step.out.width == 1;  // then images are what lies in a row
  for (const Connection& c : step.connections) {
    const bool image = c.source == 0, real = image || net_.source(c.source).real();
    const int64_t pixel = image ? 1 : real ? c.in.channels : net_.source(c.source).words();
    const std::vector<Tap> reach =
        taps(c.window, c.in, step.out.width, strip.top, strip.bottom, pixel * c.in.width, pixel, single ? count : 1);
    int64_t reached = 0;  // pairs of a tap and a position
    for (const Tap& tap : reach) reached += int64_t(tap.rows) * tap.columns;
    if (!single) reached *= count;
    if (c.each) {
      const Piece piece{strip.output, strip.outputs, 1};
      add_products(step, c, piece, strip, sums, reach);
      counts.multiplications += reached * strip.outputs;
      counts.weight_bytes += reached * strip.outputs * weight_bytes(Precision::fp32);
      continue;
    }
    for (const Piece& piece : c.tiles[strip.tile]) {
      const int64_t outputs = std::min(piece.reached, strip.outputs);
      if (real) {
        add_products(step, c, piece, strip, sums, reach);
        counts.multiplications += reached * piece.channels * outputs;
        counts.weight_bytes += reached * piece.channels * outputs * weight_bytes(Precision::fp32);
      } else {
        const Work done = add_events(step, c, piece, strip, sums, reach);
        counts.additions += (done.events + done.doublings) * outputs;
        counts.weight_bytes += done.events * outputs * weight_bytes(step.precision);
      }
    }
  }
  if (!step.others.empty()) add_others(step, strip, sums, counts);
}

// The skips that the neurons do not add themselves.
void Running::add_others(const Step& step, const Strip& strip, void* sums, Counts& counts) const {
  const int64_t area = (strip.bottom - strip.top) * step.out.width;
  for (int64_t i = 0; i < (strip.last - strip.first) * net_.timesteps; ++i) {
    const int64_t first = ((strip.first * net_.timesteps + i) * step.out.height + strip.top) * step.out.width;
    float* const to = static_cast<float*>(sums) + i * area * strip.width;
    for (const Skip& skip : step.others) {
      const Source& from = net_.source(skip.source);
      if (from.real()) {
        add_values(values(skip.source) + first * from.shape.channels + strip.output, from.shape.channels, skip.unit, to,
                   strip.width, area, strip.outputs);
        counts.additions += area * strip.outputs;
      } else {
        CountsIn in = this->counts(skip.source);
        in.bits += first * in.words;
        counts.additions += add_counted(in, skip.unit, to, strip.output, strip.outputs, strip.width, area);
      }
    }
  }
}

void Running::add_products(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                           const std::vector<Tap>& taps) const {
  const int64_t image = c.in.channels * c.in.height * c.in.width, count = (strip.last - strip.first) * steps(step);
  const bool single = step.out.height * step.out.width == 1;
  const int64_t pixel = c.source ? c.in.channels : 1;  // the image alone keeps its channels apart
  Products work{};
  work.image = (c.source ? values(c.source) : images_) + strip.first * steps(step) * image;
  work.images = single ? 1 : count;
  work.image_in = image;
  work.image_out = (strip.bottom - strip.top) * step.out.width;
  work.channel_in = c.source ? 1 : c.in.height * c.in.width;
  work.row_in = c.window.stride.y * c.in.width * pixel;
  work.row_out = step.out.width;
  work.column_in = single ? image : c.window.stride.x * pixel;
  work.taps = taps.data();
  work.tap_count = int(taps.size());
  work.first_channel = int(piece.first);
  work.channels = int(piece.channels);
  work.weights = reinterpret_cast<const float*>(c.weights->get() + c.start) + piece.offset;
  work.pitch = strip.width;
  work.sums = static_cast<float*>(sums);
  work.width = int(strip.width);
  if (!c.each) return event::add_products(work);
  work.weights += strip.output;
  work.pitch = step.padded();
  add_each_product(work);
}

Work Running::add_events(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                         const std::vector<Tap>& taps) const {
  const Source& from = net_.source(c.source);
  const int64_t image = from.image_words(), count = (strip.last - strip.first) * net_.timesteps,
                area = (strip.bottom - strip.top) * step.out.width, last = piece.first + piece.channels - 1;
  const bool single = step.out.height * step.out.width == 1;
  Additions work{};
  work.bits = bits(c.source) + strip.first * net_.timesteps * image;
  work.planes = int(from.planes);
  work.plane = plane(from);
  work.images = single ? 1 : count;
  work.image_in = image;
  work.image_out = area;
  work.row_in = c.window.stride.y * from.words() * c.in.width;
  work.row_out = step.out.width;
  work.column_in = single ? image : c.window.stride.x * from.words();
  work.taps = taps.data();
  work.tap_count = int(taps.size());
  work.first_word = int(piece.first / kWord);
  work.words = int(last / kWord - piece.first / kWord + 1);
  work.first_mask = ~uint64_t(0) << (piece.first % kWord);
  work.last_mask = ~uint64_t(0) >> (kWord - 1 - last % kWord);
  work.channels = int(piece.channels);
  work.whole = piece.channels == c.in.channels;
  work.weights =
      c.weights->get() + c.start + (piece.offset + (step.rows ? strip.output : 0)) * weight_bytes(step.precision);
  work.pitch = step.rows ? row_pitch(step.precision, step.padded()) : strip.width;
  work.sums = sums;
  work.width = int(strip.width);
  work.positions = count * area;
  if (is_integer(step.precision)) {
    work.totals = static_cast<int32_t*>(sums);
    work.sums = work.totals + work.positions * strip.width;
    work.carries = piece.carries.data();
  }
  Work done;
  if (strip.stream) {
    add_stream(step.precision, work, done);
  } else {
    add_tile(step.precision, work, done);
  }
  return done;
}

// Sums as values, of each timestep where they are constant.
void Running::keep(const Step& step, const Strip& strip, const void* sums) const {
  const int64_t area = (strip.bottom - strip.top) * step.out.width, channels = step.out.channels;
  const bool integer = is_integer(step.precision);
  for (int64_t i = 0; i < (strip.last - strip.first) * net_.timesteps; ++i) {
    const int64_t first = ((strip.first * net_.timesteps + i) * step.out.height + strip.top) * step.out.width;
    const int64_t at = (step.constant ? i / net_.timesteps : i) * area * strip.width;
    float* to = values(step.gives) + first * channels + strip.output;
    for (int64_t p = 0; p < area; ++p, to += channels) {
      if (!integer) {
        std::copy_n(static_cast<const float*>(sums) + at + p * strip.width, strip.outputs, to);
        continue;
      }
      const int32_t* const from = static_cast<const int32_t*>(sums) + at + p * strip.width;
      for (int64_t k = 0; k < strip.outputs; ++k) {
        to[k] = float(from[k]) * step.scale[strip.output + k] + step.bias[strip.output + k];
      }
    }
  }
}

void Running::finish(const Step& step, const Strip& strip, const void* sums, Counts& counts) {
  if (step.kind == Step::kCurrents) return keep(step, strip, sums);
  const bool integer = is_integer(step.precision);
  if (step.kind == Step::kReadout) {
    Logits work{};
    work.sums = sums;
    work.integer = integer;
    work.constant = step.constant;
    work.images = strip.last - strip.first;
    work.timesteps = net_.timesteps;
    work.width = int(strip.width);
    work.outputs = int(strip.outputs);
    work.scale = integer ? step.scale.data() + strip.output : nullptr;
    work.bias = step.bias.data() + strip.output;
    work.stride = step.out.channels;
    work.logits = logits_ + strip.first * work.stride + strip.output;
    read_out(work);
    return;
  }
  const Source& out = net_.source(step.gives);
  const int64_t at = strip.first * net_.timesteps * out.image_words() + strip.top * out.shape.width * out.words() +
                     strip.output / kWord;
  Neurons work{};
  work.sums = sums;
  work.integer = integer;
  work.constant = step.constant;
  work.images = strip.last - strip.first;
  work.timesteps = net_.timesteps;
  work.positions = (strip.bottom - strip.top) * step.out.width;
  work.width = int(strip.width);
  work.outputs = int(strip.outputs);
  work.scale = integer ? step.scale.data() + strip.output : nullptr;
  work.bias = step.bias.data() + strip.output;
  work.threshold = step.threshold.data() + strip.output;
  work.leak = step.leak.data() + strip.output;
  work.v_reset = step.v_reset;
  work.reset = step.reset;
  if (!step.skips.empty()) {
    const Source& skip = net_.source(step.skips[0].source);
    work.skip = bits(step.skips[0].source) + at;
    work.skip_planes = int(skip.planes);
    work.skip_plane = plane(skip);
    work.skip_unit = step.skips[0].unit;
  }
  work.spikes = call_.bits[step.gives - 1].data() + at;
  work.words = out.words();
  work.image_words = out.image_words();
  const Fired fired = fire(work);
  counts.spikes += fired.spikes;
  counts.additions += fired.skips;
}

}  // namespace iirsnn::event
