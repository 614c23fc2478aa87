#include "event/file/network_file.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "event/file/json.h"
#include "event/file/tensors.h"

namespace iirsnn::event {
namespace {

constexpr int64_t kFileFormat = 2;  // of all files of iirsnn
constexpr int64_t kFormat = 3, kMostOfWindow = 1 << 16, kMostValues = (int64_t(1) << 31) - 1,
                  kMostCount = (1 << 16) - 1;

// The checksum stands in the header, as eight hexadecimal digits, and counts as eight zeros there.
void check_whole(std::string_view bytes) {
  static constexpr std::string_view kBefore = "\"crc32\":\"", kZeros = "00000000";
  const size_t found = bytes.find(kBefore), at = found + kBefore.size();
  check(found != bytes.npos && bytes.size() - at > kZeros.size(), "expected a checksum, got none");
  uint32_t wanted = 0;
  const auto [stop, error] = std::from_chars(bytes.data() + at, bytes.data() + at + kZeros.size(), wanted, 16);
  check(error == std::errc() && stop == bytes.data() + at + kZeros.size(), "expected a checksum of eight digits");
  const uint32_t got = crc32(bytes.substr(at + kZeros.size()), crc32(kZeros, crc32(bytes.substr(0, at))));
  check(got == wanted, "its content is not what was written");
}

int64_t integer(const Json& of, std::string_view key, int64_t otherwise, int64_t least, int64_t most) {
  const Json* found = of.find(key);
  return found ? found->integer(least, most) : otherwise;
}

float number(const Json& of, std::string_view key, float otherwise) {
  const Json* found = of.find(key);
  if (!found) return otherwise;
  check(std::fabs(found->number()) <= 3e38, std::string(key) + ": expected a finite number");
  return float(found->number());
}

Window window(const Json& given) {
  std::array<int64_t, 10> n{};
  check(given.array().size() == n.size(), "window: expected 10 integers");
  for (size_t i = 0; i < n.size(); ++i) n[i] = given.array()[i].integer(i < 6 ? 1 : 0, kMostOfWindow);
  return {{n[0], n[1]}, {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}};
}

template <typename T>
T choice(const std::string& name, const std::vector<std::pair<const char*, T>>& choices) {
  std::string known;
  for (const auto& [key, value] : choices) {
    if (name == key) return value;
    known += (known.empty() ? "" : ", ") + std::string(key);
  }
  throw std::invalid_argument("expected one of " + known + ", got \"" + name + "\"");
}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : tensors_(bytes), header_(header(tensors_)) {}

  NetworkFile read() {
    NetworkFile file;
    file.timesteps = header_["timesteps"].integer(1, kMostCount);
    const std::vector<Json>& sizes = header_["image_shape"].array();
    check(sizes.size() == 3, "image_shape: expected three sizes, got " + std::to_string(sizes.size()));
    const auto size = [&](int i) { return sizes[i].integer(1, kMostValues); };
    file.engine = std::make_unique<Engine>(Shape{size(0), size(1), size(2)}, file.timesteps);
    precision_ = precision(header_["precision"].string());
    const std::vector<Json>& layers = header_["layers"].array();
    for (size_t i = 0; i < layers.size(); ++i) {
      at_ = i;
      try {
        file.layers.push_back({layers[i]["kind"].string(), layers[i]["name"].string()});
        add(*file.engine, layers[i]);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument("layers." + std::to_string(i) + ": " + error.what());
      }
    }
    file.engine->outputs();  // a network has to end in them
    check(used_ == tensors_.all().size(), "tensors: expected those of the layers alone");
    const Json& notes = header_["notes"];
    if (const Json* names = notes.find("class_names"); names && !names->null()) {
      for (const Json& name : names->array()) file.class_names.push_back(name.string());
      check(int64_t(file.class_names.size()) == file.engine->outputs(), "class_names: expected one an output");
    }
    if (const Json* images = notes.find("images"); images && !images->null()) {
      file.image_notes = images->text();
      file.preparation = {channels(*images, "mean", size(0)), channels(*images, "std", size(0))};
      for (const float value : file.preparation.std) check(value > 0, "std: expected numbers > 0");
    }
    return file;
  }

