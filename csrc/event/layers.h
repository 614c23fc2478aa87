// A network as the engine keeps it: nothing here changes once its readout has been added.
#pragma once

#include <memory>
#include <vector>

#include "event/engine.h"
#include "event/kernels.h"
#include "event/memory.h"
#include "event/plan.h"

namespace iirsnn::event {

// Spikes, or counts, that a layer gives.
struct Source {
  Shape shape;
  int64_t most;    // of one count: 1, or what an average pool may reach
  int64_t planes;  // binary digits of it

  int64_t words() const { return ceil_div(shape.channels, kWord); }
  int64_t image_words() const { return shape.height * shape.width * words(); }
};

// Synapses with their weights as the kernels want them.
struct Connection {
  int64_t source;
  Shape in;
  Window window;
  std::vector<std::vector<Piece>> tiles;  // a single one when the layer has whole rows
  std::shared_ptr<Memory> weights;
  int64_t bytes, start = 0;  // start: of its weights in theirs
};

struct Step {
  enum Kind { kNeurons, kReadout, kMaxPool, kAveragePool } kind;
  Shape out;
  int64_t gives = 0;  // source number of its spikes; none for the readout

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
  Reset reset = Reset::soft;
  float v_reset = 0;

  int64_t padded() const { return round_up(out.channels, row_unit(precision)); }
};

struct Network {
  Shape image;
  int64_t timesteps;
  std::vector<Source> sources;  // that of number i is at i - 1
  std::vector<Step> steps;

  const Source& source(int64_t number) const { return sources[number - 1]; }
};

// Runs `call.images` images through the network; `call` holds the memory, and what was done.
void run_network(const Network& network, const float* images, float* logits, int threads, Call& call);

}  // namespace iirsnn::event
