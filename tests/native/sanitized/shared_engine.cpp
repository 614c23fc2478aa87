// One engine, and one network behind the C interface, called by four threads at once with batches of different sizes
// and thread counts: every call has to give what a single thread gives alone. Built with sanitizers by `make sanitize`,
// which runs it in the root of the repository; needs neither torch nor Python.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "event/engine.h"
#include "event/iirsnn.h"
#include "event/thread_pool.h"

using namespace iirsnn::event;

namespace {

constexpr int64_t kClasses = 10, kMost = 9;
std::atomic<int> failures{0};

// Allocations that this thread may still make before one fails; negative: any number.
thread_local int allocations_left = -1;

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "FAILED: %s\n", what);
  ++failures;
}

std::vector<float> numbers(size_t count, float low, float high, unsigned seed, bool integers = false) {
  std::mt19937 random(seed);
  std::vector<float> made(count);
  for (float& value : made) {
    value = low + (high - low) * float(random() % 4096) / 4096;
    if (integers) value = float(int(value));
  }
  return made;
}

struct Layer {
  int64_t source, outputs;
  Window window;
  int64_t groups = 1;
  std::vector<Skip> skips{};
};

class Case {
 public:
  Case(Precision precision, int64_t timesteps) : precision_(precision), engine({2, 13, 11}, timesteps) {
    const Window same{{3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}, half{{2, 2}, {2, 2}};
    const int64_t first = neurons({0, 70, same});
    const int64_t pooled = engine.add_average_pool(first, half);
    const int64_t second = neurons({pooled, 140, same, 2});
    const int64_t third = neurons({second, 140, same, 1, {{second, 1.0f}}});
    const int64_t sum = engine.add_sum({{second, 1}, {third, 2}});
    const int64_t shuffled = engine.add_channels({{sum, 70, 70, 1}, {sum, 0, 70, 1}});
    const int64_t values = currents({shuffled, 50, same}), joined = currents({values, 50, same, 50, {{values, 1.0f}}});
    const int64_t both = engine.add_channels({{joined, 10, 40, 1}, {third, 5, 30, 0.5f}});
    const int64_t spread = engine.add_adaptive_pool(neurons({both, 140, {}, 1}), 7, 5);
    const int64_t small = engine.add_max_pool(currents({spread, 140, {}, 2}), {{3, 3}, {3, 3}});
    const int64_t hidden = neurons({small, 200, {{2, 1}}});
    const Parameters p(*this, hidden, kClasses, {});
    engine.add_readout({hidden, p.weight.data(), kClasses, 1, {}}, p.layer());
  }

  std::vector<float> call(const std::vector<float>& images, int64_t count, int threads) const {
    std::vector<float> logits(count * kClasses);
    const auto made = engine.run(images.data(), count, logits.data(), threads);
    for (const LayerReport& layer : made->report) {
      for (int64_t value : {layer.spikes, layer.additions, layer.multiplications, layer.weight_bytes}) {
        logits.push_back(float(value));
      }
    }
    return logits;
  }

 private:
  struct Parameters {
    Parameters(const Case& n, int64_t source, int64_t outputs, const Window& window, int64_t groups = 1)
        : precision(n.precision_), bias(numbers(outputs, -0.5f, 0.5f, 1)), scale(outputs, 0.01f), ones(outputs, 1.0f) {
      const bool integers = precision == Precision::int8 && !n.engine.real(source);
      const float most = integers ? 127.0f : 0.3f;
      weight = numbers(outputs * n.engine.shape(source).channels / groups * window.kernel.y * window.kernel.x, -most,
                       most, unsigned(outputs), integers);
    }
    LayerParameters layer() const { return {precision, bias.data(), scale.data()}; }

    Precision precision;
    std::vector<float> weight, bias, scale, ones;
  };

  int64_t neurons(const Layer& l) {
    const Parameters p(*this, l.source, l.outputs, l.window, l.groups);
    const NeuronParameters fires{p.ones.data(), p.ones.data(), iirsnn::Reset::soft, 0};
    return engine.add_neurons({{l.source, p.weight.data(), l.outputs, l.groups, l.window}}, l.skips, p.layer(), fires);
  }

  int64_t currents(const Layer& l) {
    const Parameters p(*this, l.source, l.outputs, l.window, l.groups);
    return engine.add_currents({{l.source, p.weight.data(), l.outputs, l.groups, l.window}}, l.skips, p.layer());
  }

  Precision precision_;

 public:
  Engine engine;
};

// Four threads make calls of any size beside each other, each on a copy of `made`: (images, threads) -> what a call
// gives.
template <typename Callable>
void threads_share(Callable made) {
  std::vector<std::vector<float>> alone;
  for (int64_t count = 0; count <= kMost; ++count) alone.push_back(made(count, 1));
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&alone, caller, made] {
      for (int turn = 0; turn < 4; ++turn) {
        const int64_t count = (caller * 5 + turn * 7) % (kMost + 1);
        expect(made(count, 1 + (caller + turn) % 3) == alone[count], "a call beside others gives what it gives alone");
      }
    });
  }
  {
    const Callable gone = std::move(made);
  }  // while others may still be running it
  for (std::thread& caller : callers) caller.join();
}

