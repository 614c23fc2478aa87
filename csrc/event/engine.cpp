#include "event/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>

#include "event/layers.h"

namespace iirsnn::event {

// Calls that nobody holds any more. Without a lock, so that a fork finds none taken.
class Shelf {
 public:
  ~Shelf() {
    for (auto& place : places_) delete place.load();
  }
  std::unique_ptr<Call> take() {
    for (auto& place : places_) {
      if (Call* call = place.exchange(nullptr)) return std::unique_ptr<Call>(call);
    }
    return std::make_unique<Call>();
  }
  void put(Call* call) {
    for (auto& place : places_) {
      Call* none = nullptr;
      if (place.compare_exchange_strong(none, call)) return;
    }
    delete call;
  }

 private:
  std::array<std::atomic<Call*>, 8> places_{};
};

namespace {

void store_weight(Precision precision, void* weights, int64_t at, int64_t output, float value) {
  if (precision == Precision::fp32) {
    static_cast<float*>(weights)[at + output] = value;
  } else if (precision == Precision::bf16) {  // outputs 16 apart side by side; value is a bf16
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const int64_t within = output % 32;
    static_cast<uint16_t*>(weights)[at + output - within + within % 16 * 2 + within / 16] = uint16_t(bits >> 16);
  } else {
    static_cast<int8_t*>(weights)[at + output] = int8_t(value);
  }
}

}  // namespace

Engine::Engine(Shape image, int64_t timesteps)
    : network_(new Network{image, timesteps, {}, {}}), shelf_(std::make_shared<Shelf>()) {
  check(image.channels > 0 && image.height > 0 && image.width > 0,
        "image: expected a positive number of channels, rows and columns");
  check(timesteps > 0, "timesteps: expected at least 1, got " + std::to_string(timesteps));
}
Engine::~Engine() = default;

const Source& Engine::source(int64_t number) const {
  const int64_t count = int64_t(network_->sources.size());
  check(number > 0 && number <= count, "source: expected the number of an earlier layer, 1 to " +
                                           std::to_string(count) + ", got " + std::to_string(number));
  return network_->source(number);
}

Shape Engine::shape(int64_t number) const { return number == 0 ? network_->image : source(number).shape; }

int64_t Engine::outputs() const {
  const std::vector<Step>& steps = network_->steps;
  check(!steps.empty() && steps.back().kind == Step::kReadout, "network: expected a readout as its last layer");
  return steps.back().out.channels;
}

int64_t Engine::add_step(Step step, int64_t most) {
  std::vector<Step>& steps = network_->steps;
  check(steps.empty() || steps.back().kind != Step::kReadout, "network: expected nothing after the readout");
  if (step.kind != Step::kReadout) {
    int64_t planes = 1;
    while (most >> planes) ++planes;
    network_->sources.push_back({step.out, most, planes});
    step.gives = int64_t(network_->sources.size());
  }
  steps.push_back(std::move(step));
  return steps.back().gives;
}

Step Engine::pool(int64_t number, const Window& window) const {
  Step step{};
  step.source = number;
  step.window = window;
  step.out = output_shape(source(number).shape, source(number).shape.channels, window);
  return step;
}

int64_t Engine::add_max_pool(int64_t number, const Window& window) {
  check(source(number).planes == 1, "max pool: expected spikes, got the counts of an average pool");
  Step step = pool(number, window);
  step.kind = Step::kMaxPool;
  return add_step(std::move(step), 1);
}

int64_t Engine::add_average_pool(int64_t number, const Window& window) {
  Step step = pool(number, window);
  step.kind = Step::kAveragePool;
  const int64_t most = source(number).most * window.kernel.y * window.kernel.x;
  check(most < (1 << 16), "average pool: expected windows of fewer than 65536 spikes, got " + std::to_string(most));
  return add_step(std::move(step), most);
}

Connection Engine::connect(const Synapses& s, const LayerParameters& parameters) const {
  const Shape in = shape(s.source);
  check(s.outputs > 0, "outputs: expected at least 1, got " + std::to_string(s.outputs));
  check(s.groups > 0 && in.channels % s.groups == 0 && s.outputs % s.groups == 0,
        "groups: expected a divisor of " + std::to_string(in.channels) + " channels and " + std::to_string(s.outputs) +
            " outputs, got " + std::to_string(s.groups));
  const Shape out = output_shape(in, s.outputs, s.window);
  const bool image = s.source == 0, rows = whole_rows(image, s.groups, out);
  const Precision precision = image ? Precision::fp32 : parameters.precision;
  const Filters filters{s.weight, s.outputs, s.groups, in.channels / s.groups, s.window.kernel.y * s.window.kernel.x};
  const int64_t taps = filters.taps, group_channels = filters.group_channels, group_outputs = s.outputs / s.groups;
  check(!is_integer(precision) ||
            group_channels * taps * source(s.source).most < std::numeric_limits<int32_t>::max() / 127,
        "int8: expected fewer than 2^31 / 127 spikes for a neuron, which 32-bit sums hold");

  Connection made{s.source, in, s.window, {}, nullptr, 0};
  const int64_t padded = round_up(s.outputs, row_unit(precision));
  const int64_t tile = rows ? padded : tile_width(precision);
  const auto pitch = [&](int64_t width) { return rows ? row_pitch(precision, padded) : width; };
  int64_t size = 0;
  for (int64_t from = 0; from < padded; from += tile) {
    made.tiles.push_back(pieces(from, from + tile, s.outputs, in.channels, s.groups));
    for (Piece& piece : made.tiles.back()) {
      piece.offset = size;
      size += piece.channels * taps * pitch(std::min(tile, padded - from));
    }
  }
  made.bytes = size * weight_bytes(precision);
  made.weights = std::make_shared<Memory>(made.bytes);

  for (int64_t from = 0; from < padded; from += tile) {
    const int64_t width = std::min(tile, padded - from);
    for (Piece& piece : made.tiles[from / tile]) {
      int64_t row = piece.offset;
      const int64_t end = piece.first + piece.channels;
      for (int64_t block = piece.first; block < end;) {  // the channels of one word, or all values of a pixel
        const int64_t next = image ? end : std::min(end, (block / kWord + 1) * kWord);
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = block; c < next; ++c, row += pitch(width)) {
            const int64_t group = c / group_channels;
            const int64_t first = std::max(from, group * group_outputs);
            const int64_t last = std::min({from + width, (group + 1) * group_outputs, s.outputs});
            for (int64_t k = first; k < last; ++k) {
              store_weight(precision, made.weights->data(), row, k - from, filters.at(k, c % group_channels, tap));
            }
          }
        }
        block = next;
      }
      if (is_integer(precision))
        piece.carries = carries(filters, from, from + width, piece.first, end, source(s.source).most);
    }
  }
  return made;
}

