// One call: layer by layer, the tasks of a layer by several threads.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "event/layers.h"
#include "event/thread_pool.h"

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
  void layer(const Step& step, LayerReport& report);

 private:
  int64_t steps(const Step& step) const { return step.image ? 1 : net_.timesteps; }
  const uint64_t* bits(int64_t source) const { return call_.bits[source - 1].data(); }
  int64_t bytes(int64_t source) const { return 8 * int64_t(call_.bits[source - 1].size()); }
  int64_t plane(const Source& source) const { return call_.images * net_.timesteps * source.image_words(); }

  void add_up(const Step& step, const Strip& strip, void* sums, Counts& counts) const;
  void add_products(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                    const std::vector<Tap>& taps) const;
  Work add_events(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                  const std::vector<Tap>& taps) const;
  void finish(const Step& step, const Strip& strip, const void* sums, Counts& counts);

  const Network& net_;
  const float* images_;
  float* logits_;
  int threads_;
  Call& call_;
};

void Running::pool(const Step& step, LayerReport& report) {
  const Source &in = net_.source(step.source), &out = net_.source(step.gives);
  const uint64_t* const from_bits = bits(step.source);
  uint64_t* const to_bits = call_.bits[step.gives - 1].data();
  const int64_t words = in.words(), in_plane = plane(in), out_plane = plane(out);
  const Window& w = step.window;
  const bool counts = step.kind == Step::kAveragePool;
  const auto pool_row = [&](int64_t row) {
    const int64_t image = row / out.shape.height, y = row % out.shape.height;
    uint64_t* to = to_bits + row * out.shape.width * words;
    for (int64_t digit = 0; digit < out.planes; ++digit) {
      std::fill_n(to + digit * out_plane, out.shape.width * words, uint64_t(0));
    }
    for (int64_t ky = 0; ky < w.kernel.y; ++ky) {
      const int64_t in_y = y * w.stride.y + ky * w.dilation.y - w.before.y;
      if (in_y < 0 || in_y >= in.shape.height) continue;
      for (int64_t kx = 0; kx < w.kernel.x; ++kx) {
        const Span xs = span(0, out.shape.width, kx * w.dilation.x, w.stride.x, w.before.x, in.shape.width);
        for (int64_t x = xs.first, in_x = xs.in; x < xs.last; ++x, in_x += w.stride.x) {
          const uint64_t* from = from_bits + ((image * in.shape.height + in_y) * in.shape.width + in_x) * words;
          for (int64_t word = 0; word < words; ++word) {
            uint64_t* sum = to + x * words + word;
            if (!counts) {
              *sum |= from[word];
              continue;
            }
            for (int64_t digit = 0; digit < in.planes; ++digit) {  // binary addition of 64 counts at once
              uint64_t carry = from[word + digit * in_plane];
              for (int64_t high = digit; carry; ++high) {
                const uint64_t old = sum[high * out_plane];
                sum[high * out_plane] = old ^ carry;
                carry &= old;
              }
            }
          }
        }
      }
    }
  };
  const int64_t rows = call_.images * net_.timesteps * out.shape.height;
  // words read in a row of the output: a task is some thousands of them, for one is over in a nanosecond
  const int64_t work = out.shape.width * words * w.kernel.y * w.kernel.x * in.planes;
  const int64_t together = std::max<int64_t>(1, 8192 / work);
  parallel_for(ceil_div(rows, together), threads_, [&](int64_t task, int) {
    const int64_t last = std::min(rows, (task + 1) * together);
    for (int64_t row = task * together; row < last; ++row) pool_row(row);
  });
  report.spike_bytes = 8 * (in.planes * in_plane + out.planes * out_plane);
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
  for (const Connection& c : step.connections) {
    if (c.source) report.spike_bytes += bytes(c.source);
  }
  for (const Skip& skip : step.skips) report.spike_bytes += bytes(skip.source);
  if (step.kind == Step::kNeurons) {
    report.neurons = step.out.channels * step.out.height * step.out.width;
    report.spike_bytes += bytes(step.gives);
  }
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
    const int64_t pixel = c.source ? net_.source(c.source).words() : 1;
    const std::vector<Tap> reach =
        taps(c.window, c.in, step.out.width, strip.top, strip.bottom, pixel * c.in.width, pixel, single ? count : 1);
    int64_t reached = 0;  // pairs of a tap and a position
    for (const Tap& tap : reach) reached += int64_t(tap.rows) * tap.columns;
    if (!single) reached *= count;
    for (const Piece& piece : c.tiles[strip.tile]) {
      const int64_t outputs = std::min(piece.reached, strip.outputs);
      if (step.image) {
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
}

void Running::add_products(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                           const std::vector<Tap>& taps) const {
  const int64_t image = c.in.channels * c.in.height * c.in.width;
  const bool single = step.out.height * step.out.width == 1;
  Products work{};
  work.image = images_ + strip.first * image;
  work.images = single ? 1 : strip.last - strip.first;
  work.image_in = image;
  work.image_out = (strip.bottom - strip.top) * step.out.width;
  work.channel_in = c.in.height * c.in.width;
  work.row_in = c.window.stride.y * c.in.width;
  work.row_out = step.out.width;
  work.column_in = single ? image : c.window.stride.x;
  work.taps = taps.data();
  work.tap_count = int(taps.size());
  work.first_channel = int(piece.first);
  work.channels = int(piece.channels);
  work.weights = reinterpret_cast<const float*>(c.weights->data() + c.start) + piece.offset;
  work.pitch = strip.width;
  work.sums = static_cast<float*>(sums);
  work.width = int(strip.width);
  event::add_products(work);
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

void Running::finish(const Step& step, const Strip& strip, const void* sums, Counts& counts) {
  const bool integer = is_integer(step.precision);
  if (step.kind == Step::kReadout) {
    Logits work{};
    work.sums = sums;
    work.integer = integer;
    work.constant = step.image;
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
  work.constant = step.image;
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
  Running running(network, images, logits, threads, call);
  for (size_t i = 0; i < network.steps.size(); ++i) {
    const Step& step = network.steps[i];
    const auto start = std::chrono::steady_clock::now();
    if (step.kind == Step::kMaxPool || step.kind == Step::kAveragePool) {
      running.pool(step, call.report[i]);
    } else {
      running.layer(step, call.report[i]);
    }
    call.report[i].milliseconds =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
}

}  // namespace iirsnn::event