 private:
  static Json header(const Tensors& tensors) {
    const auto found = tensors.text().find("iirsnn");
    check(found != tensors.text().end(), "a safetensors file, but not one of iirsnn's");
    Json header = Json::parse(found->second);
    check(header["format"].integer() <= kFileFormat,
          "expected format " + std::to_string(kFileFormat) + " or older; a newer iirsnn wrote it");
    const Json* version = header.find("event_format");
    check(version, "a checkpoint of iirsnn, but no event network");
    check(version->integer() <= kFormat, "expected event format " + std::to_string(kFormat) + ", got " +
                                             std::to_string(version->integer()) + "; a newer iirsnn wrote it");
    check(version->integer() == kFormat, "expected event format " + std::to_string(kFormat) + ", got " +
                                             std::to_string(version->integer()) +
                                             ": iirsnn.event.EventNetwork loads it and saves it anew");
    return header;
  }

  static std::vector<float> channels(const Json& of, std::string_view key, int64_t count) {
    std::vector<float> values;
    for (const Json& value : of[key].array()) values.push_back(float(value.number()));
    check(int64_t(values.size()) == count, std::string(key) + ": expected one number a channel");
    return values;
  }

  static Precision precision(const std::string& name) {
    return choice<Precision>(name, {{"fp32", Precision::fp32}, {"bf16", Precision::bf16}, {"int8", Precision::int8}});
  }

  // A tensor of the layer that is read; null where it has none of that name.
  const TensorView* tensor(const std::string& name) {
    const TensorView* found = tensors_.find(std::to_string(at_) + "." + name);
    used_ += found != nullptr;
    return found;
  }

  // float32 [outputs], finite; empty where the layer has none.
  std::vector<float> vector(const std::string& name) {
    const TensorView* found = tensor(name);
    if (!found) return {};
    check(found->dtype == "F32" && found->shape.size() == 1, name + ": expected float32 [outputs]");
    std::vector<float> values(found->shape[0]);
    std::memcpy(values.data(), found->data, found->bytes);
    for (const float value : values) check(std::isfinite(value), name + ": expected finite numbers, got inf or NaN");
    return values;
  }
  std::vector<float> vector(const std::string& name, int64_t outputs) {
    std::vector<float> values = vector(name);
    check(int64_t(values.size()) == outputs, name + ": expected float32 [" + std::to_string(outputs) + "], got " +
                                                 std::to_string(values.size()) + " numbers");
    return values;
  }

  Synapses synapses(const Engine& engine, const Json& input, const TensorView& weight, Precision& stored) {
    stored =
        choice<Precision>(weight.dtype, {{"F32", Precision::fp32}, {"BF16", Precision::bf16}, {"I8", Precision::int8}});
    const StoredWeights numbers{weight.data, stored};
    for (int64_t i = 0, count = weight.elements(); i < count; ++i) {
      check(std::isfinite(numbers[i]) && numbers[i] != (stored == Precision::int8 ? -128 : INFINITY),
            "weight: expected finite numbers, and integers from -127 to 127");
    }
    const int64_t source = input["source"].integer(0, int64_t(at_)),
                  groups = integer(input, "groups", 1, 1, kMostValues);
    const Shape in = engine.shape(source);
    std::vector<int64_t> wanted{in.channels / groups, 0, 0};
    Window over;
    const Json* given = input.find("window");
    if (given) {
      over = window(*given);
    } else {
      over.kernel = {in.height, in.width};
    }
    const int64_t outputs = weight.shape.empty() ? 0 : weight.shape[0];
    std::vector<int64_t> shape{outputs, in.channels / groups * in.height * in.width};
    if (given) shape = {outputs, in.channels / groups, over.kernel.y, over.kernel.x};
    check(outputs > 0 && weight.shape == shape && in.channels % groups == 0,
          "weight: expected its shape to fit what it reads");
    return {source, numbers, outputs, groups, over};
  }

