#include "event/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace iirsnn::event {

constexpr int64_t kHugePage = 2 << 20;
static int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Zeros, aligned to a cache line, or on huge pages where there is enough of it: rows are read at random, and pages that
// malloc has used before would stay small.
class Memory {
 public:
  explicit Memory(int64_t bytes = 0) {
    if (bytes == 0) return;
#if defined(__linux__)
    if (bytes >= kHugePage / 2) {
      mapped_ = round_up(bytes, kHugePage) + kHugePage;  // so that an aligned part is large enough
      void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (all == MAP_FAILED) throw std::bad_alloc();
      map_ = static_cast<char*>(all);
      data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(map_), kHugePage));
      madvise(data_, round_up(bytes, kHugePage), MADV_HUGEPAGE);  // a wish; refusing it does no harm
      return;
    }
#endif
    bytes = round_up(bytes, 64);
    data_ = static_cast<char*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
#if defined(__linux__)
    if (map_) {
      munmap(map_, mapped_);
      return;
    }
#endif
    std::free(data_);
  }
  char* data() const { return data_; }

 private:
  char *data_ = nullptr, *map_ = nullptr;
  int64_t mapped_ = 0;
};

namespace {

// Positions of a strip: enough of them to read a block of weights once for many, few enough to stay in the L2 cache.
constexpr int64_t kPositions = 256, kFewPositions = 32;
constexpr int64_t kStreamBytes = 512 << 10;
constexpr int64_t kStreamBlock = 256 << 10;  // of weights that several positions read
constexpr int64_t kFewestPositions = 4;
// Of a layer with whole rows: from so many positions on, tiles of them are worth reading them once for each tile.
constexpr int64_t kPositionsToTile = 32;

int threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int thread() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(bool right, const std::string& message) {
  if (!right) throw std::invalid_argument(message);
}

// Positions whose window lies over one tap inside an image: those `first` to `last` - 1 along one axis.
struct Span {
  int64_t first, last, in;  // in: where in the image the first one's tap is
};
Span span(int64_t from, int64_t to, int64_t tap, int64_t stride, int64_t before, int64_t size) {
  const int64_t shift = before - tap;  // in = position * stride - shift
  const int64_t first = std::max(from, shift > 0 ? ceil_div(shift, stride) : 0);
  const int64_t last = std::min(to, size + shift > 0 ? ceil_div(size + shift, stride) : 0);
  return {first, std::max(first, last), first * stride - shift};
}

int64_t positions(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t after) {
  return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1;
}

Shape output_shape(const Shape& in, int64_t channels, const Window& w) {
  check(w.kernel.y > 0 && w.kernel.x > 0 && w.stride.y > 0 && w.stride.x > 0 && w.dilation.y > 0 && w.dilation.x > 0,
        "window: expected a positive kernel, stride and dilation");
  check(in.height + w.before.y + w.after.y > w.dilation.y * (w.kernel.y - 1) &&
            in.width + w.before.x + w.after.x > w.dilation.x * (w.kernel.x - 1),
        "window: expected a kernel that fits the padded input of " + std::to_string(in.height) + " x " +
            std::to_string(in.width) + ", got " + std::to_string(w.kernel.y) + " x " + std::to_string(w.kernel.x));
  return {channels, positions(in.height, w.kernel.y, w.stride.y, w.dilation.y, w.before.y, w.after.y),
          positions(in.width, w.kernel.x, w.stride.x, w.dilation.x, w.before.x, w.after.x)};
}

// With so few positions an image each row of weights is met once or not at all, so rows are kept whole.
bool whole_rows(const Synapses& s, const Shape& out) {
  return s.source != 0 && s.groups == 1 && out.height * out.width <= kFewestPositions;
}

// How the weights are kept in memory.
Precision stored(Precision asked, bool image, bool rows) {
  if (image) return Precision::fp32;
  static const bool wide = std::getenv("IIRSNN_INT16") != nullptr;
  return asked == Precision::int8 && !rows && wide ? Precision::int16 : asked;
}

// Outputs from one whole row to the next: an odd number of cache lines, so that a column does not fall into few sets.
int64_t row_pitch(Precision precision, int64_t padded) {
  const int64_t lines = ceil_div(padded * weight_bytes(precision), 64);
  return (lines + 1 - lines % 2) * 64 / weight_bytes(precision);
}

}  // namespace

