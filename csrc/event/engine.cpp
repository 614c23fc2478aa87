#include "event/engine.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>

#include "event/layers.h"
#include "simd/capability.h"

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
    return;
  }
  const int64_t within = output % 32;  // outputs 16 apart side by side
  at += output - within + within % 16 * 2 + within / 16;
  if (precision == Precision::bf16) {  // value is one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    static_cast<uint16_t*>(weights)[at] = uint16_t(bits >> 16);
  } else {
    static_cast<uint8_t*>(weights)[at] = uint8_t(int8_t(value) + (within < 16 ? kExcess : 0));
  }
}

// Gives real values slots of a call's memory, each of which serves again once the last step that reads it is over.
void share_slots(Network& network) {
  std::vector<size_t> last(network.sources.size() + 1, 0);
  for (size_t i = 0; i < network.steps.size(); ++i) {
    for (const int64_t source : sources_of(network.steps[i])) last[source] = i;
  }
  std::vector<size_t> busy;  // by slot: until the end of which step
  for (size_t i = 0; i < network.steps.size(); ++i) {
    const int64_t gives = network.steps[i].gives;
    if (gives == 0 || !network.source(gives).real()) continue;
    Source& source = network.sources[gives - 1];
    size_t slot = 0;
    while (slot < busy.size() && busy[slot] >= i) ++slot;
    if (slot == busy.size()) {
      busy.push_back(0);
      network.slots.push_back(0);
    }
    busy[slot] = std::max(last[gives], i);
    network.slots[slot] = std::max(network.slots[slot], source.values());
    source.slot = int64_t(slot);
  }
}

// Writes the outputs [from, to) of a piece, whose rows begin with the output `begin` of their tile.
void fill(const Filters& filters, Precision precision, const Piece& piece, bool values, char* weights, int64_t pitch,
          int64_t begin, int64_t from, int64_t to) {
  const int64_t group_channels = filters.group_channels, group_outputs = filters.outputs / filters.groups;
  const int64_t end = piece.first + piece.channels;
  int64_t row = piece.offset;
  for (int64_t block = piece.first; block < end;) {  // the channels of one word, or all values of a pixel
    const int64_t next = values ? end : std::min(end, (block / kWord + 1) * kWord);
    for (int64_t tap = 0; tap < filters.taps; ++tap) {
      for (int64_t c = block; c < next; ++c, row += pitch) {
        const int64_t group = c / group_channels;
        const int64_t last = std::min(to, (group + 1) * group_outputs);
        for (int64_t k = std::max(from, group * group_outputs); k < last; ++k) {
          store_weight(precision, weights, row, k - begin, filters.at(k, c % group_channels, tap));
        }
      }
    }
    block = next;
  }
}

constexpr int64_t kMostCount = (1 << 16) - 1;  // of spikes in one count
constexpr int64_t kMostValues = int64_t(1) << 31;

}  // namespace

std::vector<int64_t> sources_of(const Step& step) {
  std::vector<int64_t> found;
  if (step.source) found.push_back(step.source);
  for (const Part& part : step.parts) found.push_back(part.source);
  for (const Term& term : step.terms) found.push_back(term.source);
  for (const Connection& c : step.connections) found.push_back(c.source);
  for (const Skip& skip : step.skips) found.push_back(skip.source);
  for (const Skip& skip : step.others) found.push_back(skip.source);
  return found;
}

Engine::Engine(Shape image, int64_t timesteps, Loading loading)
    : network_(new Network{image, timesteps, {}, {}}), loading_(std::move(loading)), shelf_(std::make_shared<Shelf>()) {
  check(image.channels > 0 && image.height > 0 && image.width > 0,
        "image: expected a positive number of channels, rows and columns");
  check(image.channels < kMostValues && image.height < kMostValues && image.width < kMostValues &&
            image.channels * image.height < kMostValues && image.channels * image.height * image.width < kMostValues,
        "image: expected fewer than 2^31 values");
  check(timesteps > 0 && timesteps < kMostCount,
        "timesteps: expected at least 1 and fewer than 65535, got " + std::to_string(timesteps));
}
Engine::~Engine() = default;

const Source& Engine::source(int64_t number) const {
  const int64_t count = int64_t(network_->sources.size());
  check(number > 0 && number <= count, "source: expected the number of an earlier layer, 1 to " +
                                           std::to_string(count) + ", got " + std::to_string(number));
  return network_->source(number);
}