  void add(Engine& engine, const Json& layer) {
    enum Kind { neurons, currents, readout, max_pool, average_pool, adaptive_pool, channels, sum, output };
    const Kind kind = choice<Kind>(layer["kind"].string(), {{"neurons", neurons},
                                                            {"currents", currents},
                                                            {"readout", readout},
                                                            {"max_pool", max_pool},
                                                            {"average_pool", average_pool},
                                                            {"adaptive_pool", adaptive_pool},
                                                            {"channels", channels},
                                                            {"sum", sum},
                                                            {"output", output}});
    const std::vector<Json>& inputs = layer["inputs"].array();
    const bool several = kind == neurons || kind == currents || kind == channels || kind == sum;
    check(!inputs.empty() && (several || inputs.size() == 1),
          "inputs: expected one, got " + std::to_string(inputs.size()));
    const auto source = [&](const Json& input, int64_t least) { return input["source"].integer(least, int64_t(at_)); };
    const auto of = [&](const Json& input) { return source(input, 1); };  // not the image
    switch (kind) {
      case max_pool:
        engine.add_max_pool(of(inputs[0]), window(layer["window"]));
        return;
      case average_pool:
        engine.add_average_pool(of(inputs[0]), window(layer["window"]));
        return;
      case adaptive_pool: {
        const std::vector<Json>& size = layer["size"].array();
        check(size.size() == 2, "size: expected rows and columns");
        engine.add_adaptive_pool(of(inputs[0]), size[0].integer(1, kMostOfWindow), size[1].integer(1, kMostOfWindow));
        return;
      }
      case channels: {
        std::vector<Part> parts;
        for (const Json& input : inputs) {
          parts.push_back({of(input), integer(input, "first", 0, 0, kMostValues),
                           integer(input, "channels", 0, 1, kMostValues), number(input, "unit", 1)});
        }
        engine.add_channels(parts);
        return;
      }
      case sum: {
        std::vector<Term> terms;
        for (const Json& input : inputs) terms.push_back({of(input), integer(input, "times", 1, 1, kMostCount)});
        engine.add_sum(terms);
        return;
      }
      case output:
        engine.add_output(of(inputs[0]), number(inputs[0], "unit", 1));
        return;
      default:
        break;
    }
    std::vector<Synapses> weighted;
    std::vector<Skip> skips;
    Precision precision = Precision::fp32;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const TensorView* weight = tensor("weight." + std::to_string(i));
      if (!weight) {
        skips.push_back({of(inputs[i]), number(inputs[i], "unit", 1)});
        continue;
      }
      Precision stored;
      weighted.push_back(synapses(engine, inputs[i], *weight, stored));
      check(weighted.size() == 1 || stored == precision, "weight: expected all of a layer to have one type");
      check(stored == Precision::fp32 || stored == precision_, "weight: expected the network's precision or float32");
      check(weighted.back().outputs == weighted[0].outputs, "weight: expected one number of outputs");
      precision = stored;
    }
    const std::vector<float> bias = vector("bias");
    const int64_t outputs = int64_t(bias.size());
    check(outputs > 0 && outputs == (weighted.empty() ? engine.shape(skips[0].source).channels : weighted[0].outputs),
          "bias: expected float32 [outputs]");
    const std::vector<float> scale = vector("scale", is_integer(precision) ? outputs : 0);
    const LayerParameters parameters{precision, bias.data(), is_integer(precision) ? scale.data() : nullptr};
    if (kind == readout) {
      check(weighted.size() == 1, "readout: expected a weight");
      engine.add_readout(weighted[0], parameters);
    } else if (kind == currents) {
      engine.add_currents(weighted, skips, parameters);
    } else {
      const std::vector<float> threshold = vector("threshold", outputs), leak = vector("leak", outputs);
      for (const float value : threshold) check(value > 0, "threshold: expected numbers > 0");
      const Json* given = layer.find("reset");
      const Reset reset =
          choice<Reset>(given ? given->string() : "soft",
                        {{"soft", Reset(0)}, {"hard", Reset(1)}, {"none", Reset(2)}, {"soft_delayed", Reset(3)}});
      engine.add_neurons(weighted, skips, parameters,
                         {threshold.data(), leak.data(), reset, number(layer, "v_reset", 0)});
    }
  }

  Tensors tensors_;
  Json header_;
  Precision precision_ = Precision::fp32;
  size_t at_ = 0;    // layer
  size_t used_ = 0;  // tensors
};

}  // namespace

NetworkFile read_network(std::string_view bytes) {
  check_whole(bytes);
  return Reader(bytes).read();
}

}  // namespace iirsnn::event