struct Engine::Spikes {
  Shape shape;
  int64_t most;    // of one count: 1, or what an average pool may reach
  int64_t planes;  // binary digits of it
  std::vector<uint64_t> bits;

  int64_t words() const { return ceil_div(shape.channels, kWord); }
  int64_t image_words() const { return shape.height * shape.width * words(); }
};

// Synapses with their weights as the kernels want them.
struct Engine::Connection {
  // Outputs of one tile that read the same channels.
  struct Piece {
    int64_t first, channels;         // that it reads
    int64_t reached;                 // outputs that one event reaches
    int64_t offset;                  // of its weights, in elements
    std::vector<uint8_t> carries{};  // of int8 weights: Carry [word][tap]
  };
  int64_t source;
  Shape in;
  Window window;
  std::vector<std::vector<Piece>> tiles;  // a single one when the layer has whole rows
  std::shared_ptr<Memory> weights;
  int64_t bytes, start = 0;  // start: of its weights in theirs
};

struct Engine::Step {
  enum Kind { kNeurons, kReadout, kMaxPool, kAveragePool } kind;
  Shape out;
  int64_t spikes = 0;  // source number of what it gives; none for the readout

  // pools
  int64_t source = 0;
  Window window;

  // layers
  Precision precision = Precision::fp32;
  std::vector<Connection> connections;
  std::vector<Skip> skips;
  bool image = false;                               // reads the image, and so has the same current at every timestep
  bool rows = false;                                // keeps its rows of weights whole
  std::vector<float> bias, scale, threshold, leak;  // padded to whole rows
  Fires reset = Fires::soft;
  float v_reset = 0;

  int64_t padded() const { return round_up(out.channels, row_unit(precision)); }
};

// A task: outputs [output, output + width) of rows [top, bottom) of images [first, last).
struct Engine::Strip {
  int64_t tile;
  bool stream;
  int64_t output, width, outputs;
  int64_t first, last, top, bottom;
};

Engine::Engine(Shape image, int64_t timesteps) : image_(image), timesteps_(timesteps) {
  check(image.channels > 0 && image.height > 0 && image.width > 0,
        "image: expected a positive number of channels, rows and columns");
  check(timesteps > 0, "timesteps: expected at least 1, got " + std::to_string(timesteps));
}
Engine::~Engine() = default;

const Engine::Spikes& Engine::spikes(int64_t source) const {
  check(source > 0 && source <= int64_t(spikes_.size()), "source: expected the number of an earlier layer, 1 to " +
                                                             std::to_string(spikes_.size()) + ", got " +
                                                             std::to_string(source));
  return *spikes_[source - 1];
}

const std::vector<uint64_t>& Engine::bits(int64_t source) const { return spikes(source).bits; }

Shape Engine::shape(int64_t source) const { return source == 0 ? image_ : spikes(source).shape; }

int64_t Engine::outputs() const {
  check(!steps_.empty() && steps_.back()->kind == Step::kReadout, "network: expected a readout as its last layer");
  return steps_.back()->out.channels;
}

int64_t Engine::add_step(std::unique_ptr<Step> step, int64_t most) {
  check(steps_.empty() || steps_.back()->kind != Step::kReadout, "network: expected nothing after the readout");
  if (step->kind != Step::kReadout) {
    int64_t planes = 1;
    while (most >> planes) ++planes;
    spikes_.push_back(std::make_unique<Spikes>(Spikes{step->out, most, planes, {}}));
    step->spikes = int64_t(spikes_.size());
  }
  steps_.push_back(std::move(step));
  return steps_.back()->spikes;
}

std::unique_ptr<Engine::Step> Engine::pool(int64_t source, const Window& window) const {
  auto step = std::make_unique<Step>();
  step->source = source;
  step->window = window;
  step->out = output_shape(spikes(source).shape, spikes(source).shape.channels, window);
  return step;
}

int64_t Engine::add_max_pool(int64_t source, const Window& window) {
  check(spikes(source).planes == 1, "max pool: expected spikes, got the counts of an average pool");
  auto step = pool(source, window);
  step->kind = Step::kMaxPool;
  return add_step(std::move(step), 1);
}

int64_t Engine::add_average_pool(int64_t source, const Window& window) {
  auto step = pool(source, window);
  step->kind = Step::kAveragePool;
  const int64_t most = spikes(source).most * window.kernel.y * window.kernel.x;
  check(most < (1 << 16), "average pool: expected windows of fewer than 65536 spikes, got " + std::to_string(most));
  return add_step(std::move(step), most);
}

