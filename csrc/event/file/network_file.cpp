#include "event/file/network_file.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <set>
#include <stdexcept>

#include "event/file/json.h"

namespace iirsnn::event {
namespace {

constexpr int64_t kFileFormat = 2;  // of all files of iirsnn
constexpr int64_t kFormat = 3, kMostLayers = 1 << 16, kMostOfWindow = 1 << 16, kMostCount = (1 << 16) - 1,
                  kMostTimesteps = kMostCount - 1, kMostValues = (int64_t(1) << 31) - 1,
                  kMostOverTime = int64_t(1) << 34;

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

// f(), whose errors then say where.
template <typename F>
auto in(const std::string& where, const F& f) -> decltype(f()) {
  try {
    return f();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(where + ": " + error.what());
  }
}

int64_t integer(const std::string& where, const Json& of, const char* key, int64_t least, int64_t most) {
  return in(where + key, [&] { return of[key].integer(least, most); });
}
int64_t integer(const std::string& where, const Json& of, const char* key, int64_t otherwise, int64_t least,
                int64_t most) {
  return of.find(key) ? integer(where, of, key, least, most) : otherwise;
}

float number(const std::string& where, const Json& of, const char* key, float otherwise) {
  const Json* found = of.find(key);
  if (!found) return otherwise;
  return in(where + key, [&] {
    check(std::fabs(found->number()) <= 3e38, "expected a finite number");
    return float(found->number());
  });
}

const std::string& text(const std::string& where, const Json& of, const char* key) {
  return in(where + key, [&]() -> const std::string& { return of[key].string(); });
}

const std::vector<Json>& list(const std::string& where, const Json& of, const char* key) {
  return in(where + key, [&]() -> const std::vector<Json>& {
    const std::vector<Json>& found = of[key].array();
    check(!found.empty() && int64_t(found.size()) <= kMostLayers,
          "expected 1 to " + std::to_string(kMostLayers) + ", got " + std::to_string(found.size()));
    return found;
  });
}

std::vector<int64_t> integers(const std::string& where, const Json& of, const char* key, size_t count, int64_t least,
                              int64_t most) {
  return in(where + key, [&] {
    const std::vector<Json>& given = of[key].array();
    check(given.size() == count,
          "expected " + std::to_string(count) + " integers, got " + std::to_string(given.size()));
    std::vector<int64_t> found;
    for (const Json& value : given) found.push_back(value.integer(least, most));
    return found;
  });
}

std::optional<Window> window(const std::string& where, const Json& of) {
  if (!of.find("window")) return {};
  const std::vector<int64_t> n = integers(where, of, "window", 10, 0, kMostOfWindow);
  check(*std::min_element(n.begin(), n.begin() + 6) > 0,
        where + "window: expected a positive kernel, stride and dilation");
  return Window{{n[0], n[1]}, {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}};
}

template <typename T>
T choice(const std::string& where, const std::string& name, std::initializer_list<std::pair<const char*, T>> choices) {
  std::string known;
  for (const auto& [key, value] : choices) {
    if (name == key) return value;
    known += (known.empty() ? "" : ", ") + std::string(key);
  }
  throw std::invalid_argument(where + ": expected one of " + known + ", got \"" + name + "\"");
}

using Names = std::initializer_list<const char*>;

// That an object has all of `needed`, and nothing but those and `more`.
void check_keys(const std::string& where, const Json& of, Names needed, Names more = {}) {
  const auto& all = in(where, [&]() -> decltype(of.object()) { return of.object(); });
  for (const char* key : needed) check(of.find(key), where + ": expected a " + key);
  const auto among = [](Names names, const std::string& key) {
    return std::any_of(names.begin(), names.end(), [&](const char* name) { return key == name; });
  };
  for (const auto& [key, value] : all) check(among(needed, key) || among(more, key), where + ": expected no " + key);
}

std::string listed(const std::vector<int64_t>& sizes) {
  std::string all = "[";
  for (const int64_t size : sizes) all += (all.size() > 1 ? ", " : "") + std::to_string(size);
  return all + "]";
}

std::string named(const Shape& shape) {
  return std::to_string(shape.channels) + " x " + std::to_string(shape.height) + " x " + std::to_string(shape.width);
}

// Whether no number is infinite or NaN; whether no int8 is -128, which has no opposite.
bool usable(const TensorView& tensor, Precision stored) {
  bool bad = false;
  for (int64_t i = 0, count = tensor.elements(); i < count; ++i) {
    uint32_t bits = 0;
    if (stored == Precision::fp32) {
      std::memcpy(&bits, tensor.data + 4 * i, 4);
      bad |= (bits & 0x7f800000u) == 0x7f800000u;
    } else if (stored == Precision::bf16) {
      std::memcpy(&bits, tensor.data + 2 * i, 2);
      bad |= (bits & 0x7f80u) == 0x7f80u;
    } else {
      bad |= int8_t(tensor.data[i]) == -128;
    }
  }
  return !bad;
}

enum class Kind { neurons, currents, readout, max_pool, average_pool, adaptive_pool, channels, sum, output };

struct Input {
  std::string where;  // in the header
  int64_t source, groups, first, channels, times;
  float unit;
  std::optional<Window> window;
  const TensorView* weight;
  Precision stored = Precision::fp32;
};

class Reader {
 public:
  explicit Reader(const Bytes& bytes) : bytes_(bytes), tensors_(bytes.view()), header_(header(tensors_)) {}

