// A spiking network as a graph of steps that handle events, added in the order in which they run. Build it once, run it
// on any number of images.
//
// A layer's work is cut into tasks: a strip of positions by a range of outputs. A task keeps its sums (and over several
// timesteps its membranes) in a buffer of its thread that fits the cache, and writes nothing but spikes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "event/kernels.h"
#include "event/shape.h"
#include "event/stored_weights.h"

namespace iirsnn::event {

// Numbers of sources: 0 is the image, others are what Engine::add_* returned. A source gives spikes, counts of spikes,
// or real values, and any number of steps may read it.

// A convolution.
struct Synapses {
  int64_t source;
  StoredWeights weight;  // [outputs][channels / groups][kernel.y][kernel.x]; integers in [-127, 127] when int8;
                         // null: only counted, in an engine that is asked for its memory() alone
  int64_t outputs;
  int64_t groups;
  Window window;
};

// Spikes, counts or values of the layer's own shape, which add `unit` each to its current.
struct Skip {
  int64_t source;
  float unit;
};

// Channels [first, first + channels) of a source; where the step gives real values, `unit` times what they are.
struct Part {
  int64_t source, first, channels;
  float unit;
};

// A source that is counted so many times.
struct Term {
  int64_t source, times;
};

struct LayerParameters {
  Precision precision;  // of the weights; fp32 in a layer that meets real values or has several skips
  const float* bias;    // [outputs]
  const float* scale;   // [outputs] when int8: current = sum * scale + bias
};

struct NeuronParameters {
  const float* threshold;  // [outputs]
  const float* leak;       // [outputs]
  Reset reset;
  float v_reset;
};

struct LayerReport {
  int64_t spikes = 0;           // that the layer gave
  int64_t neurons = 0;          // of one image
  int64_t additions = 0;        // weights added, and the doublings and sums that pooled counts cost
  int64_t multiplications = 0;  // of real values, the image's among them
  int64_t weight_bytes = 0;     // of the rows added
  int64_t spike_bytes = 0;      // of the bits read and written
  int64_t value_bytes = 0;      // of the real values read and written, but for the image's
  double milliseconds = 0;
};

// What one call did, and the memory that it worked in.
struct Call {
  int64_t images = 0;
  std::vector<LayerReport> report;          // in the order of adding
  std::vector<std::vector<uint64_t>> bits;  // of source i at i - 1:
                                            // [digit of the count][image][timestep][row][column][word of 64 channels];
                                            // none where it gives real values
  std::vector<Buffer<char>> values;         // by slot: float [image][timestep][row][column][channel]
  Buffer<char> sums;
};

// How weights are taken over, where all that an engine will hold is known beforehand: no copy of a layer is made on the
// way to its place.
struct Loading {
  int64_t bytes = 0;                 // memory() of the whole network; 0: unknown
  std::function<void()> part_taken;  // called when another part of a layer's weights has been read
};

struct Network;
struct Source;
struct Step;
struct Connection;
class Shelf;

// Once its readout or output is there an engine does not change: any number of threads may run it at once.
class Engine {
 public:
  Engine(Shape image, int64_t timesteps, Loading loading = {});
  ~Engine();

  // Each returns the number that stands for the spikes it gives. std::invalid_argument says what cannot be.
  // A layer's current is the sum of its synapses, its skips and its bias.
  int64_t add_neurons(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                      const LayerParameters& parameters, const NeuronParameters& neurons);
  // Currents that reach no neurons: real values.
  int64_t add_currents(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                       const LayerParameters& parameters);
  int64_t add_max_pool(int64_t source, const Window& window);      // any spike in the window is one
  int64_t add_average_pool(int64_t source, const Window& window);  // counts; dividing is for the next layer's weights
  // Counts in units of 1 / (a common multiple of the areas of all windows), see axis_multiple. Real values: averages.
  int64_t add_adaptive_pool(int64_t source, int64_t height, int64_t width);
  int64_t add_channels(const std::vector<Part>& parts);  // side by side; real values where one part has them
  int64_t add_sum(const std::vector<Term>& terms);       // of counts
  void add_readout(const Synapses& synapses, const LayerParameters& parameters);
  void add_output(int64_t source, float unit);  // its values, `unit` times what they are, as the logits

  Shape shape(int64_t source) const;
  bool real(int64_t source) const;  // gives real values
  int64_t outputs() const;          // logits
  int64_t memory() const;           // bytes of all weights
  Shape gives(int64_t step) const;  // of the steps in the order of adding

  // images [count][channels][height][width] -> logits [count][outputs], summed over the timesteps; by the calling
  // thread and up to threads - 1 others. Once nobody holds the Call, a later one takes over its memory.
  std::shared_ptr<const Call> run(const float* images, int64_t count, float* logits, int threads) const;

 private:
  const Source& source(int64_t number) const;
  int64_t add_step(Step step, int64_t most);
  Connection connect(const Synapses& synapses, Precision precision, bool rows, int tile_width);
  void place(Connection& made);
  Step layer(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips, const LayerParameters& parameters);
  Step pool(int64_t source, const Shape& out) const;
  void finish();

  std::unique_ptr<Network> network_;
  Loading loading_;
  std::shared_ptr<Buffer<char>> weights_;  // all of them, where their bytes are known
  int64_t placed_ = 0;                     // bytes of it
  std::shared_ptr<Shelf> shelf_;
};

}  // namespace iirsnn::event