// One tile's outputs [from, to) of all `outputs`, cut where the channels that they read change.
template <typename Piece>
static std::vector<Piece> pieces(int64_t from, int64_t to, int64_t outputs, int64_t channels, int64_t groups) {
  to = std::min(to, outputs);
  if (groups == 1) return {Piece{0, channels, to - from, 0}};
  const int64_t group_outputs = outputs / groups, group_channels = channels / groups;
  std::vector<Piece> found;
  while (from < to) {
    const int64_t group = from / group_outputs;
    const int64_t whole = from == group * group_outputs ? (to - from) / group_outputs : 0;
    const int64_t next = whole ? from + whole * group_outputs : std::min(to, (group + 1) * group_outputs);
    found.push_back({group * group_channels, std::max<int64_t>(whole, 1) * group_channels,
                     std::min(next - from, group_outputs), 0});
    from = next;
  }
  return found;
}

static void store_weight(Precision precision, void* weights, int64_t at, int64_t output, float value) {
  if (precision == Precision::fp32) {
    static_cast<float*>(weights)[at + output] = value;
  } else if (precision == Precision::bf16) {  // outputs 16 apart side by side; value is a bf16
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const int64_t within = output % 32;
    static_cast<uint16_t*>(weights)[at + output - within + within % 16 * 2 + within / 16] = uint16_t(bits >> 16);
  } else if (precision == Precision::int16) {
    static_cast<int16_t*>(weights)[at + output] = int16_t(value);
  } else {
    static_cast<int8_t*>(weights)[at + output] = int8_t(value);
  }
}

