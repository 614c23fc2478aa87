#include <cmath>
#include <stdexcept>

#include "driver.h"
#include "event/engine.h"

namespace iirsnn::native {
namespace {

using namespace iirsnn::event;

const char* precision_name(Precision precision) {
  return precision == Precision::fp32 ? "fp32" : precision == Precision::bf16 ? "bf16" : "int8";
}

// Layers of random weights, such that neurons fire now and then.
class Network {
 public:
  Network(Shape image, int64_t timesteps, Precision precision, Reset reset)
      : engine(image, timesteps), precision_(precision), reset_(reset), image_(image) {}

  int64_t conv(int64_t source, int64_t outputs, const Window& window, int64_t groups = 1,
               const std::vector<Skip>& skips = {}) {
    const std::vector<float> weight = weights(source, outputs, window, groups);
    const std::vector<float> bias = random_.reals<float>(outputs, 0, 0.25);
    const std::vector<float> scale(outputs, unit_);
    const std::vector<float> threshold = random_.reals<float>(outputs, 0.25, 0.5);
    const std::vector<float> leak = random_.reals<float>(outputs, 0.5, 1);
    const LayerParameters parameters{precision_, bias.data(), scale.data()};
    const NeuronParameters neurons{threshold.data(), leak.data(), reset_, -0.125f};
    return keep(engine.add_neurons({{source, weight.data(), outputs, groups, window}}, skips, parameters, neurons));
  }
  // A layer without neurons.
  int64_t currents(int64_t source, int64_t outputs, const Window& window, int64_t groups = 1,
                   const std::vector<Skip>& skips = {}) {
    const std::vector<float> weight = weights(source, outputs, window, groups);
    const std::vector<float> bias = random_.reals<float>(outputs, 0, 0.25), scale(outputs, unit_);
    const LayerParameters parameters{precision_, bias.data(), scale.data()};
    return engine.add_currents({{source, weight.data(), outputs, groups, window}}, skips, parameters);
  }
  int64_t neurons(const std::vector<Skip>& skips) {
    const int64_t outputs = engine.shape(skips[0].source).channels;
    const std::vector<float> bias = random_.reals<float>(outputs, 0, 0.25);
    const std::vector<float> threshold = random_.reals<float>(outputs, 0.25, 0.5), leak(outputs, 0.5f);
    const LayerParameters parameters{Precision::fp32, bias.data(), nullptr};
    return keep(engine.add_neurons({}, skips, parameters, {threshold.data(), leak.data(), reset_, -0.125f}));
  }
  int64_t max_pool(int64_t source, const Window& window) { return keep(engine.add_max_pool(source, window)); }
  int64_t average_pool(int64_t source, const Window& window) { return keep(engine.add_average_pool(source, window)); }
  void readout(int64_t source, int64_t outputs) {
    const Window window{};
    const std::vector<float> weight = weights(source, outputs, window, 1);
    const std::vector<float> bias = random_.reals<float>(outputs, -1, 1), scale(outputs, unit_);
    engine.add_readout({source, weight.data(), outputs, 1, window}, {precision_, bias.data(), scale.data()});
  }

  // Logits, the bits of every layer and the counts of work; a layer that never fires would show nothing.
  Hash run(int64_t count) {
    const auto images = random_.reals<float>(count * image_.channels * image_.height * image_.width, 0, 1);
    std::vector<float> logits(count * engine.outputs());
    const std::shared_ptr<const Call> call = engine.run(images.data(), count, logits.data(), threads());
    Hash hash;
    hash.add(logits);
    for (const int64_t source : sources_) {
      const std::vector<uint64_t>& bits = call->bits[source - 1];
      int64_t set = 0;
      for (const uint64_t word : bits) set += __builtin_popcountll(word);
      if (set == 0) throw std::runtime_error("event: layer " + std::to_string(source) + " is silent");
      hash.add(bits);
    }
    for (const LayerReport& report : call->report) {
      hash.add(report.spikes).add(report.additions).add(report.multiplications);
    }
    return hash;
  }

  Engine engine;

 private:
  int64_t keep(int64_t source) {
    sources_.push_back(source);
    return source;
  }
  std::vector<float> weights(int64_t source, int64_t outputs, const Window& window, int64_t groups) {
    const int64_t inputs = engine.shape(source).channels / groups * window.kernel.y * window.kernel.x;
    const double most = 1.5 / std::sqrt(double(inputs));
    auto weight = random_.reals<float>(outputs * inputs, -most, most);
    unit_ = float(most) / 127;
    if (engine.real(source)) unit_ = 1;
    for (float& w : weight) {
      if (engine.real(source) || precision_ == Precision::fp32) continue;
      w = precision_ == Precision::bf16 ? to_acc(Convert<BFloat16>::round(w)) : std::nearbyint(w / unit_);
    }
    return weight;
  }

