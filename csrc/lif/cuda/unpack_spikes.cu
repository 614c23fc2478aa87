// Spikes from their bits.
#include <algorithm>

#include "lif/cuda/launch.h"
#include "lif/cuda/lif_cuda.h"

namespace iirsnn::cuda {
namespace {

// A thread reads one byte, a warp 256 neurons; its stores are kSize neurons a lane, side by side across the warp.
template <typename scalar_t, int kSize>
__global__ void __launch_bounds__(kBlock, 1)
    unpack_kernel(const uint8_t* __restrict__ bits, scalar_t* __restrict__ s, int64_t timesteps, int64_t neurons) {
  const int64_t column = int64_t(blockIdx.x) * kBlock + threadIdx.x, row_bytes = packed_bytes(neurons);
  const int lane = threadIdx.x % 32;
  for (int64_t t = blockIdx.y; t < timesteps; t += gridDim.y) {
    const unsigned byte = column < row_bytes ? bits[t * row_bytes + column] : 0;
#pragma unroll
    for (int i = 0; i < 8 / kSize; ++i) {
      const int in_warp = (i * 32 + lane) * kSize;
      const unsigned fired = __shfl_sync(kWarp, byte, in_warp / 8) >> in_warp % 8;
      const int64_t first = (column - lane) * 8 + in_warp;
      Packet<scalar_t, kSize> spikes;
#pragma unroll
      for (int k = 0; k < kSize; ++k) spikes.set(k, narrow<scalar_t>(fired >> k & 1));
      if (first < neurons) store(s + t * neurons + first, spikes);
    }
  }
}

}  // namespace
}  // namespace iirsnn::cuda

namespace iirsnn {

using namespace cuda;

void unpack_spikes_cuda(const uint8_t* bits, void* s, DType dtype, int64_t timesteps, int64_t neurons, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const dim3 grid(unsigned(ceil_div(packed_bytes(neurons), kBlock)), unsigned(std::min<int64_t>(timesteps, 65535)));
  const bool packets = (neurons * size_of(dtype) | reinterpret_cast<uintptr_t>(s)) % 16 == 0;
  with_dtype(dtype, [&](auto value) {
    using scalar_t = decltype(value);
    const auto spikes = static_cast<scalar_t*>(s);
    if (packets)
      unpack_kernel<scalar_t, kPacket<scalar_t>><<<grid, kBlock, 0, stream>>>(bits, spikes, timesteps, neurons);
    else
      unpack_kernel<scalar_t, 1><<<grid, kBlock, 0, stream>>>(bits, spikes, timesteps, neurons);
  });
  check_launch("unpack_spikes");
}

}  // namespace iirsnn
