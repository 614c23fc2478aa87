// One call: layer by layer, the tasks of a layer by several threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "event/bits.h"
#include "event/layers.h"
#include "event/thread_pool.h"
#include "event/values.h"

namespace iirsnn::event {
namespace {

// What a thread counts of a layer, on a cache line of its own.
struct alignas(64) Counts {
  int64_t spikes = 0, additions = 0, multiplications = 0, weight_bytes = 0;
};

class Running {
 public:
  Running(const Network& network, const float* images, float* logits, int threads, Call& call)
      : net_(network), images_(images), logits_(logits), threads_(threads), call_(call) {}

  void pool(const Step& step, LayerReport& report);
  void channels(const Step& step, LayerReport& report);
  void sum(const Step& step, LayerReport& report);
  void layer(const Step& step, LayerReport& report);
  void output(const Step& step, LayerReport& report);

 private:
  template <typename F>
  void in_parts(int64_t count, int64_t work, const F& f) const;
  int64_t frames() const { return call_.images * net_.timesteps; }
  int64_t steps(const Step& step) const { return step.constant ? 1 : net_.timesteps; }
  const uint64_t* bits(int64_t source) const { return call_.bits[source - 1].data(); }
  int64_t bytes(int64_t source) const { return 8 * int64_t(call_.bits[source - 1].size()); }
  int64_t plane(const Source& source) const { return frames() * source.image_words(); }
  CountsIn counts(int64_t source) const {
    const Source& from = net_.source(source);
    return {bits(source), from.planes, plane(from), from.words()};
  }
  CountsOut given(int64_t source) const {
    const Source& to = net_.source(source);
    return {call_.bits[source - 1].data(), to.planes, plane(to), to.words()};
  }
  float* values(int64_t source) const {
    return reinterpret_cast<float*>(call_.values[net_.source(source).slot].data());
  }
  int64_t value_bytes(int64_t source) const {
    const Source& from = net_.source(source);
    return from.real() ? frames() * from.values() * int64_t(sizeof(float)) : 0;
  }
  void traffic(const Step& step, LayerReport& report) const;

  void add_up(const Step& step, const Strip& strip, void* sums, Counts& counts) const;
  void add_products(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                    const std::vector<Tap>& taps) const;
  Work add_events(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                  const std::vector<Tap>& taps) const;
  void add_others(const Step& step, const Strip& strip, void* sums, Counts& counts) const;
  void keep(const Step& step, const Strip& strip, const void* sums) const;
  void finish(const Step& step, const Strip& strip, const void* sums, Counts& counts);

  const Network& net_;
  const float* images_;
  float* logits_;
  int threads_;
  Call& call_;
};

// f(first, last) over parts of `count` positions or rows, so many at a time that a part is some thousands of steps of
// work: one is over in a nanosecond.
template <typename F>
void Running::in_parts(int64_t count, int64_t work, const F& f) const {
  const int64_t together = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, work));
  parallel_for(ceil_div(count, together), threads_,
               [&](int64_t task, int) { f(task * together, std::min(count, (task + 1) * together)); });
}

