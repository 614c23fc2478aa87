// Sums over neurons and time, in a fixed order.
#pragma once

#include "lif/cuda/packets.h"

namespace iirsnn::cuda {

constexpr int kSumBlock = 256;

// Blocks walk over the neurons in strides that are a multiple of channels * inner, so that a thread meets the same
// channels in each of them and sums their gradients in registers. A block leaves `slots` pairs of partial sums, one for
// each channel its tile touches, and sum_partials_kernel adds them in a fixed order: no atomics, the same bits each
// run.
struct Plan {
  int64_t blocks, slots, stride;
};

template <typename acc_t>
struct Partial {
  acc_t threshold, leak;
};

template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> operator+(Partial<acc_t> a, Partial<acc_t> b) {
  return {add(a.threshold, b.threshold), add(a.leak, b.leak)};
}

// Lanes apart by less than width (a power of two) end with their sum.
template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> sum_lanes(Partial<acc_t> sum, int width) {
  for (int apart = width / 2; apart > 0; apart /= 2) {
    const Partial<acc_t> other{__shfl_xor_sync(kWarp, sum.threshold, apart), __shfl_xor_sync(kWarp, sum.leak, apart)};
    sum = sum + other;
  }
  return sum;
}

// The sum over a block, in thread 0. shared: one per warp.
template <typename acc_t>
__device__ __forceinline__ Partial<acc_t> sum_block(Partial<acc_t> sum, Partial<acc_t>* shared) {
  sum = sum_lanes(sum, 32);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum = sum + shared[warp];
  return sum;
}

template <int kSize, typename acc_t>
__device__ __forceinline__ void store_partials(Partial<acc_t>* __restrict__ partials,
                                               const Partial<acc_t> (&sums)[kSize], const Layout& layout,
                                               const Plan& plan) {
  constexpr int kPositions = kBlock * kSize;
  __shared__ Partial<acc_t> shared[kPositions];
  const Channels& channels = layout.channels;
  const int64_t tile = int64_t(blockIdx.x) * kPositions;
  partials += int64_t(blockIdx.x) * plan.slots;
  const int64_t run = channels.by_inner(tile);
  if (channels.count == 1 || run == channels.by_inner(tile + kPositions - 1)) {
    Partial<acc_t> sum = sums[0];
#pragma unroll
    for (int k = 1; k < kSize; ++k) sum = sum + sums[k];
    sum = sum_block(sum, shared);
    if (threadIdx.x == 0) partials[0] = sum;
    return;
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) shared[threadIdx.x * kSize + k] = sums[k];
  __syncthreads();
  int width = 32;  // lanes to a slot: so many that every thread has kSize neurons to add
  while (width > 1 && width * plan.slots > kPositions) width /= 2;
  const int lane = threadIdx.x % width, group = threadIdx.x / width, groups = kBlock / width;
  for (int64_t base = 0; base < plan.slots; base += groups) {
    const int64_t slot = base + group, start = (run + slot) * channels.inner - tile;  // of its first run
    Partial<acc_t> sum{};
    for (int64_t i = max(-start, int64_t(0)) + lane; slot < plan.slots; i += width) {
      const int64_t runs = channels.by_inner(i) * (channels.count - 1) * channels.inner;  // of other slots, passed over
      const int64_t position = start + i + runs;
      if (position >= kPositions) break;
      sum = sum + shared[position];
    }
    sum = sum_lanes(sum, width);
    if (lane == 0 && slot < plan.slots) partials[slot] = sum;
  }
}

// One block per channel: everything that blocks have left for it.
template <typename acc_t>
__global__ void __launch_bounds__(kSumBlock)
    sum_partials_kernel(const Partial<acc_t>* __restrict__ partials, acc_t* __restrict__ grad_threshold,
                        acc_t* __restrict__ grad_leak, int64_t tile, const __grid_constant__ Plan plan,
                        const __grid_constant__ Layout layout) {
  __shared__ Partial<acc_t> shared[kSumBlock / 32];
  const Channels& channels = layout.channels;
  Partial<acc_t> sum{};
  if (channels.count == 1) {
    for (int64_t block = threadIdx.x; block < plan.blocks; block += kSumBlock) sum = sum + partials[block];
  } else {
    const int64_t runs = channels.by_inner(plan.blocks * tile - 1) + 1;     // of all channels
    const int64_t blocks_per_run = (channels.inner + tile - 2) / tile + 1;  // at most
    for (int64_t i = threadIdx.x;; i += kSumBlock) {
      const int64_t run = i / blocks_per_run * channels.count + blockIdx.x;
      if (run >= runs) break;
      const int64_t block = run * channels.inner / tile + i % blocks_per_run;
      const int64_t slot = run - channels.by_inner(block * tile);
      if (block < plan.blocks && slot >= 0 && slot < channels.count) sum = sum + partials[block * plan.slots + slot];
    }
  }
  sum = sum_block(sum, shared);
  if (threadIdx.x == 0) grad_threshold[blockIdx.x] = sum.threshold, grad_leak[blockIdx.x] = sum.leak;
}

}  // namespace iirsnn::cuda
