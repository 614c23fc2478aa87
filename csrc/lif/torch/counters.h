// Counters by which the last block of a launch knows that it is the last.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

namespace iirsnn {

// At least `count` of them, all 0, which the launch has to leave at 0: one tensor a stream serves all its launches. A
// graph has its own, zeroed at each replay, for it may be replayed beside launches of the stream it was captured on.
inline at::Tensor zeroed_counters(const at::Tensor& like, int64_t count) {
  const auto options = like.options().dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return at::zeros({count}, options);
  }
  static std::mutex mutex;
  static auto& kept = *new std::map<std::tuple<int, c10::StreamId>, at::Tensor>();  // never freed: CUDA ends before it
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& counters = kept[{like.get_device(), c10::cuda::getCurrentCUDAStream().id()}];
  if (!counters.defined() || counters.numel() < count) counters = at::zeros({std::max<int64_t>(count, 1024)}, options);
  return counters;
}

}  // namespace iirsnn