void Running::pool(const Step& step, LayerReport& report) {
  const Source &in = net_.source(step.source), &out = net_.source(step.gives);
  const Window& w = step.window;
  const bool adaptive = step.kind == Step::kAdaptivePool;
  const Shape &from = in.shape, &to = out.shape;
  const auto axes = [&](int64_t size, int64_t positions, int64_t Pair::* of) {
    std::vector<Axis> found;
    for (int64_t i = 0; i < positions; ++i) {
      found.push_back(adaptive ? adaptive_axis(i, size, positions)
                               : window_axis(i, w.kernel.*of, w.stride.*of, w.dilation.*of, w.before.*of, size));
    }
    return found;
  };
  const std::vector<Axis> rows = axes(from.height, to.height, &Pair::y), columns = axes(from.width, to.width, &Pair::x);
  const int64_t window =
      adaptive ? ceil_div(from.height, to.height) * ceil_div(from.width, to.width) : w.kernel.y * w.kernel.x;
  if (in.real()) {
    const int64_t in_row = from.width * from.channels, out_row = to.width * to.channels;
    in_parts(frames() * to.height, out_row * window, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const ValuePoolRow work{values(step.source) + row / to.height * from.height * in_row,
                                values(step.gives) + row * out_row,
                                from.width,
                                from.channels,
                                rows[row % to.height],
                                columns};
        if (step.kind == Step::kMaxPool) {
          pool_largest(work);
        } else {
          pool_averages(work, adaptive ? 0 : window);
        }
      }
    });
    if (step.kind != Step::kMaxPool) {
      report.additions = frames() * to.height * out_row * window;
      report.multiplications = frames() * to.height * out_row;
    }
    report.value_bytes = value_bytes(step.source) + value_bytes(step.gives);
    return;
  }
  const int64_t row_multiple = adaptive ? axis_multiple(from.height, to.height) : 0,
                column_multiple = adaptive ? axis_multiple(from.width, to.width) : 0;
  in_parts(frames() * to.height, to.width * in.words() * window * in.planes, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      PoolRow work{counts(step.source), given(step.gives), from.width, rows[row % to.height], columns};
      work.in.bits += row / to.height * in.image_words();
      work.out.bits += row * to.width * out.words();
      if (step.kind == Step::kMaxPool) {
        pool_spikes(work);
      } else {
        pool_counts(work, row_multiple, column_multiple);
      }
    }
  });
  report.spike_bytes = bytes(step.source) + bytes(step.gives);
}

void Running::channels(const Step& step, LayerReport& report) {
  const Source& out = net_.source(step.gives);
  const int64_t positions = frames() * out.shape.height * out.shape.width;
  in_parts(positions, out.shape.channels / 8 + 1, [&](int64_t first, int64_t last) {
    int64_t to = 0;
    if (out.real()) {
      float* const sums = values(step.gives) + first * out.shape.channels;
      std::fill_n(sums, (last - first) * out.shape.channels, 0.0f);
    } else {
      for (int64_t digit = 0; digit < out.planes; ++digit) {
        std::fill_n(given(step.gives).bits + digit * plane(out) + first * out.words(), (last - first) * out.words(),
                    uint64_t(0));
      }
    }
    for (const Part& part : step.parts) {
      const Source& in = net_.source(part.source);
      float* const sums = out.real() ? values(step.gives) + first * out.shape.channels + to : nullptr;
      if (!out.real()) {
        copy_channels(counts(part.source), part.first, part.channels, given(step.gives), to, first, last);
      } else if (in.real()) {
        add_values(values(part.source) + first * in.shape.channels + part.first, in.shape.channels, part.unit, sums,
                   out.shape.channels, last - first, part.channels);
      } else {
        CountsIn from = counts(part.source);
        from.bits += first * from.words;
        add_counted(from, part.unit, sums, part.first, part.channels, out.shape.channels, last - first);
      }
      to += part.channels;
    }
  });
  traffic(step, report);
}

void Running::sum(const Step& step, LayerReport& report) {
  const Source& out = net_.source(step.gives);
  std::atomic<int64_t> read{0};
  in_parts(frames() * out.shape.height * out.shape.width, out.words() * out.planes, [&](int64_t first, int64_t last) {
    for (int64_t digit = 0; digit < out.planes; ++digit) {
      std::fill_n(given(step.gives).bits + digit * plane(out) + first * out.words(), (last - first) * out.words(),
                  uint64_t(0));
    }
    int64_t mine = 0;
    for (const Term& term : step.terms) {
      mine += add_counts(counts(term.source), term.times, given(step.gives), first, last);
    }
    read += mine;
  });
  report.additions = read;
  traffic(step, report);
}