  Random random_{4};
  Precision precision_;
  Reset reset_;
  Shape image_;
  float unit_ = 1;
  std::vector<int64_t> sources_;
};

Window window(int64_t kernel, int64_t stride = 1, int64_t padding = 0, int64_t dilation = 1) {
  return {{kernel, kernel}, {stride, stride}, {dilation, dilation}, {padding, padding}, {padding, padding}};
}

// Widths of every tile, pools, counts, a skip of spikes and one of counts, groups, stride, dilation, whole rows.
void convolutions(Precision precision, int64_t timesteps, Reset reset, const std::string& name) {
  Network net({3, 11, 10}, timesteps, precision, reset);
  int64_t x = net.conv(0, 20, window(3, 1, 1));
  x = net.conv(x, 64, window(3, 1, 1));
  x = net.conv(x, 64, window(3, 1, 2, 2), 1, {{x, 0.25f}});
  x = net.max_pool(x, window(2, 2));
  x = net.conv(x, 130, window(3, 1, 1));
  const int64_t counts = net.average_pool(x, window(3, 1, 1));
  x = net.conv(counts, 96, window(3, 1, 1));
  x = net.conv(x, 130, window(1), 1, {{counts, 0.0625f}});
  x = net.conv(x, 48, window(3, 2, 1), 2);
  x = net.average_pool(x, window(2, 1));
  x = net.conv(x, 100, window(2));
  x = net.conv(x, 300, window(1));
  net.readout(x, 10);
  for (const int64_t count : {1, 3}) print(name + "/batch" + std::to_string(count), net.run(count));
}

// Sources of several readers, real values between layers, sums and selections of counts, an output without weights.
void graph(Precision precision, int64_t timesteps, const std::string& name) {
  Network net({2, 9, 8}, timesteps, precision, Reset::soft);
  const int64_t stem = net.conv(0, 70, window(3, 1, 1));
  const int64_t left = net.conv(stem, 70, window(3, 1, 1), 70);
  const int64_t sum = net.engine.add_sum({{stem, 1}, {left, 2}});
  const int64_t pooled = net.average_pool(sum, window(2, 2));
  const int64_t right = net.conv(stem, 30, window(2, 2));
  const int64_t cut = net.max_pool(right, window(3, 1, 1));
  const int64_t both = net.engine.add_channels({{pooled, 3, 61, 1}, {cut, 0, 30, 1}, {pooled, 0, 7, 1}});
  const int64_t linear = net.currents(both, 40, window(1));
  const int64_t wide = net.currents(linear, 40, window(3, 1, 1), 40, {{linear, 1}});
  const int64_t grouped = net.currents(wide, 48, window(3, 1, 1), 4);
  const int64_t largest = net.engine.add_max_pool(grouped, window(3, 1, 1));
  const int64_t mixed = net.engine.add_channels({{largest, 0, 48, 0.5f}, {both, 60, 10, 0.25f}});
  const int64_t fired = net.neurons({{mixed, 1}});
  const int64_t again = net.conv(fired, 58, window(3, 1, 1), 1, {{mixed, 0.5f}, {fired, 0.25f}});
  const int64_t spread = net.engine.add_adaptive_pool(again, 3, 5);
  const int64_t averages = net.engine.add_adaptive_pool(net.currents(spread, 20, window(1)), 2, 2);
  const int64_t last = net.neurons({{net.engine.add_average_pool(averages, window(2)), 1}});
  net.engine.add_output(last, 0.5f);
  for (const int64_t count : {1, 3}) print(name + "/batch" + std::to_string(count), net.run(count));
}

// Layers of one position: rows for a few images, tiles for many.
void linear(Precision precision, const std::string& name) {
  Network net({70, 1, 1}, 1, precision, Reset::soft);
  int64_t x = net.conv(0, 600, window(1));
  x = net.conv(x, 400, window(1));
  net.readout(x, 10);
  for (const int64_t count : {1, 5, 40}) print(name + "/batch" + std::to_string(count), net.run(count));
}

}  // namespace

void event_cases() {
  const char* const resets[] = {"soft", "hard", "none", "soft_delayed"};
  for (const Precision precision : {Precision::fp32, Precision::bf16, Precision::int8}) {
    const std::string name = std::string("event/") + precision_name(precision);
    linear(precision, name + "/linear");
    convolutions(precision, 1, Reset::soft, name + "/T1");
    for (const int64_t timesteps : {1, 3}) graph(precision, timesteps, name + "/graph/T" + std::to_string(timesteps));
    for (int reset = 0; reset < 4; ++reset) {
      convolutions(precision, 3, Reset(reset), name + "/T3/" + resets[reset]);
    }
  }
}

}  // namespace iirsnn::native