Shape Engine::shape(int64_t number) const { return number == 0 ? network_->image : source(number).shape; }

bool Engine::real(int64_t number) const { return number == 0 || source(number).real(); }

int64_t Engine::outputs() const {
  const std::vector<Step>& steps = network_->steps;
  check(!steps.empty() && steps.back().gives == 0, "network: expected a readout as its last layer");
  return steps.back().out.channels * steps.back().out.height * steps.back().out.width;
}

Shape Engine::gives(int64_t step) const { return network_->steps[step].out; }

int64_t Engine::memory() const {
  int64_t bytes = 0;
  for (const Step& step : network_->steps) {
    for (const Connection& c : step.connections) bytes += round_up(c.bytes, kCacheLine);
  }
  return bytes;
}

// most: of a count that the step gives; 0: it gives real values.
int64_t Engine::add_step(Step step, int64_t most) {
  std::vector<Step>& steps = network_->steps;
  check(steps.empty() || steps.back().gives != 0, "network: expected nothing after the readout");
  const Shape& out = step.out;
  check(out.channels < kMostValues && out.height < kMostValues && out.width < kMostValues &&
            out.channels * out.height < kMostValues && out.channels * out.height * out.width < kMostValues,
        "layer: expected fewer than 2^31 values of an image");
  check(most <= kMostCount,
        "counts: expected at most " + std::to_string(kMostCount) + " spikes, got " + std::to_string(most));
  if (step.kind != Step::kReadout && step.kind != Step::kOutput) {
    int64_t planes = 0;
    while (most >> planes) ++planes;
    network_->sources.push_back({step.out, most, planes});
    step.gives = int64_t(network_->sources.size());
  }
  steps.push_back(std::move(step));
  return steps.back().gives;
}

Step Engine::pool(int64_t number, const Shape& out) const {
  Step step{};
  step.source = number;
  step.out = out;
  return step;
}

int64_t Engine::add_max_pool(int64_t number, const Window& window) {
  const Source& in = source(number);
  check(in.planes <= 1, "max pool: expected spikes or real values, got counts");
  Step step = pool(number, output_shape(in.shape, in.shape.channels, window));
  step.kind = Step::kMaxPool;
  step.window = window;
  return add_step(std::move(step), in.most);
}

int64_t Engine::add_average_pool(int64_t number, const Window& window) {
  const Source& in = source(number);
  Step step = pool(number, output_shape(in.shape, in.shape.channels, window));
  step.kind = Step::kAveragePool;
  step.window = window;
  return add_step(std::move(step), in.most * window.kernel.y * window.kernel.x);
}

int64_t Engine::add_adaptive_pool(int64_t number, int64_t height, int64_t width) {
  const Source& in = source(number);
  check(height > 0 && width > 0 && height < kMostValues && width < kMostValues,
        "adaptive pool: expected a positive number of rows and columns below 2^31");
  Step step = pool(number, {in.shape.channels, height, width});
  step.kind = Step::kAdaptivePool;
  return add_step(std::move(step),
                  in.most * axis_multiple(in.shape.height, height) * axis_multiple(in.shape.width, width));
}

int64_t Engine::add_channels(const std::vector<Part>& parts) {
  check(!parts.empty(), "channels: expected at least one part, got none");
  Step step{};
  step.kind = Step::kChannels;
  step.parts = parts;
  step.out = {0, source(parts[0].source).shape.height, source(parts[0].source).shape.width};
  int64_t most = 0;
  bool values = false;
  for (const Part& part : parts) {
    const Source& in = source(part.source);
    check(in.shape.height == step.out.height && in.shape.width == step.out.width,
          "channels: expected parts with the same rows and columns");
    check(part.first >= 0 && part.channels > 0 && part.channels <= in.shape.channels &&
              part.first <= in.shape.channels - part.channels,
          "channels: expected some of " + std::to_string(in.shape.channels) + " channels");
    step.out.channels += part.channels;
    most = std::max(most, in.most);
    values |= in.real();
  }
  return add_step(std::move(step), values ? 0 : most);
}

