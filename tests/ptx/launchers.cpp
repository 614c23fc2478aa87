// The launchers of csrc/lif/cuda for ctypes: what they throw comes back as text, null is success.
#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "lif/cuda/bn_lif_cuda.h"
#include "lif/cuda/lif_cuda.h"

// Blocks of a multiprocessor, of which the emulator has 4: 660 in all, as on an H100.
extern "C" cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 165;
  return cudaSuccess;
}

namespace {

template <typename F>
const char* caught(F f) {
  static std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

const char* forward(const iirsnn::LifForward* args) {
  return caught([&] { iirsnn::lif_forward_cuda(*args, nullptr); });
}

int64_t workspace(const iirsnn::LifBackward* args) { return iirsnn::lif_backward_workspace_cuda(*args); }

int64_t counters(const iirsnn::LifBackward* args) { return iirsnn::lif_backward_counters_cuda(*args); }

const char* backward(const iirsnn::LifBackward* args) {
  return caught([&] { iirsnn::lif_backward_cuda(*args, nullptr); });
}

const char* unpack(const uint8_t* bits, void* s, int dtype, int64_t timesteps, int64_t neurons) {
  return caught([&] { iirsnn::unpack_spikes_cuda(bits, s, iirsnn::DType(dtype), timesteps, neurons, nullptr); });
}

int64_t bn_counters(const iirsnn::LifShape* shape) { return iirsnn::bn_lif_counters_cuda(*shape); }

int64_t bn_moments_workspace(const iirsnn::LifShape* shape) { return iirsnn::bn_lif_moments_workspace_cuda(*shape); }

int64_t bn_workspace(const iirsnn::LifShape* shape) { return iirsnn::bn_lif_workspace_cuda(*shape); }

const char* bn_moments(const iirsnn::BnLifMoments* args) {
  return caught([&] { iirsnn::bn_lif_moments_cuda(*args, nullptr); });
}

const char* bn_totals(const iirsnn::BnLifTotals* args) {
  return caught([&] { iirsnn::bn_lif_totals_cuda(*args, nullptr); });
}

const char* bn_fire(const iirsnn::BnLifCuda* args) {
  return caught([&] { iirsnn::bn_lif_fire_cuda(*args, nullptr); });
}

const char* bn_sums(const iirsnn::BnLifCuda* args) {
  return caught([&] { iirsnn::bn_lif_sums_cuda(*args, nullptr); });
}

const char* bn_grad_x(const iirsnn::BnLifCuda* args) {
  return caught([&] { iirsnn::bn_lif_grad_x_cuda(*args, nullptr); });
}

}  // extern "C"