Step Engine::layer(const std::vector<Synapses>& synapses, const LayerParameters& parameters) const {
  check(!synapses.empty(), "synapses: expected at least one source, got none");
  Step step{};
  step.image = synapses[0].source == 0;
  for (const Synapses& s : synapses) {
    check((s.source == 0) == step.image, "synapses: expected all of a layer to read the image, or none");
    const Shape out = output_shape(shape(s.source), s.outputs, s.window);
    if (&s == &synapses[0]) step.out = out;
    check(out == step.out, "synapses: expected all of a layer to give the same shape");
    step.connections.push_back(connect(s, parameters));
    step.rows = whole_rows(step.image, s.groups, out);
    step.precision = step.image ? Precision::fp32 : parameters.precision;
  }
  if (step.rows) {
    for (const Synapses& s : synapses) check(s.groups == 1, "groups: expected 1 in all of a layer's synapses, or none");
  }
  const auto padded = [&](const float* values) {
    std::vector<float> result(step.padded());
    std::copy(values, values + step.out.channels, result.begin());
    return result;
  };
  step.bias = padded(parameters.bias);
  if (is_integer(step.precision)) step.scale = padded(parameters.scale);
  return step;
}

int64_t Engine::add_neurons(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                            const LayerParameters& parameters, const NeuronParameters& neurons) {
  Step step = layer(synapses, parameters);
  step.kind = Step::kNeurons;
  for (const Skip& given : skips) {
    check(source(given.source).shape == step.out, "skips: expected spikes of the layer's own shape");
  }
  check(skips.size() <= 1, "skips: expected at most one, got " + std::to_string(skips.size()));
  step.skips = skips;
  step.threshold.assign(step.padded(), 0.0f);
  step.leak = step.threshold;
  std::copy(neurons.threshold, neurons.threshold + step.out.channels, step.threshold.begin());
  std::copy(neurons.leak, neurons.leak + step.out.channels, step.leak.begin());
  step.reset = neurons.reset;
  step.v_reset = neurons.v_reset;
  return add_step(std::move(step), 1);
}

void Engine::add_readout(const Synapses& synapses, const LayerParameters& parameters) {
  Step step = layer({synapses}, parameters);
  step.kind = Step::kReadout;
  check(step.out.height * step.out.width == 1, "readout: expected one position an image, got " +
                                                   std::to_string(step.out.height) + " x " +
                                                   std::to_string(step.out.width));
  add_step(std::move(step), 1);
  pack();
}

// Moves all weights into one piece of memory, in the order of their use: on huge pages, whatever a layer's size.
void Engine::pack() {
  int64_t size = 0;
  for (Step& step : network_->steps) {
    for (Connection& c : step.connections) {
      c.start = size;
      size += round_up(c.bytes, 64);
    }
  }
  const auto weights = std::make_shared<Memory>(size);
  for (Step& step : network_->steps) {
    for (Connection& c : step.connections) {
      std::memcpy(weights->data() + c.start, c.weights->data(), c.bytes);
      c.weights = weights;
    }
  }
}

std::shared_ptr<const Call> Engine::run(const float* images, int64_t count, float* logits, int threads) const {
  outputs();  // there is a readout
  check(threads > 0, "threads: expected at least 1, got " + std::to_string(threads));
  const std::shared_ptr<Call> call(shelf_->take().release(), [shelf = shelf_](Call* done) { shelf->put(done); });
  call->images = count;
  run_network(*network_, images, logits, threads, *call);
  return call;
}

}  // namespace iirsnn::event