int64_t Engine::add_sum(const std::vector<Term>& terms) {
  check(!terms.empty(), "sum: expected at least one term, got none");
  Step step{};
  step.kind = Step::kSum;
  step.terms = terms;
  step.out = source(terms[0].source).shape;
  int64_t most = 0;
  for (const Term& term : terms) {
    const Source& in = source(term.source);
    check(!in.real(), "sum: expected spikes or counts, got real values");
    check(in.shape == step.out, "sum: expected terms of the same shape");
    check(term.times > 0 && term.times <= kMostCount, "sum: expected to count a term a positive number of times");
    most += in.most * term.times;
  }
  return add_step(std::move(step), most);
}

void Engine::add_output(int64_t number, float unit) {
  Step step = pool(number, source(number).shape);
  step.kind = Step::kOutput;
  step.unit = unit;
  add_step(std::move(step), 1);
  finish();
}

Connection Engine::connect(const Synapses& s, Precision precision, bool rows, int tile_width) {
  const Shape in = shape(s.source);
  check(s.outputs > 0, "outputs: expected at least 1, got " + std::to_string(s.outputs));
  check(s.groups > 0 && in.channels % s.groups == 0 && s.outputs % s.groups == 0,
        "groups: expected a divisor of " + std::to_string(in.channels) + " channels and " + std::to_string(s.outputs) +
            " outputs, got " + std::to_string(s.groups));
  const bool values = real(s.source);
  const int64_t most = s.source == 0 ? 0 : source(s.source).most;
  const Filters filters{s.weight, s.outputs, s.groups, in.channels / s.groups, s.window.kernel.y * s.window.kernel.x};
  check(!is_integer(precision) ||
            filters.group_channels * filters.taps * most < std::numeric_limits<int32_t>::max() / 127,
        "int8: expected fewer than 2^31 / 127 spikes for a neuron, which 32-bit sums hold");

  Connection made{s.source, in, s.window, {}, nullptr, 0};
  const int64_t padded = round_up(s.outputs, row_unit(precision));
  if (values && s.source > 0 && s.groups == in.channels && s.outputs == in.channels) {
    made.each = true;
    made.bytes = filters.taps * padded * int64_t(sizeof(float));
    if (!s.weight.data) return made;
    place(made);
    for (int64_t tap = 0; tap < filters.taps; ++tap) {
      for (int64_t k = 0; k < s.outputs; ++k) {
        store_weight(Precision::fp32, made.weights->get() + made.start, tap * padded, k, filters.at(k, 0, tap));
      }
    }
    return made;
  }
  const int64_t tile = rows ? padded : tile_width;
  const auto pitch = [&](int64_t from) { return rows ? row_pitch(precision, padded) : std::min(tile, padded - from); };
  int64_t size = 0;
  for (int64_t from = 0; from < padded; from += tile) {
    made.tiles.push_back(pieces(from, from + tile, s.outputs, in.channels, s.groups));
    for (Piece& piece : made.tiles.back()) {
      piece.offset = size;
      size += piece.channels * filters.taps * pitch(from);
    }
  }
  made.bytes = size * weight_bytes(precision);
  if (!s.weight.data) return made;
  place(made);
  char* const weights = made.weights->get() + made.start;
  if (is_integer(precision)) {  // where no weight is stored
    for (int64_t i = 0; i < made.bytes; i += 2) weights[i] = char(kExcess);
  }
  // A part of the outputs after the other, as they lie in the file.
  constexpr int64_t kPart = 64;
  for (int64_t from = 0; from < s.outputs; from += std::min(tile, kPart)) {
    const int64_t begin = from / tile * tile, to = std::min({from + kPart, begin + tile, s.outputs});
    for (const Piece& piece : made.tiles[from / tile]) {
      fill(filters, precision, piece, values, weights, pitch(begin), begin, from, to);
    }
    if (loading_.part_taken) loading_.part_taken();
  }
  if (is_integer(precision)) {
    for (int64_t from = 0; from < padded; from += tile) {
      const int64_t to = std::min(padded, from + tile);
      for (Piece& piece : made.tiles[from / tile]) {
        piece.carries = carries(filters, from, to, piece.first, piece.first + piece.channels, most);
      }
    }
  }
  return made;
}