  NetworkFile read() {
    check_keys("header", header_,
               {"format", "event_format", "timesteps", "precision", "image_shape", "layers", "notes"});
    NetworkFile file;
    file.timesteps = integer("", header_, "timesteps", 1, kMostTimesteps);
    precision_ = choice<Precision>("precision", text("", header_, "precision"),
                                   {{"fp32", Precision::fp32}, {"bf16", Precision::bf16}, {"int8", Precision::int8}});
    check(!header_["image_shape"].null(),
          "image_shape: expected that of the images, which was not known when the file was written: "
          "EventNetwork.from_model(..., image_shape=(C, H, W))");
    const std::vector<int64_t> size = integers("", header_, "image_shape", 3, 1, kMostValues);
    const Shape image{size[0], size[1], size[2]};
    const std::vector<Json>& layers = list("", header_, "layers");
    Engine counted(image, file.timesteps);  // all is checked before memory for weights is asked for
    for (size_t i = 0; i < layers.size(); ++i) {
      file.layers.push_back(add(counted, layers[i], i, i + 1 == layers.size()));
      const Shape out = counted.gives(i);
      check(out.channels * out.height * out.width * file.timesteps < kMostOverTime,
            where_of(i) + ": expected fewer than 2^31 values, got " + named(out));
      bytes_.forget();
    }
    takes_weights_ = true;
    const Loading loading{counted.memory(), [this] { bytes_.forget(); }};
    file.engine = std::make_unique<Engine>(image, file.timesteps, loading);
    for (size_t i = 0; i < layers.size(); ++i) add(*file.engine, layers[i], i, i + 1 == layers.size());
    for (const auto& [name, tensor] : tensors_.all()) {
      check(used_.count(name), "tensors: expected those of the layers, got " + name + " as well");
    }
    notes(file, size[0]);
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

  void notes(NetworkFile& file, int64_t image_channels) const {
    const Json& notes = in("notes", [&]() -> const Json& { return header_["notes"].object(), header_["notes"]; });
    if (const Json* names = notes.find("class_names"); names && !names->null()) {
      for (const Json& name : names->array()) file.class_names.push_back(name.string());
      check(int64_t(file.class_names.size()) == file.engine->outputs(), "class_names: expected one an output");
    }
    if (const Json* images = notes.find("images"); images && !images->null()) {
      file.image_notes = images->text();
      const auto channels = [&](const char* key) {
        std::vector<float> values;
        for (const Json& value : (*images)[key].array()) values.push_back(float(value.number()));
        check(int64_t(values.size()) == image_channels, std::string(key) + ": expected one number a channel");
        return values;
      };
      file.preparation = {channels("mean"), channels("std")};
      for (const float value : file.preparation.std) check(value > 0, "std: expected numbers > 0");
    }
  }

  // A tensor of the layer that is read; null where it has none of that name.
  const TensorView* tensor(const std::string& name) {
    const TensorView* found = tensors_.find(std::to_string(at_) + "." + name);
    if (found) used_.insert(std::to_string(at_) + "." + name);
    return found;
  }

  Input input(const std::string& where, const Json& given, Kind kind, size_t index) {
    check_keys(where, given, {"source"}, {"window", "groups", "unit", "first", "channels", "times"});
    const std::string of = where + ".";
    Input made{where,
               integer(of, given, "source", 0, int64_t(at_)),
               integer(of, given, "groups", 1, 1, kMostValues),
               integer(of, given, "first", 0, 0, kMostValues),
               integer(of, given, "channels", 0, 0, kMostValues),
               integer(of, given, "times", 1, 1, kMostCount),
               number(of, given, "unit", 1),
               window(of, given),
               tensor("weight." + std::to_string(index))};
    const bool sums = kind <= Kind::readout;
    check(sums || !made.weight, where + ": expected no weight where nothing is weighted");
    check(made.weight || !made.window, where + ": expected a weight beside its window");
    check(made.weight || made.source > 0, where + ": expected weights for the image");
    check(kind != Kind::channels || made.channels > 0, where + ".channels: expected at least 1, got 0");
    return made;
  }

  // float32 [outputs], finite; empty where the layer has none. Outputs < 0: any number of them.
  std::vector<float> vector(const std::string& where, const char* name, bool wanted, int64_t outputs) {
    const TensorView* found = tensor(name);
    check(wanted == (found != nullptr), where + ": expected " + (wanted ? "a " : "no ") + name + " of a " + kind_);
    if (!found) return {};
    const std::string at = where + "." + name, got = (found->dtype == "F32" ? "float32" : found->dtype);
    check(found->dtype == "F32" && found->shape.size() == 1 && found->shape[0] > 0 && found->shape[0] <= kMostValues &&
              (outputs < 0 || found->shape[0] == outputs),
          at + ": expected float32[" + (outputs < 0 ? "outputs" : std::to_string(outputs)) + "], got " + got +
              listed(found->shape));
    check(usable(*found, Precision::fp32), at + ": expected finite numbers, got inf or NaN");
    std::vector<float> values(found->shape[0]);
    std::memcpy(values.data(), found->data, found->bytes);
    return values;
  }

  // The weights of a layer: of one type, which it may have, and of the shape that its window wants.
  void check_weights(const std::string& where, std::vector<Input>& inputs, bool real, int64_t outputs) const {
    const std::string* type = nullptr;
    for (size_t i = 0; i < inputs.size(); ++i) {
      Input& each = inputs[i];
      if (!each.weight) continue;
      const TensorView& weight = *each.weight;
      const bool same = !type || *type == weight.dtype;
      type = &weight.dtype;
      const char* const allowed = precision_ == Precision::bf16 ? "BF16" : precision_ == Precision::int8 ? "I8" : "F32";
      check(same && (weight.dtype == "F32" || (!real && weight.dtype == allowed)),
            where + ": expected weights of one type that the network has, got " + weight.dtype);
      each.stored = weight.dtype == "F32" ? Precision::fp32 : precision_;
      const std::string at = where + ".weight." + std::to_string(i);
      std::vector<int64_t> shape{outputs, weight.shape.size() > 1 ? weight.shape[1] : 0};
      std::string wanted = "[" + std::to_string(outputs) + ", channels";
      if (each.window) {
        for (const int64_t k : {each.window->kernel.y, each.window->kernel.x}) {
          shape.push_back(k);
          wanted += ", " + std::to_string(k);
        }
      }
      check(weight.shape == shape && shape[1] > 0, at + ": expected " + wanted + "], got " + listed(weight.shape));
      check(outputs % each.groups == 0,
            at + ": expected outputs in " + std::to_string(each.groups) + " groups, got " + std::to_string(outputs));
      check(takes_weights_ || usable(weight, each.stored),
            at + (each.stored == Precision::int8 ? ": expected integers from -127 to 127, got -128"
                                                 : ": expected finite numbers, got inf or NaN"));
    }
  }

  Synapses synapses_of(const Engine& engine, const Input& each) const {
    const Shape in = engine.shape(each.source);
    const std::vector<int64_t>& shape = each.weight->shape;
    Window over;
    if (each.window) {
      over = *each.window;
      check(in.channels % each.groups == 0 && shape[1] == in.channels / each.groups,
            each.where + ": expected " + std::to_string(in.channels) + " channels, got " + std::to_string(shape[1]) +
                " in " + std::to_string(each.groups) + " groups");
    } else {
      over.kernel = {in.height, in.width};
      const int64_t features = in.channels * in.height * in.width;
      check(shape[1] == features && each.groups == 1,
            each.where + ": expected " + std::to_string(features) + " input features, got " + std::to_string(shape[1]));
    }
    return {each.source, {takes_weights_ ? each.weight->data : nullptr, each.stored}, shape[0], each.groups, over};
  }

  static std::string where_of(size_t layer) { return "layers." + std::to_string(layer); }

  LayerName add(Engine& engine, const Json& layer, size_t index, bool last) {
    at_ = index;
    const std::string where = where_of(index), of = where + ".";
    check_keys(where, layer, {"kind", "name", "inputs"}, {"window", "size", "reset", "v_reset"});
    kind_ = text(of, layer, "kind");
    const Kind kind = choice<Kind>(of + "kind", kind_,
                                   {{"neurons", Kind::neurons},
                                    {"currents", Kind::currents},
                                    {"readout", Kind::readout},
                                    {"max_pool", Kind::max_pool},
                                    {"average_pool", Kind::average_pool},
                                    {"adaptive_pool", Kind::adaptive_pool},
                                    {"channels", Kind::channels},
                                    {"sum", Kind::sum},
                                    {"output", Kind::output}});
    const LayerName name{kind_, text(of, layer, "name")};
    check((kind == Kind::readout || kind == Kind::output) == last,
          where + ": expected a readout or an output as the last layer, and only there");
    const Reset reset = choice<Reset>(
        of + "reset", layer.find("reset") ? text(of, layer, "reset") : "soft",
        {{"soft", Reset::soft}, {"hard", Reset::hard}, {"none", Reset::none}, {"soft_delayed", Reset::soft_delayed}});
    const float v_reset = number(of, layer, "v_reset", 0);

    const std::vector<Json>& given = list(of, layer, "inputs");
    const bool several = kind == Kind::neurons || kind == Kind::currents || kind == Kind::channels || kind == Kind::sum;
    check(several || given.size() == 1,
          where + ": expected one input of a " + kind_ + ", got " + std::to_string(given.size()));
    std::vector<Input> inputs;
    bool real = false, integers_there = false, weighted = false;
    for (size_t i = 0; i < given.size(); ++i) {
      inputs.push_back(input(of + "inputs." + std::to_string(i), given[i], kind, i));
      real |= engine.real(inputs[i].source);
      weighted |= inputs[i].weight != nullptr;
      integers_there |= inputs[i].weight && inputs[i].weight->dtype == "I8";
    }

    const auto wanted = [&](const char* key, bool there) {
      check((layer.find(key) != nullptr) == there,
            where + ": expected " + (there ? "a " : "no ") + key + " of a " + kind_);
    };
    wanted("window", kind == Kind::max_pool || kind == Kind::average_pool);
    wanted("size", kind == Kind::adaptive_pool);
    const bool sums = kind <= Kind::readout, fires = kind == Kind::neurons;
    check(kind != Kind::readout || weighted, where + ": expected a weight of a readout");
    const std::vector<float> bias = vector(where, "bias", sums, -1);
    const int64_t outputs = int64_t(bias.size());
    const std::vector<float> threshold = vector(where, "threshold", fires, outputs),
                             leak = vector(where, "leak", fires, outputs),
                             scale = vector(where, "scale", integers_there, outputs);
    for (const float value : threshold) check(value > 0, where + ".threshold: expected numbers > 0");
    check_weights(where, inputs, real, outputs);

    const std::optional<Window> over = window(of, layer);
    const std::vector<int64_t> size =
        layer.find("size") ? integers(of, layer, "size", 2, 1, kMostOfWindow) : std::vector<int64_t>{};
    try {
      if (kind == Kind::max_pool) {
        engine.add_max_pool(inputs[0].source, *over);
      } else if (kind == Kind::average_pool) {
        engine.add_average_pool(inputs[0].source, *over);
      } else if (kind == Kind::adaptive_pool) {
        engine.add_adaptive_pool(inputs[0].source, size[0], size[1]);
      } else if (kind == Kind::channels) {
        std::vector<Part> parts;
        for (const Input& each : inputs) parts.push_back({each.source, each.first, each.channels, each.unit});
        engine.add_channels(parts);
      } else if (kind == Kind::sum) {
        std::vector<Term> terms;
        for (const Input& each : inputs) terms.push_back({each.source, each.times});
        engine.add_sum(terms);
      } else if (kind == Kind::output) {
        engine.add_output(inputs[0].source, inputs[0].unit);
      } else {
        std::vector<Synapses> synapses;
        std::vector<Skip> skips;
        Precision stored = Precision::fp32;
        for (const Input& each : inputs) {
          if (each.weight) {
            synapses.push_back(synapses_of(engine, each));
            stored = each.stored;
          } else {
            skips.push_back({each.source, each.unit});
            const int64_t channels = engine.shape(each.source).channels;
            check(channels == outputs,
                  each.where + ": expected " + std::to_string(outputs) + " channels, got " + std::to_string(channels));
          }
        }
        const LayerParameters parameters{stored, bias.data(), scale.empty() ? nullptr : scale.data()};
        if (kind == Kind::readout) {
          engine.add_readout(synapses[0], parameters);
        } else if (kind == Kind::currents) {
          engine.add_currents(synapses, skips, parameters);
        } else {
          engine.add_neurons(synapses, skips, parameters, {threshold.data(), leak.data(), reset, v_reset});
        }
      }
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(where + ": cannot follow " + named(engine.shape(inputs[0].source)) + " (" +
                                  error.what() + ")");
    }
    return name;
  }

  const Bytes& bytes_;
  Tensors tensors_;
  Json header_;
  Precision precision_ = Precision::fp32;
  bool takes_weights_ = false;  // else it checks and counts them
  size_t at_ = 0;               // layer
  std::string kind_;            // of it
  std::set<std::string> used_;  // names of tensors
};

}  // namespace

NetworkFile read_network(const Bytes& bytes) {
  check_whole(bytes.view());
  bytes.forget();
  return Reader(bytes).read();
}

}  // namespace iirsnn::event
