// A network as the engine keeps it: nothing here changes once its readout has been added.
#pragma once

#include <memory>
#include <vector>

#include "event/engine.h"
#include "event/kernels.h"
#include "event/plan.h"

namespace iirsnn::event {

// Spikes, counts or real values that a step gives.
struct Source {
  Shape shape;
  int64_t most;      // of one count: 1, or what pools and sums may reach; 0: real values
  int64_t planes;    // binary digits of it
  int64_t slot = 0;  // of real values, in a call's memory

  bool real() const { return planes == 0; }
  int64_t words() const { return ceil_div(shape.channels, kWord); }
  int64_t image_words() const { return shape.height * shape.width * words(); }
  int64_t values() const { return shape.channels * shape.height * shape.width; }
};

// Synapses with their weights as the kernels want them.
struct Connection {
  int64_t source;
  Shape in;
  Window window;
  std::vector<std::vector<Piece>> tiles;  // a single one when the layer has whole rows
  std::shared_ptr<Buffer<char>> weights;
  int64_t bytes, start = 0;  // start: of its weights in theirs
  bool each = false;         // of real values, an output for each channel: weights [tap][output, padded]
};

struct Step {
  enum Kind {
    kNeurons,
    kCurrents,
    kReadout,
    kMaxPool,
    kAveragePool,
    kAdaptivePool,
    kChannels,
    kSum,
    kOutput,
  } kind;
  Shape out;
  int64_t gives = 0;  // source number of what it gives; none for the readout and the output

  // pools and the output
  int64_t source = 0;
  Window window;
  float unit = 1;

  std::vector<Part> parts;
  std::vector<Term> terms;

  // layers
  Precision precision = Precision::fp32;
  std::vector<Connection> connections;
  std::vector<Skip> skips;                          // at most one, of counts, which the neurons add
  std::vector<Skip> others;                         // added to the sums
  bool constant = false;                            // reads the image alone: the same sums at every timestep
  bool rows = false;                                // keeps its rows of weights whole
  int tile = 0;                                     // outputs of a tile
  std::vector<float> bias, scale, threshold, leak;  // padded to whole rows
  Reset reset = Reset::soft;
  float v_reset = 0;

  int64_t padded() const { return round_up(out.channels, row_unit(precision)); }
};

struct Network {
  Shape image;
  int64_t timesteps;
  std::vector<Source> sources;      // that of number i is at i - 1
  std::vector<Step> steps;          // each after those whose sources it reads
  std::vector<int64_t> slots = {};  // real values of one image and timestep that each holds, as many as any step needs

  const Source& source(int64_t number) const { return sources[number - 1]; }
};

// The sources that a step reads, in order.
std::vector<int64_t> sources_of(const Step& step);

// Runs `call.images` images through the network; `call` holds the memory, and what was done.
void run_network(const Network& network, const float* images, float* logits, int threads, Call& call);

}  // namespace iirsnn::event