void Running::output(const Step& step, LayerReport& report) {
  const Source& in = net_.source(step.source);
  const Shape& shape = in.shape;
  const int64_t positions = shape.height * shape.width;
  in_parts(call_.images, net_.timesteps * positions * shape.channels, [&](int64_t first, int64_t last) {
    std::vector<float> sums(positions * shape.channels);
    for (int64_t image = first; image < last; ++image) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t frame = image * net_.timesteps; frame < (image + 1) * net_.timesteps; ++frame) {
        if (in.real()) {
          add_values(values(step.source) + frame * positions * shape.channels, shape.channels, step.unit, sums.data(),
                     shape.channels, positions, shape.channels);
        } else {
          CountsIn from = counts(step.source);
          from.bits += frame * in.image_words();
          add_counted(from, step.unit, sums.data(), 0, shape.channels, shape.channels, positions);
        }
      }
      float* const logits = logits_ + image * positions * shape.channels;
      for (int64_t c = 0; c < shape.channels; ++c) {
        for (int64_t p = 0; p < positions; ++p) logits[c * positions + p] = sums[p * shape.channels + c];
      }
    }
  });
  traffic(step, report);
}

void Running::layer(const Step& step, LayerReport& report) {
  const Load load{step.out, call_.images, steps(step), step.padded(), step.precision, step.rows, threads_};
  const std::vector<Strip> strips = cut(load);
  int64_t size = 0;
  for (const Strip& strip : strips) size = std::max(size, strip.positions(load) * strip.width * 4);
  if (is_integer(step.precision)) size += size / 2;  // 16-bit sums beside the totals
  size = round_up(size, 64);
  const int workers = int(std::min<int64_t>(threads_, int64_t(strips.size())));
  if (call_.sums.size() < size * workers) call_.sums = Memory(size * workers);
  std::vector<Counts> parts(workers);
  parallel_for(int64_t(strips.size()), workers, [&](int64_t i, int worker) {
    char* mine = call_.sums.data() + worker * size;
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

// The bytes of what a step reads and gives.
void Running::traffic(const Step& step, LayerReport& report) const {
  for (const int64_t source : sources_of(step)) {
    if (source == 0) continue;
    report.spike_bytes += bytes(source);
    report.value_bytes += value_bytes(source);
  }
  if (step.gives == 0) return;
  report.spike_bytes += bytes(step.gives);
  report.value_bytes += value_bytes(step.gives);
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
  work.weights = reinterpret_cast<const float*>(c.weights->data() + c.start) + piece.offset;
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
      c.weights->data() + c.start + (piece.offset + (step.rows ? strip.output : 0)) * weight_bytes(step.precision);
  work.pitch = step.rows ? row_pitch(step.precision, step.padded()) : strip.width;
  work.sums = sums;
  work.width = int(strip.width);
  if (is_integer(step.precision)) {
    work.positions = count * area;
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

}  // namespace

void run_network(const Network& network, const float* images, float* logits, int threads, Call& call) {
  call.report.assign(network.steps.size(), {});
  call.bits.resize(network.sources.size());
  for (size_t i = 0; i < network.sources.size(); ++i) {
    const Source& source = network.sources[i];
    call.bits[i].resize(source.planes * call.images * network.timesteps * source.image_words());
  }
  if (call.images == 0) return;
  call.values.resize(network.slots.size());
  for (size_t i = 0; i < network.slots.size(); ++i) {
    const int64_t size = network.slots[i] * call.images * network.timesteps * int64_t(sizeof(float));
    if (call.values[i].size() < size) call.values[i] = Memory(size);
  }
  Running running(network, images, logits, threads, call);
  for (size_t i = 0; i < network.steps.size(); ++i) {
    const Step& step = network.steps[i];
    const auto start = std::chrono::steady_clock::now();
    switch (step.kind) {
      case Step::kMaxPool:
      case Step::kAveragePool:
      case Step::kAdaptivePool:
        running.pool(step, call.report[i]);
        break;
      case Step::kChannels:
        running.channels(step, call.report[i]);
        break;
      case Step::kSum:
        running.sum(step, call.report[i]);
        break;
      case Step::kOutput:
        running.output(step, call.report[i]);
        break;
      default:
        running.layer(step, call.report[i]);
    }
    call.report[i].milliseconds =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
}

}  // namespace iirsnn::event
