// A network in the file that `iirsnn deploy` writes -> the engine that runs it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "event/engine.h"
#include "event/file/tensors.h"

namespace iirsnn::event {

// How pixels become what the network was trained on: (pixel / 255 - mean) / std, a number a channel.
struct Preparation {
  std::vector<float> mean, std;
};

struct LayerName {
  std::string kind, name;
};

struct NetworkFile {
  std::unique_ptr<Engine> engine;
  int64_t timesteps;
  std::vector<LayerName> layers;         // in the order of a call's report
  std::vector<std::string> class_names;  // empty where the file has none
  std::string image_notes;               // JSON, as it stands in the file; likewise
  Preparation preparation;               // likewise
};

// Takes what it needs from the bytes. std::invalid_argument: what was expected of them, and what came: every value is
// checked for its type and range, and the checksum over all of the file first of all.
NetworkFile read_network(const Bytes& bytes);

}  // namespace iirsnn::event
