// EventEngine for Python: numpy arrays in and out, each checked for its shape here.
#include "event/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "event/engine.h"
#include "event/plan.h"

namespace py = pybind11;

namespace iirsnn::event {
namespace {

using Array = py::array_t<float, py::array::c_style>;
using Numbers = std::array<int64_t, 10>;  // kernel, stride, dilation, padding before and after: y, x each

Window window(const Numbers& n) { return {{n[0], n[1]}, {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}}; }

Precision precision(const std::string& name) {
  if (name == "fp32") return Precision::fp32;
  if (name == "bf16") return Precision::bf16;
  if (name == "int8") return Precision::int8;
  throw std::invalid_argument("precision: expected fp32, bf16 or int8, got '" + name + "'");
}

Reset reset(const std::string& name) {
  const char* const names[] = {"soft", "hard", "none", "soft_delayed"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return Reset(i);
  }
  throw std::invalid_argument("reset: expected soft, hard, none or soft_delayed, got '" + name + "'");
}

const float* values(const char* name, const Array& array, int64_t outputs) {
  if (array.ndim() != 1 || array.shape(0) != outputs) {
    throw std::invalid_argument(std::string(name) + ": expected float32 [" + std::to_string(outputs) + "], got " +
                                std::to_string(array.size()) + " values in " + std::to_string(array.ndim()) +
                                " dimensions");
  }
  return array.data();
}

// (source, weight [outputs, channels / groups, kernel y, kernel x], groups, window)
using PySynapses = std::tuple<int64_t, Array, int64_t, Numbers>;

Synapses synapses(const Engine& engine, const PySynapses& given) {
  const auto& [source, weight, groups, numbers] = given;
  const int64_t channels = engine.shape(source).channels / (groups > 0 ? groups : 1);
  if (weight.ndim() != 4 || weight.shape(1) != channels || weight.shape(2) != numbers[0] ||
      weight.shape(3) != numbers[1]) {
    std::string got;
    for (int i = 0; i < weight.ndim(); ++i) got += (i ? ", " : "") + std::to_string(weight.shape(i));
    throw std::invalid_argument("weight: expected float32 [outputs, " + std::to_string(channels) + ", " +
                                std::to_string(numbers[0]) + ", " + std::to_string(numbers[1]) + "], got [" + got +
                                "]");
  }
  return {source, weight.data(), weight.shape(0), groups, window(numbers)};
}

LayerParameters parameters(const std::string& name, const Array& bias, const Array& scale, int64_t outputs) {
  const Precision chosen = precision(name);
  return {chosen, values("bias", bias, outputs), chosen == Precision::int8 ? values("scale", scale, outputs) : nullptr};
}

using PySkips = std::vector<std::pair<int64_t, float>>;  // (source, unit)

// A layer's parts, its arrays borrowed.
struct LayerParts {
  std::vector<Synapses> synapses;
  std::vector<Skip> skips;
  int64_t outputs;
  LayerParameters parameters;

