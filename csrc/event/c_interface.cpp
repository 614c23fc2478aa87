// The C interface: every function catches what the engine throws.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>

#include "event/file/network_file.h"
#include "event/iirsnn.h"
#include "simd/capability.h"

#ifndef IIRSNN_VERSION
#define IIRSNN_VERSION "unknown"
#endif

using namespace iirsnn::event;

struct iirsnn_network {
  NetworkFile file;
  int64_t weight_bytes;
  std::atomic<int> owners{1};
};

struct iirsnn_call {
  const iirsnn_network* network;  // retained
  std::shared_ptr<const Call> call;
};

namespace {

thread_local std::string message;

iirsnn_status failed(iirsnn_status status, const char* why) {
  try {
    message = why;
  } catch (const std::bad_alloc&) {
    message.clear();
  }
  return status;
}

template <typename F>
iirsnn_status guarded(iirsnn_status bad, const F& f) {
  try {
    f();
    return IIRSNN_OK;
  } catch (const std::bad_alloc&) {
    return failed(IIRSNN_NO_MEMORY, "no memory");
  } catch (const std::invalid_argument& error) {
    return failed(bad, error.what());
  } catch (const std::exception& error) {
    return failed(IIRSNN_FAILED, error.what());
  }
}

void load(const Bytes& bytes, iirsnn_network** network) {
  NetworkFile file = read_network(bytes);
  const int64_t size = file.engine->memory();
  *network = new iirsnn_network{std::move(file), size};
}

// A layer of a call.
const LayerReport& report_of(const Call& call, int64_t index) {
  check(index >= 0 && index < int64_t(call.report.size()),
        "index: expected a layer below " + std::to_string(call.report.size()) + ", got " + std::to_string(index));
  return call.report[index];
}

}  // namespace

extern "C" {

const char* iirsnn_version(void) { return IIRSNN_VERSION; }

const char* iirsnn_capability(void) {
  try {
    return iirsnn::cpu_capability();
  } catch (const std::exception& error) {  // of IIRSNN_CPU_CAPABILITY
    failed(IIRSNN_BAD_ARGUMENT, error.what());
    return nullptr;
  }
}

iirsnn_status iirsnn_set_capability(const char* name) {
  if (!name) return failed(IIRSNN_BAD_ARGUMENT, "expected the name of an instruction set, got NULL");
  return guarded(IIRSNN_BAD_ARGUMENT, [&] { iirsnn::set_cpu_capability(name); });
}

const char* iirsnn_message(void) { return message.c_str(); }

iirsnn_status iirsnn_load_file(const char* path, iirsnn_network** network) {
  if (!path || !network) return failed(IIRSNN_BAD_ARGUMENT, "expected a path and a place for the network, got NULL");
#if defined(IIRSNN_NO_FILES)
  return failed(IIRSNN_FAILED, "built without files: expected iirsnn_load_memory");
#else
  return guarded(IIRSNN_BAD_FILE, [&] {
    try {
      load(Bytes::of_file(path), network);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string(path) + ": " + error.what());
    }
  });
#endif
}

iirsnn_status iirsnn_load_memory(const void* bytes, size_t size, iirsnn_network** network) {
  if (!bytes || !network) return failed(IIRSNN_BAD_ARGUMENT, "expected bytes and a place for the network, got NULL");
  return guarded(IIRSNN_BAD_FILE, [&] { load(Bytes::borrowed(bytes, int64_t(size)), network); });
}

void iirsnn_retain(iirsnn_network* network) {
  if (network) network->owners.fetch_add(1, std::memory_order_relaxed);
}

void iirsnn_release(iirsnn_network* network) {
  if (network && network->owners.fetch_sub(1, std::memory_order_acq_rel) == 1) delete network;
}

iirsnn_status iirsnn_describe(const iirsnn_network* network, iirsnn_facts* facts) {
  if (!network || !facts) return failed(IIRSNN_BAD_ARGUMENT, "expected a network and a place for its facts, got NULL");
  const NetworkFile& file = network->file;
  const Shape image = file.engine->shape(0);
  *facts = {image.channels,        image.height,
            image.width,           file.engine->outputs(),
            file.timesteps,        int64_t(file.layers.size()),
            network->weight_bytes, !file.preparation.mean.empty()};
  return IIRSNN_OK;
}

const char* iirsnn_class_name(const iirsnn_network* network, int64_t index) {
  if (!network || index < 0 || index >= int64_t(network->file.class_names.size())) return nullptr;
  return network->file.class_names[index].c_str();
}

const char* iirsnn_image_notes(const iirsnn_network* network) {
  return network && !network->file.image_notes.empty() ? network->file.image_notes.c_str() : nullptr;
}

