// From what a launcher is given to a kernel that is compiled for it.
#pragma once

#include <stdexcept>
#include <string>

#include "lif/cuda/packets.h"
#include "lif/with_reset.h"
#include "simd/memory.h"

// The largest T that has kernels of its own; a smaller one builds faster.
#ifndef IIRSNN_UNROLLED_TIMESTEPS
#define IIRSNN_UNROLLED_TIMESTEPS 8
#endif

namespace iirsnn::cuda {

// Of few kernels, which take a third of the time to compile, resets other than the soft one are there in float32 alone,
// and not with BatchNorm.
#if defined(IIRSNN_FEW_KERNELS)
constexpr bool kEveryKernel = false;
#else
constexpr bool kEveryKernel = true;
#endif

template <typename F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::float64:
      return f(double{});
    case DType::float16:
      return f(__half{});
    case DType::bfloat16:
      return f(__nv_bfloat16{});
  }
  throw std::invalid_argument("unknown dtype " + std::to_string(int(dtype)));
}

// float64 is for checking gradients, and not everywhere.
template <typename F>
void with_float(DType dtype, const F& f) {
  with_dtype(dtype, [&](auto value) {
    if constexpr (!std::is_same_v<decltype(value), double>)
      f(value);
    else
      throw std::invalid_argument("expected float32, float16 or bfloat16, got float64");
  });
}

// Calls f(neurons per packet, T or 0 for any). Rows off their 16 bytes and double, which is there to check gradients
// with, share one kernel for every T: that keeps the build short.
template <typename scalar_t, int kTimesteps = IIRSNN_UNROLLED_TIMESTEPS, typename F>
void with_steps(int packet, int64_t timesteps, const F& f) {
  if (packet == 1)
    f(constant<1>{}, constant<0>{});
  else if constexpr (kTimesteps < 2 || std::is_same_v<scalar_t, double>)
    f(constant<kPacket<scalar_t>>{}, constant<0>{});
  else if (timesteps == kTimesteps)
    f(constant<kPacket<scalar_t>>{}, constant<kTimesteps>{});
  else
    with_steps<scalar_t, kTimesteps - 1>(packet, timesteps, f);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string message = std::string(kernel) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; iirsnn was built for other GPUs: build it again with TORCH_CUDA_ARCH_LIST naming this one";
  throw std::runtime_error(message);
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline int64_t size_of_acc(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Neurons a thread moves at once: a packet of 16 bytes when every row starts on 16 bytes, else 1.
template <typename... pointers_t>
int packet_of(const LifShape& shape, bool one_row, int64_t stride, pointers_t... pointers) {
  const int64_t rows = one_row ? 0 : (shape.neurons | shape.x_stride_t | stride) * size_of(shape.dtype);
  return (rows | (reinterpret_cast<intptr_t>(pointers) | ...)) % 16 == 0 ? int(16 / size_of(shape.dtype)) : 1;
}

inline Layout layout_of(const LifShape& shape) {
  const int64_t inner = shape.channels == 1 ? shape.neurons : shape.inner;
  return {shape.timesteps,
          shape.neurons,
          shape.x_stride_t,
          {shape.channels, inner, Divider(inner), Divider(shape.channels)}};
}

}  // namespace iirsnn::cuda