  LayerParts(const Engine& engine, const std::vector<PySynapses>& given, const PySkips& added,
             const std::string& precision_name, const Array& bias, const Array& scale) {
    for (const PySynapses& one : given) synapses.push_back(event::synapses(engine, one));
    for (const auto& [source, unit] : added) skips.push_back({source, unit});
    if (synapses.empty() && skips.empty()) throw std::invalid_argument("synapses: expected at least one, got none");
    outputs = synapses.empty() ? engine.shape(skips[0].source).channels : synapses[0].outputs;
    parameters = event::parameters(precision_name, bias, scale, outputs);
  }
};

int64_t add_neurons(Engine& engine, const std::vector<PySynapses>& given, const PySkips& skips,
                    const std::string& precision_name, const Array& bias, const Array& scale, const Array& threshold,
                    const Array& leak, const std::string& reset_name, float v_reset) {
  const LayerParts parts(engine, given, skips, precision_name, bias, scale);
  return engine.add_neurons(
      parts.synapses, parts.skips, parts.parameters,
      {values("threshold", threshold, parts.outputs), values("leak", leak, parts.outputs), reset(reset_name), v_reset});
}

int64_t add_currents(Engine& engine, const std::vector<PySynapses>& given, const PySkips& skips,
                     const std::string& precision_name, const Array& bias, const Array& scale) {
  const LayerParts parts(engine, given, skips, precision_name, bias, scale);
  return engine.add_currents(parts.synapses, parts.skips, parts.parameters);
}

int64_t add_channels(Engine& engine, const std::vector<std::tuple<int64_t, int64_t, int64_t, float>>& given) {
  std::vector<Part> parts;
  for (const auto& [source, first, channels, unit] : given) parts.push_back({source, first, channels, unit});
  return engine.add_channels(parts);
}

int64_t add_sum(Engine& engine, const std::vector<std::pair<int64_t, int64_t>>& given) {
  std::vector<Term> terms;
  for (const auto& [source, times] : given) terms.push_back({source, times});
  return engine.add_sum(terms);
}

void add_readout(Engine& engine, const PySynapses& given, const std::string& precision_name, const Array& bias,
                 const Array& scale) {
  const Synapses one = synapses(engine, given);
  engine.add_readout(one, parameters(precision_name, bias, scale, one.outputs));
}

py::tuple run(const Engine& engine, const Array& images, int threads) {
  const Shape shape = engine.shape(0);
  if (images.ndim() != 4 || images.shape(1) != shape.channels || images.shape(2) != shape.height ||
      images.shape(3) != shape.width) {
    throw std::invalid_argument("images: expected float32 [count, " + std::to_string(shape.channels) + ", " +
                                std::to_string(shape.height) + ", " + std::to_string(shape.width) + "]");
  }
  Array logits({py::ssize_t(images.shape(0)), py::ssize_t(engine.outputs())});
  const float* from = images.data();
  float* to = logits.mutable_data();
  std::shared_ptr<const Call> call;
  {
    const py::gil_scoped_release release;
    call = engine.run(from, images.shape(0), to, threads);
  }
  return py::make_tuple(logits, std::const_pointer_cast<Call>(call));
}

py::array_t<uint64_t> bits(const Engine& engine, const Call& call, int64_t source) {
  const Shape shape = engine.shape(source);
  if (source < 1 || source > int64_t(call.bits.size()) || engine.real(source)) {
    throw std::invalid_argument("source: expected the number of a layer that gives spikes or counts, 1 to " +
                                std::to_string(call.bits.size()) + ", got " + std::to_string(source));
  }
  const std::vector<uint64_t>& all = call.bits[source - 1];
  const py::ssize_t rows = shape.height, columns = shape.width, words = ceil_div(shape.channels, kWord);
  return py::array_t<uint64_t>({py::ssize_t(all.size()) / (rows * columns * words), rows, columns, words}, all.data());
}

py::list report(const Call& call) {
  py::list layers;
  for (const LayerReport& layer : call.report) {
    py::dict entry;
    entry["spikes"] = layer.spikes;
    entry["neurons"] = layer.neurons;
    entry["additions"] = layer.additions;
    entry["multiplications"] = layer.multiplications;
    entry["weight_bytes"] = layer.weight_bytes;
    entry["spike_bytes"] = layer.spike_bytes;
    entry["value_bytes"] = layer.value_bytes;
    entry["milliseconds"] = layer.milliseconds;
    layers.append(entry);
  }
  return layers;
}

using Size = std::array<int64_t, 3>;  // channels, rows, columns

// [(first output, outputs, first image, images, first row, rows)] of a layer's tasks.
std::vector<std::array<int64_t, 6>> tasks(const Size& out, int64_t images, int64_t steps,
                                          const std::string& precision_name, bool rows, int threads) {
  const Precision chosen = precision(precision_name);
  const Load load{{out[0], out[1], out[2]}, images, steps, round_up(out[0], row_unit(chosen)), chosen, rows, threads};
  std::vector<std::array<int64_t, 6>> found;
  for (const Strip& s : cut(load)) {
    found.push_back({s.output, s.outputs, s.first, s.last - s.first, s.top, s.bottom - s.top});
  }
  return found;
}

std::vector<uint8_t> carried(const Array& weight, int64_t groups, int64_t most) {
  if (weight.ndim() != 3 || groups < 1 || weight.shape(0) % groups != 0) {
    throw std::invalid_argument("weight: expected float32 [outputs, channels / groups, taps], outputs in whole groups");
  }
  const Filters filters{weight.data(), weight.shape(0), groups, weight.shape(1), weight.shape(2)};
  return carries(filters, 0, filters.outputs, 0, filters.group_channels * groups, most);
}

std::vector<std::array<int64_t, 4>> reach(const Size& in, const Numbers& numbers, int64_t top, int64_t bottom) {
  const Shape from{in[0], in[1], in[2]};
  const Shape to = output_shape(from, 1, window(numbers));
  std::vector<std::array<int64_t, 4>> found;
  for (const Tap& tap : taps(window(numbers), from, to.width, top, bottom, from.width, 1, 1)) {
    found.push_back({tap.in, tap.out, tap.rows, tap.columns});
  }
  return found;
}

void bind_plan(py::module_ m) {
  m.doc() = "How the engine cuts its work, for tests; see csrc/event/plan.h.";
  m.def("tasks", &tasks, py::arg("out"), py::arg("images"), py::arg("steps"), py::arg("precision"), py::arg("rows"),
        py::arg("threads"), "[(first output, outputs, first image, images, first row, rows)] of a layer's tasks.");
  m.def("carries", &carried, py::arg("weight"), py::arg("groups"), py::arg("most"),
        "Carry [word][tap] of int8 weights [outputs, channels / groups, taps]: 0 none, 1 before, 2 by digit.");
  m.def("taps", &reach, py::arg("shape"), py::arg("window"), py::arg("top"), py::arg("bottom"),
        "[(first pixel, first position, rows, columns)] of each tap over the rows [top, bottom) of the output.");
}

}  // namespace

void bind(py::module_& m) {
  bind_plan(m.def_submodule("event_plan"));
  py::class_<Call, std::shared_ptr<Call>>(m, "EventCall", "What one call of an EventEngine did.")
      .def("report", &report, "One dict a layer.");
  py::class_<Engine>(m, "EventEngine", "A spiking network that adds weights where spikes are; see csrc/event/engine.h.")
      .def(py::init([](int64_t channels, int64_t height, int64_t width, int64_t timesteps) {
             return std::make_unique<Engine>(Shape{channels, height, width}, timesteps);
           }),
           py::arg("channels"), py::arg("height"), py::arg("width"), py::arg("timesteps"))
      .def("add_neurons", &add_neurons, py::arg("synapses"), py::arg("skips"), py::arg("precision"), py::arg("bias"),
           py::arg("scale"), py::arg("threshold"), py::arg("leak"), py::arg("reset"), py::arg("v_reset"))
      .def(
          "add_max_pool", [](Engine& e, int64_t source, const Numbers& n) { return e.add_max_pool(source, window(n)); },
          py::arg("source"), py::arg("window"))
      .def(
          "add_average_pool",
          [](Engine& e, int64_t source, const Numbers& n) { return e.add_average_pool(source, window(n)); },
          py::arg("source"), py::arg("window"))
      .def("add_currents", &add_currents, py::arg("synapses"), py::arg("skips"), py::arg("precision"), py::arg("bias"),
           py::arg("scale"))
      .def("add_adaptive_pool", &Engine::add_adaptive_pool, py::arg("source"), py::arg("height"), py::arg("width"))
      .def("add_channels", &add_channels, py::arg("parts"), "[(source, first channel, channels, unit)] side by side.")
      .def("add_sum", &add_sum, py::arg("terms"), "[(source, how often it counts)] of counts.")
      .def("add_readout", &add_readout, py::arg("synapses"), py::arg("precision"), py::arg("bias"), py::arg("scale"))
      .def("add_output", &Engine::add_output, py::arg("source"), py::arg("unit"))
      .def(
          "shape",
          [](const Engine& e, int64_t source) {
            const Shape s = e.shape(source);
            return py::make_tuple(s.channels, s.height, s.width);
          },
          py::arg("source"))
      .def("run", &run, py::arg("images"), py::arg("threads"),
           "float32 [count, channels, height, width] -> logits [count, classes], EventCall. Any number of threads may "
           "call it at once.")
      .def("bits", &bits, py::arg("call"), py::arg("source"),
           "uint64 [digit of the count * image * timestep, row, column, word of 64 channels] of a call.");
}

}  // namespace iirsnn::event
