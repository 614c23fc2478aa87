// One call: layer by layer, the tasks of a layer by several threads.
#include "event/running.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace iirsnn::event {

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
    if (call.values[i].size() < size) call.values[i] = Buffer<char>::zeros(size);
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