// Where 16-bit sums of the outputs [from, to) over the channels [first, end) have to be carried over. A sum, and any
// part of one, is at most the sum of |weight| times the largest count: whatever the order of additions, none overflows
// before that bound does. By digit a block adds at most 64 * 127 = 8128.
static std::vector<uint8_t> carries(const Synapses& s, int64_t from, int64_t to, int64_t first, int64_t end,
                                    int64_t group_channels, int64_t most) {
  const int64_t taps = s.window.kernel.y * s.window.kernel.x, group_outputs = s.outputs / s.groups;
  to = std::min(to, s.outputs);
  std::vector<int64_t> sums(to - from), block(to - from);
  std::vector<uint8_t> result;
  for (int64_t next; first < end; first = next) {
    next = std::min(end, (first / kWord + 1) * kWord);
    for (int64_t tap = 0; tap < taps; ++tap) {
      int64_t largest = 0, largest_block = 0;
      for (int64_t k = from; k < to; ++k) {
        int64_t& sum = block[k - from] = 0;
        const int64_t group = k / group_outputs * group_channels;
        for (int64_t c = std::max(first, group); c < std::min(next, group + group_channels); ++c) {
          sum += most * int64_t(std::fabs(s.weight[(k * group_channels + c - group) * taps + tap]));
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

Engine::Connection Engine::connect(const Synapses& s, const LayerParameters& parameters) const {
  const Shape in = shape(s.source);
  check(s.outputs > 0, "outputs: expected at least 1, got " + std::to_string(s.outputs));
  check(s.groups > 0 && in.channels % s.groups == 0 && s.outputs % s.groups == 0,
        "groups: expected a divisor of " + std::to_string(in.channels) + " channels and " + std::to_string(s.outputs) +
            " outputs, got " + std::to_string(s.groups));
  const Shape out = output_shape(in, s.outputs, s.window);
  const bool image = s.source == 0, rows = whole_rows(s, out);
  const Precision precision = stored(parameters.precision, image, rows);
  const int64_t taps = s.window.kernel.y * s.window.kernel.x, group_channels = in.channels / s.groups;
  check(!is_integer(precision) ||
            group_channels * taps * spikes(s.source).most < std::numeric_limits<int32_t>::max() / 127,
        "int8: expected fewer than 2^31 / 127 spikes for a neuron, which 32-bit sums hold");

  Connection made{s.source, in, s.window, {}, nullptr, 0};
  const int64_t padded = round_up(s.outputs, row_unit(precision));
  const int64_t tile = rows ? padded : tile_width(precision);
  const auto pitch = [&](int64_t width) { return rows ? row_pitch(precision, padded) : width; };
  int64_t size = 0;
  for (int64_t from = 0; from < padded; from += tile) {
    made.tiles.push_back(pieces<Connection::Piece>(from, from + tile, s.outputs, in.channels, s.groups));
    for (Connection::Piece& piece : made.tiles.back()) {
      piece.offset = size;
      size += piece.channels * taps * pitch(std::min(tile, padded - from));
    }
  }
  made.bytes = size * weight_bytes(precision);
  made.weights = std::make_shared<Memory>(made.bytes);

  for (int64_t from = 0; from < padded; from += tile) {
    const int64_t width = std::min(tile, padded - from);
    for (Connection::Piece& piece : made.tiles[from / tile]) {
      int64_t row = piece.offset;
      const int64_t end = piece.first + piece.channels;
      for (int64_t block = piece.first; block < end;) {  // the channels of one word, or all values of a pixel
        const int64_t next = image ? end : std::min(end, (block / kWord + 1) * kWord);
        for (int64_t tap = 0; tap < taps; ++tap) {
          for (int64_t c = block; c < next; ++c, row += pitch(width)) {
            const int64_t group = c / group_channels, group_outputs = s.outputs / s.groups;
            const int64_t first = std::max(from, group * group_outputs);
            const int64_t last = std::min({from + width, (group + 1) * group_outputs, s.outputs});
            for (int64_t k = first; k < last; ++k) {
              const float value = s.weight[(k * group_channels + c % group_channels) * taps + tap];
              store_weight(precision, made.weights->data(), row, k - from, value);
            }
          }
        }
        block = next;
      }
      if (is_integer(precision))
        piece.carries = carries(s, from, from + width, piece.first, end, group_channels, spikes(s.source).most);
    }
  }
  return made;
}

std::unique_ptr<Engine::Step> Engine::layer(const std::vector<Synapses>& synapses,
                                            const LayerParameters& parameters) const {
  check(!synapses.empty(), "synapses: expected at least one source, got none");
  auto step = std::make_unique<Step>();
  step->image = synapses[0].source == 0;
  for (const Synapses& s : synapses) {
    check((s.source == 0) == step->image, "synapses: expected all of a layer to read the image, or none");
    const Shape out = output_shape(shape(s.source), s.outputs, s.window);
    if (&s == &synapses[0]) step->out = out;
    check(out.channels == step->out.channels && out.height == step->out.height && out.width == step->out.width,
          "synapses: expected all of a layer to give the same shape");
    step->connections.push_back(connect(s, parameters));
    step->rows = whole_rows(s, out);
    step->precision = stored(parameters.precision, step->image, step->rows);
  }
  if (step->rows) {
    for (const Synapses& s : synapses) check(s.groups == 1, "groups: expected 1 in all of a layer's synapses, or none");
  }
  const auto padded = [&](const float* values) {
    std::vector<float> result(step->padded());
    std::copy(values, values + step->out.channels, result.begin());
    return result;
  };
  step->bias = padded(parameters.bias);
  if (is_integer(step->precision)) step->scale = padded(parameters.scale);
  return step;
}

int64_t Engine::add_neurons(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                            const LayerParameters& parameters, const NeuronParameters& neurons) {
  auto step = layer(synapses, parameters);
  step->kind = Step::kNeurons;
  for (const Skip& given : skips) {
    const Spikes& skip = spikes(given.source);
    check(skip.shape.channels == step->out.channels && skip.shape.height == step->out.height &&
              skip.shape.width == step->out.width,
          "skips: expected spikes of the layer's own shape");
  }
  check(skips.size() <= 1, "skips: expected at most one, got " + std::to_string(skips.size()));
  step->skips = skips;
  step->threshold.assign(step->padded(), 0.0f);
  step->leak = step->threshold;
  std::copy(neurons.threshold, neurons.threshold + step->out.channels, step->threshold.begin());
  std::copy(neurons.leak, neurons.leak + step->out.channels, step->leak.begin());
  step->reset = neurons.reset;
  step->v_reset = neurons.v_reset;
  return add_step(std::move(step), 1);
}

void Engine::add_readout(const Synapses& synapses, const LayerParameters& parameters) {
  auto step = layer({synapses}, parameters);
  step->kind = Step::kReadout;
  check(step->out.height * step->out.width == 1, "readout: expected one position an image, got " +
                                                     std::to_string(step->out.height) + " x " +
                                                     std::to_string(step->out.width));
  add_step(std::move(step), 1);
  pack();
}

// Moves all weights into one piece of memory, in the order of their use: on huge pages, whatever a layer's size.
void Engine::pack() {
  int64_t size = 0;
  for (const auto& step : steps_) {
    for (Connection& c : step->connections) {
      c.start = size;
      size += round_up(c.bytes, 64);
    }
  }
  const auto weights = std::make_shared<Memory>(size);
  for (const auto& step : steps_) {
    for (Connection& c : step->connections) {
      std::memcpy(weights->data() + c.start, c.weights->data(), c.bytes);
      c.weights = weights;
    }
  }
}

void Engine::run(const float* images, int64_t count, float* logits) {
  outputs();
  count_ = count;
  report_.assign(steps_.size(), {});
  if (count == 0) return;
  for (const auto& spikes : spikes_) {
    spikes->bits.resize(spikes->planes * count * timesteps_ * spikes->image_words());
  }
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    const bool pooling = steps_[i]->kind == Step::kMaxPool || steps_[i]->kind == Step::kAveragePool;
    if (pooling) {
      run_pool(*steps_[i], report_[i]);
    } else {
      run_layer(*steps_[i], images, logits, report_[i]);
    }
    report_[i].milliseconds =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
}

void Engine::run_pool(const Step& step, LayerReport& report) {
  const Spikes& in = spikes(step.source);
  Spikes& out = *spikes_[step.spikes - 1];
  const int64_t words = in.words(), images = count_ * timesteps_, in_plane = images * in.image_words(),
                out_plane = images * out.image_words();
  const Window& w = step.window;
  const bool counts = step.kind == Step::kAveragePool;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < images * out.shape.height; ++row) {
    const int64_t image = row / out.shape.height, y = row % out.shape.height;
    uint64_t* to = out.bits.data() + row * out.shape.width * words;
    for (int64_t plane = 0; plane < out.planes; ++plane) {
      std::fill_n(to + plane * out_plane, out.shape.width * words, uint64_t(0));
    }
    for (int64_t ky = 0; ky < w.kernel.y; ++ky) {
      const int64_t in_y = y * w.stride.y + ky * w.dilation.y - w.before.y;
      if (in_y < 0 || in_y >= in.shape.height) continue;
      for (int64_t kx = 0; kx < w.kernel.x; ++kx) {
        const Span xs = span(0, out.shape.width, kx * w.dilation.x, w.stride.x, w.before.x, in.shape.width);
        const uint64_t* from = in.bits.data() + ((image * in.shape.height + in_y) * in.shape.width + xs.in) * words;
        for (int64_t x = xs.first; x < xs.last; ++x, from += w.stride.x * words) {
          for (int64_t word = 0; word < words; ++word) {
            uint64_t* sum = to + x * words + word;
            if (!counts) {
              *sum |= from[word];
              continue;
            }
            for (int64_t digit = 0; digit < in.planes; ++digit) {  // binary addition of 64 counts at once
              uint64_t carry = from[word + digit * in_plane];
              for (int64_t plane = digit; carry; ++plane) {
                const uint64_t old = sum[plane * out_plane];
                sum[plane * out_plane] = old ^ carry;
                carry &= old;
              }
            }
          }
        }
      }
    }
  }
  report.spike_bytes = 8 * (in.planes * in_plane + out.planes * out_plane);
}

// The strips of a layer: at least a few for every thread, where it is large enough.
std::vector<Engine::Strip> Engine::cut(const Step& step) const {
  const int64_t steps = step.image ? 1 : timesteps_, height = step.out.height, width = step.out.width;
  const int64_t padded = step.padded(), workers = threads();
  const int64_t all = count_ * steps * height * width;
  const bool stream = step.rows && all < kPositionsToTile;
  int64_t outputs = tile_width(step.precision), images = count_, rows = height;
  if (stream) {
    int64_t fits = kStreamBytes / (all * int64_t(sizeof(float)));
    if (all > 1) fits = std::min(fits, kStreamBlock / (kWord * weight_bytes(step.precision)));
    outputs =
        std::min({padded, round_up(ceil_div(padded, workers), kWord), std::max<int64_t>(fits / kWord, 4) * kWord});
  } else {
    const int64_t tiles = ceil_div(padded, outputs);
    int64_t wanted = kPositions;
    while (workers > 1 && wanted > kFewPositions && tiles * ceil_div(all, wanted) < 3 * workers) wanted /= 2;
    images = std::max<int64_t>(1, std::min(count_, wanted / (steps * height * width)));
    if (steps * height * width > wanted) {
      rows = std::max<int64_t>(1, std::min(height, wanted / (steps * width)));
      rows = ceil_div(height, ceil_div(height, rows));
    }
  }
  std::vector<Strip> strips;
  for (int64_t output = 0; output < padded; output += outputs) {
    const int64_t here = std::min(outputs, padded - output);
    for (int64_t first = 0; first < count_; first += images) {
      for (int64_t top = 0; top < height; top += rows) {
        strips.push_back({step.rows ? 0 : output / outputs, stream, output, here,
                          std::min(here, step.out.channels - output), first, std::min(count_, first + images), top,
                          std::min(height, top + rows)});
      }
    }
  }
  return strips;
}

void Engine::run_layer(const Step& step, const float* images, float* logits, LayerReport& report) {
  const std::vector<Strip> strips = cut(step);
  const int64_t steps = step.image ? 1 : timesteps_;
  int64_t bytes = 0;
  for (const Strip& s : strips) {
    bytes = std::max(bytes, (s.last - s.first) * steps * (s.bottom - s.top) * step.out.width * s.width * 4);
  }
  if (is_integer(step.precision)) bytes += bytes / 2;  // 16-bit sums beside the totals
  bytes = round_up(bytes, 64);
  const int workers = int(std::min<int64_t>(threads(), int64_t(strips.size())));
  const Memory sums(bytes * workers);
  std::vector<LayerReport> parts(workers);
#pragma omp parallel for schedule(dynamic) num_threads(workers)
  for (int64_t i = 0; i < int64_t(strips.size()); ++i) {
    char* mine = sums.data() + thread() * bytes;
    add_up(step, strips[i], images, mine, parts[thread()]);
    finish(step, strips[i], mine, logits, parts[thread()]);
  }
  for (const LayerReport& part : parts) {
    report.spikes += part.spikes;
    report.additions += part.additions;
    report.multiplications += part.multiplications;
    report.weight_bytes += part.weight_bytes;
  }
  for (const Connection& c : step.connections) {
    if (c.source) report.spike_bytes += int64_t(8 * spikes(c.source).bits.size());
  }
  for (const Skip& skip : step.skips) report.spike_bytes += int64_t(8 * spikes(skip.source).bits.size());
  if (step.kind == Step::kNeurons) {
    report.neurons = step.out.channels * step.out.height * step.out.width;
    report.spike_bytes += int64_t(8 * spikes(step.spikes).bits.size());
  }
}

void Engine::add_up(const Step& step, const Strip& strip, const float* images, void* sums, LayerReport& report) const {
  const int64_t steps = step.image ? 1 : timesteps_, count = (strip.last - strip.first) * steps,
                area = (strip.bottom - strip.top) * step.out.width, width = strip.width;
  if (is_integer(step.precision)) {
    std::memset(sums, 0, count * area * width * (sizeof(int32_t) + sizeof(int16_t)));
  } else {
    float* to = static_cast<float*>(sums);
    for (int64_t i = 0; i < count * area; ++i) std::copy_n(step.bias.data() + strip.output, width, to + i * width);
  }
  const bool single = step.out.height * step.out.width == 1;  // then images are what lies in a row
  for (const Connection& c : step.connections) {
    const Window& w = c.window;
    const Spikes* from = c.source ? &spikes(c.source) : nullptr;
    // strides of the source, in words or floats
    const int64_t pixel = from ? from->words() : 1, line = pixel * c.in.width;
    const int64_t image = from ? from->image_words() : c.in.channels * c.in.height * c.in.width;
    std::vector<Tap> taps;
    for (int64_t ky = 0; ky < w.kernel.y; ++ky) {
      const Span ys = span(strip.top, strip.bottom, ky * w.dilation.y, w.stride.y, w.before.y, c.in.height);
      for (int64_t kx = 0; kx < w.kernel.x; ++kx) {
        const Span xs = span(0, step.out.width, kx * w.dilation.x, w.stride.x, w.before.x, c.in.width);
        Tap tap{ys.in * line + xs.in * pixel, (ys.first - strip.top) * step.out.width + xs.first,
                int(ys.last - ys.first), int(xs.last - xs.first)};
        if (single) tap.columns *= int(count);
        taps.push_back(tap);
      }
    }
    int64_t reached = 0;  // pairs of a tap and a position
    for (const Tap& tap : taps) reached += int64_t(tap.rows) * tap.columns;
    if (!single) reached *= count;

    for (const Connection::Piece& piece : c.tiles[strip.tile]) {
      const int64_t outputs = std::min(piece.reached, strip.outputs);
      char* weights = c.weights->data() + c.start + piece.offset * weight_bytes(step.precision);
      if (step.image) {
        Products work{};
        work.image = images + strip.first * image;
        work.images = single ? 1 : count;
        work.image_in = image;
        work.image_out = area;
        work.channel_in = c.in.height * c.in.width;
        work.row_in = w.stride.y * line;
        work.row_out = step.out.width;
        work.column_in = single ? image : w.stride.x;
        work.taps = taps.data();
        work.tap_count = int(taps.size());
        work.first_channel = int(piece.first);
        work.channels = int(piece.channels);
        work.weights = reinterpret_cast<const float*>(weights);
        work.pitch = width;
        work.sums = static_cast<float*>(sums);
        work.width = int(width);
        add_products(work);
        report.multiplications += reached * piece.channels * outputs;
        report.weight_bytes += reached * piece.channels * outputs * weight_bytes(Precision::fp32);
        continue;
      }
      const int64_t last = piece.first + piece.channels - 1, last_bit = last % kWord;
      Additions work{};
      work.bits = from->bits.data() + strip.first * timesteps_ * image;
      work.planes = int(from->planes);
      work.plane = count_ * timesteps_ * image;
      work.images = single ? 1 : count;
      work.image_in = image;
      work.image_out = area;
      work.row_in = w.stride.y * line;
      work.row_out = step.out.width;
      work.column_in = single ? image : w.stride.x * pixel;
      work.taps = taps.data();
      work.tap_count = int(taps.size());
      work.first_word = int(piece.first / kWord);
      work.words = int(last / kWord - piece.first / kWord + 1);
      work.first_mask = ~uint64_t(0) << (piece.first % kWord);
      work.last_mask = ~uint64_t(0) >> (kWord - 1 - last_bit);
      work.channels = int(piece.channels);
      work.whole = piece.channels == c.in.channels;
      work.weights = weights + (step.rows ? strip.output * weight_bytes(step.precision) : 0);
      work.pitch = step.rows ? row_pitch(step.precision, step.padded()) : width;
      work.sums = sums;
      work.width = int(width);
      if (is_integer(step.precision)) {
        work.positions = count * area;
        work.totals = static_cast<int32_t*>(sums);
        work.sums = work.totals + work.positions * width;
        work.carries = piece.carries.data();
      }
      Work done;
      if (strip.stream) {
        add_stream(step.precision, work, done);
      } else {
        add_tile(step.precision, work, done);
      }
      report.additions += (done.events + done.doublings) * outputs;
      report.weight_bytes += done.events * outputs * weight_bytes(step.precision);
    }
  }
}

void Engine::finish(const Step& step, const Strip& strip, const void* sums, float* logits, LayerReport& report) {
  const bool integer = is_integer(step.precision);
  if (step.kind == Step::kReadout) {
    Logits work{};
    work.sums = sums;
    work.integer = integer;
    work.constant = step.image;
    work.images = strip.last - strip.first;
    work.timesteps = timesteps_;
    work.width = int(strip.width);
    work.outputs = int(strip.outputs);
    work.scale = integer ? step.scale.data() + strip.output : nullptr;
    work.bias = step.bias.data() + strip.output;
    work.stride = step.out.channels;
    work.logits = logits + strip.first * work.stride + strip.output;
    read_out(work);
    return;
  }
  Spikes& out = *spikes_[step.spikes - 1];
  const int64_t at =
      strip.first * timesteps_ * out.image_words() + strip.top * out.shape.width * out.words() + strip.output / kWord;
  Neurons work{};
  work.sums = sums;
  work.integer = integer;
  work.constant = step.image;
  work.images = strip.last - strip.first;
  work.timesteps = timesteps_;
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
    const Spikes& skip = spikes(step.skips[0].source);
    work.skip = skip.bits.data() + at;
    work.skip_planes = int(skip.planes);
    work.skip_plane = count_ * timesteps_ * skip.image_words();
    work.skip_unit = step.skips[0].unit;
  }
  work.spikes = out.bits.data() + at;
  work.words = out.words();
  work.image_words = out.image_words();
  const Fired fired = fire(work);
  report.spikes += fired.spikes;
  report.additions += fired.skips;
}

}  // namespace iirsnn::event