// Memory for its weights: a place among all of them, where it is known how much they need.
void Engine::place(Connection& made) {
  if (loading_.bytes == 0) {
    made.weights = std::make_shared<Buffer<char>>(Buffer<char>::zeros(made.bytes));
    return;
  }
  if (!weights_) weights_ = std::make_shared<Buffer<char>>(Buffer<char>::zeros(loading_.bytes));
  made.weights = weights_;
  made.start = placed_;
  placed_ += round_up(made.bytes, kCacheLine);
  check(placed_ <= loading_.bytes, "weights: expected at most " + std::to_string(loading_.bytes) + " bytes of them");
}

Step Engine::layer(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                   const LayerParameters& parameters) {
  check(!synapses.empty() || !skips.empty(), "synapses: expected at least one source, got none");
  Step step{};
  step.out = synapses.empty() ? source(skips[0].source).shape
                              : output_shape(shape(synapses[0].source), synapses[0].outputs, synapses[0].window);
  bool image = false, values = skips.size() > 1, grouped = false;
  step.rows = step.constant = !synapses.empty();
  for (const Synapses& s : synapses) {
    const Shape out = output_shape(shape(s.source), s.outputs, s.window);
    check(out == step.out, "synapses: expected all of a layer to give the same shape");
    image |= s.source == 0;
    values |= real(s.source);
    grouped |= s.groups > 1;
    step.constant &= s.source == 0;
    step.rows &= whole_rows(real(s.source), s.groups, out);
  }
  for (const Skip& s : skips) {
    check(source(s.source).shape == step.out, "skips: expected spikes of the layer's own shape");
    values |= real(s.source);
  }
  step.rows &= !values;
  step.precision = values ? Precision::fp32 : parameters.precision;
  (values || skips.size() > 1 ? step.others : step.skips) = skips;
  step.constant &= step.others.empty();
  check(!image || step.constant || network_->timesteps == 1,
        "synapses: expected one timestep in a layer that reads the image and others");
  step.tile = tile_width(step.precision, step.padded(), grouped, capability() == kAvx512);
  for (const Synapses& s : synapses) step.connections.push_back(connect(s, step.precision, step.rows, step.tile));
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
  Step step = layer(synapses, skips, parameters);
  step.kind = Step::kNeurons;
  step.threshold.assign(step.padded(), 0.0f);
  step.leak = step.threshold;
  std::copy(neurons.threshold, neurons.threshold + step.out.channels, step.threshold.begin());
  std::copy(neurons.leak, neurons.leak + step.out.channels, step.leak.begin());
  step.reset = neurons.reset;
  step.v_reset = neurons.v_reset;
  return add_step(std::move(step), 1);
}

int64_t Engine::add_currents(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                             const LayerParameters& parameters) {
  Step step = layer(synapses, skips, parameters);
  step.kind = Step::kCurrents;
  if (!step.skips.empty()) {
    check(!is_integer(step.precision), "skips: expected none beside int8 weights in a layer without neurons");
    step.others.swap(step.skips);
    step.constant = false;
  }
  return add_step(std::move(step), 0);
}

void Engine::add_readout(const Synapses& synapses, const LayerParameters& parameters) {
  Step step = layer({synapses}, {}, parameters);
  step.kind = Step::kReadout;
  check(step.out.height * step.out.width == 1, "readout: expected one position an image, got " +
                                                   std::to_string(step.out.height) + " x " +
                                                   std::to_string(step.out.width));
  add_step(std::move(step), 1);
  finish();
}

// Moves all weights into one piece of memory, in the order of their use, unless they are there already: on huge pages,
// whatever a layer's size.
void Engine::finish() {
  share_slots(*network_);
  if (loading_.bytes > 0) {
    loading_ = {};
    return;
  }
  int64_t size = 0;
  for (Step& step : network_->steps) {
    for (Connection& c : step.connections) {
      if (!c.weights) return;  // only counted
      c.start = size;
      size += round_up(c.bytes, kCacheLine);
    }
  }
  const auto weights = std::make_shared<Buffer<char>>(Buffer<char>::zeros(size));
  for (Step& step : network_->steps) {
    for (Connection& c : step.connections) {
      constexpr int64_t kPart = 4 << 20;  // so that no layer is in memory twice
      for (int64_t at = 0; at < c.bytes; at += kPart) {
        const int64_t size = std::min(kPart, c.bytes - at);
        std::memcpy(weights->get() + c.start + at, c.weights->get() + at, size);
        c.weights->forget(at, size);
      }
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