iirsnn_status iirsnn_prepare(const iirsnn_network* network, const uint8_t* pixels, int64_t height, int64_t width,
                             int64_t colours, float* image) {
  if (!network || !pixels || !image)
    return failed(IIRSNN_BAD_ARGUMENT, "expected a network, pixels and an image, got NULL");
  return guarded(IIRSNN_BAD_ARGUMENT, [&] {
    const Shape shape = network->file.engine->shape(0);
    const Preparation& how = network->file.preparation;
    check(!how.mean.empty(), "expected a file that says how its images are normalised");
    check(height == shape.height && width == shape.width && colours == shape.channels,
          "pixels: expected " + std::to_string(shape.height) + " x " + std::to_string(shape.width) + " x " +
              std::to_string(shape.channels) + ", got " + std::to_string(height) + " x " + std::to_string(width) +
              " x " + std::to_string(colours));
    const int64_t area = height * width;
    for (int64_t c = 0; c < colours; ++c) {
      for (int64_t i = 0; i < area; ++i) {
        image[c * area + i] = (float(pixels[i * colours + c]) * float(1.0 / 255) - how.mean[c]) / how.std[c];
      }
    }
  });
}

iirsnn_status iirsnn_run(const iirsnn_network* network, const float* images, int64_t count, int threads, float* logits,
                         iirsnn_call** call) {
  if (!network || (count && (!images || !logits))) {
    return failed(IIRSNN_BAD_ARGUMENT, "expected a network, images and a place for their logits, got NULL");
  }
  return guarded(IIRSNN_BAD_ARGUMENT, [&] {
    check(count >= 0, "count: expected 0 or more images, got " + std::to_string(count));
    check(threads >= 0, "threads: expected 0 or more, got " + std::to_string(threads));
    const Engine& engine = *network->file.engine;
    const Shape shape = engine.shape(0);
    const int64_t values = count * shape.channels * shape.height * shape.width;
    bool finite = true;
    for (int64_t i = 0; i < values; ++i) finite &= std::fabs(images[i]) <= std::numeric_limits<float>::max();
    check(finite, "images: expected finite values, got inf or NaN");
    const int most = threads ? threads : std::max(1, int(std::thread::hardware_concurrency()));
    std::shared_ptr<const Call> done = engine.run(images, count, logits, most);
    if (call) {
      *call = new iirsnn_call{network, std::move(done)};
      iirsnn_retain(const_cast<iirsnn_network*>(network));
    }
  });
}

iirsnn_status iirsnn_layer_of(const iirsnn_call* call, int64_t index, iirsnn_layer* layer) {
  if (!call || !layer) return failed(IIRSNN_BAD_ARGUMENT, "expected a call and a place for its layer, got NULL");
  return guarded(IIRSNN_BAD_ARGUMENT, [&] {
    const LayerReport& done = report_of(*call->call, index);
    const NetworkFile& file = call->network->file;
    const Shape out = file.engine->gives(index);
    *layer = {file.layers[index].kind.c_str(),
              file.layers[index].name.c_str(),
              out.channels,
              out.height,
              out.width,
              done.neurons,
              done.spikes,
              done.additions,
              done.multiplications,
              done.weight_bytes,
              done.spike_bytes,
              done.value_bytes,
              done.milliseconds};
  });
}

iirsnn_status iirsnn_memory_of(const iirsnn_call* call, int64_t* bytes) {
  if (!call || !bytes) return failed(IIRSNN_BAD_ARGUMENT, "expected a call and a place for its bytes, got NULL");
  const Call& done = *call->call;
  *bytes = done.sums.size();
  for (const std::vector<uint64_t>& bits : done.bits) *bytes += int64_t(bits.capacity() * sizeof(uint64_t));
  for (const auto& values : done.values) *bytes += values.size();
  return IIRSNN_OK;
}

iirsnn_status iirsnn_spikes_of(const iirsnn_call* call, int64_t index, const uint64_t** bits) {
  if (!call || !bits) return failed(IIRSNN_BAD_ARGUMENT, "expected a call and a place for its bits, got NULL");
  return guarded(IIRSNN_BAD_ARGUMENT, [&] {
    report_of(*call->call, index);
    check(call->network->file.layers[index].kind == "neurons",
          "index: expected a layer with neurons, got " + std::to_string(index));
    *bits = call->call->bits[index].data();  // each layer but the last gives one source, in their order
  });
}

void iirsnn_free_call(iirsnn_call* call) {
  if (!call) return;
  iirsnn_network* const network = const_cast<iirsnn_network*>(call->network);
  delete call;
  iirsnn_release(network);
}

}  // extern "C"
