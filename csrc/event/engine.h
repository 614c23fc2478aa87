// A spiking network as a sequence of layers that handle events. Build it once, run it on any number of images.
//
// A layer's work is cut into tasks: a strip of positions by a range of outputs. A task keeps its sums (and over several
// timesteps its membranes) in a buffer of its thread that fits the cache, and writes nothing but spikes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "event/kernels.h"
#include "event/memory.h"
#include "event/shape.h"

namespace iirsnn::event {

// A convolution from a source: 0 is the image, others are what Engine::add_* returned.
struct Synapses {
  int64_t source;
  const float* weight;  // [outputs][channels / groups][kernel.y][kernel.x]; integers in [-127, 127] when int8
  int64_t outputs;
  int64_t groups;
  Window window;
};

// Spikes, or counts of an average pool, of the layer's own shape, which add `unit` each to its current.
struct Skip {
  int64_t source;
  float unit;
};

struct LayerParameters {
  Precision precision;  // of weights that spikes meet; those of the image are fp32
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
  int64_t multiplications = 0;  // of the image's values
  int64_t weight_bytes = 0;     // of the rows added
  int64_t spike_bytes = 0;      // of the bits read and written
  double milliseconds = 0;
};

// What one call did, and the memory that it worked in.
struct Call {
  int64_t images = 0;
  std::vector<LayerReport> report;          // in the order of adding
  std::vector<std::vector<uint64_t>> bits;  // of source i at i - 1:
                                            // [digit of the count][image][timestep][row][column][word of 64 channels]
  Memory sums;
};

struct Network;
struct Source;
struct Step;
struct Connection;
class Shelf;

// Once its readout is there an engine does not change: any number of threads may run it at once.
class Engine {
 public:
  Engine(Shape image, int64_t timesteps);
  ~Engine();

  // Each returns the number that stands for the spikes it gives. std::invalid_argument says what cannot be.
  // A layer's current is the sum of its synapses, plus its skip, if it has one.
  int64_t add_neurons(const std::vector<Synapses>& synapses, const std::vector<Skip>& skips,
                      const LayerParameters& parameters, const NeuronParameters& neurons);
  int64_t add_max_pool(int64_t source, const Window& window);      // any spike in the window is one
  int64_t add_average_pool(int64_t source, const Window& window);  // counts; dividing is for the next layer's weights
  void add_readout(const Synapses& synapses, const LayerParameters& parameters);

  Shape shape(int64_t source) const;
  int64_t outputs() const;  // of the readout

  // images [count][channels][height][width] -> logits [count][outputs], summed over the timesteps; by the calling
  // thread and up to threads - 1 others. Once nobody holds the Call, a later one takes over its memory.
  std::shared_ptr<const Call> run(const float* images, int64_t count, float* logits, int threads) const;

 private:
  const Source& source(int64_t number) const;
  int64_t add_step(Step step, int64_t most);
  Connection connect(const Synapses& synapses, const LayerParameters& parameters) const;
  Step layer(const std::vector<Synapses>& synapses, const LayerParameters& parameters) const;
  Step pool(int64_t source, const Window& window) const;
  void pack();

  std::unique_ptr<Network> network_;
  std::shared_ptr<Shelf> shelf_;
};

}  // namespace iirsnn::event