void threads_share_an_engine(const Case& network) {
  const std::vector<float> images = numbers(kMost * 2 * 13 * 11, -1.0f, 2.0f, 7);
  threads_share([&](int64_t count, int threads) { return network.call(images, count, threads); });
}

// One of those that hold a network behind the C interface.
class Holder {
 public:
  explicit Holder(iirsnn_network* network) : network_(network) { iirsnn_describe(network, &facts_); }
  Holder(const Holder& other) : network_(other.network_), facts_(other.facts_) { iirsnn_retain(network_); }
  Holder(Holder&& other) noexcept : network_(std::exchange(other.network_, nullptr)), facts_(other.facts_) {}
  Holder& operator=(const Holder&) = delete;
  ~Holder() { iirsnn_release(network_); }

  // Logits of a call, and what it says of its layers.
  std::vector<float> operator()(int64_t count, int threads) const {
    const std::vector<float> images = numbers(count * facts_.channels * facts_.height * facts_.width, 0.0f, 1.0f, 7);
    std::vector<float> found(count * facts_.classes);
    iirsnn_call* made = nullptr;
    expect(iirsnn_run(network_, images.data(), count, threads, found.data(), &made) == IIRSNN_OK, "a call through C");
    for (int64_t i = 0; made && i < facts_.layers; ++i) {
      iirsnn_layer layer;
      expect(iirsnn_layer_of(made, i, &layer) == IIRSNN_OK, "a layer of a call");
      found.push_back(float(layer.spikes));
      const uint64_t* bits = nullptr;
      if (layer.neurons && iirsnn_spikes_of(made, i, &bits) == IIRSNN_OK && count) {
        found.push_back(float(bits[0] & 0xffff));
      }
    }
    iirsnn_free_call(made);
    iirsnn_run(network_, nullptr, 1, 1, nullptr, nullptr);
    expect(*iirsnn_message(), "each thread has the message of its own failure");
    return found;
  }

 private:
  iirsnn_network* network_;
  iirsnn_facts facts_;
};

void threads_share_a_network(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  iirsnn_network* network = nullptr;
  expect(iirsnn_load_memory(bytes.data(), bytes.size(), &network) == IIRSNN_OK, "a network in memory");
  if (network) threads_share(Holder(network));
}

void exceptions_reach_the_caller() {
  for (int threads : {1, 2, 3}) {
    std::atomic<int> done{0};
    bool caught = false;
    try {
      iirsnn::parallel_for(100, threads, [&](int64_t i, int) {
        if (i == 37) throw std::runtime_error("37");
        ++done;
      });
    } catch (const std::runtime_error& error) {
      caught = std::strcmp(error.what(), "37") == 0;
    }
    expect(caught, "the exception of a task is thrown by the loop");
    expect(done < 100, "no task follows all others after an exception");
    done = 0;
    iirsnn::parallel_for(100, threads, [&](int64_t, int) { ++done; });
    expect(done == 100, "the next loop is whole");
  }
}

// Each allocation of a call fails once, or every seventeenth of them.
void memory_may_run_out(const Case& network, int step) {
  const std::vector<float> images = numbers(kMost * 2 * 13 * 11, -1.0f, 2.0f, 7);
  const std::vector<float> right = network.call(images, 3, 2);
  int failed = 0;
  for (int allowed = 0;; allowed += step) {
    std::vector<float> logits(3 * kClasses);
    allocations_left = allowed;
    try {
      network.engine.run(images.data(), 3, logits.data(), 2);
      allocations_left = -1;
      break;
    } catch (const std::bad_alloc&) {
      allocations_left = -1;
      ++failed;
    }
    expect(network.call(images, 3, 2) == right, "a call after one that had no memory");
  }
  expect(failed > (step == 1 ? 10 : 0), "calls without memory throw bad_alloc");
}

}  // namespace

// Fails where it is told to: memory_may_run_out.
void* operator new(size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* made = std::malloc(size ? size : 1)) return made;
  throw std::bad_alloc();
}
void operator delete(void* made) noexcept { std::free(made); }
void operator delete(void* made, size_t) noexcept { std::free(made); }

// With any argument: a short part.
int main(int arguments, char**) {
  const bool whole = arguments == 1;
  for (Precision precision : {Precision::int8, Precision::fp32, Precision::bf16}) {
    for (int64_t timesteps : {1, 2}) {
      const Case network(precision, timesteps);
      threads_share_an_engine(network);
      if (timesteps == 1) memory_may_run_out(network, whole ? 1 : 17);
      if (!whole) break;
    }
    if (!whole && precision == Precision::fp32) break;
  }
  for (const char* name : {"fp32", "int8"}) {
    threads_share_a_network(std::string("tests/event/files/format3-") + name + ".iirsnn");
  }
  exceptions_reach_the_caller();
  if (failures) std::fprintf(stderr, "shared_engine: %d failures\n", failures.load());
  return failures ? 1 : 0;
}
