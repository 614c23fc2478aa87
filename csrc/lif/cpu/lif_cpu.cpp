#include "lif/cpu/lif_cpu.h"

#include "lif/cpu/forward.h"
#include "lif/cpu/packed.h"

namespace iirsnn {
namespace {

template <typename scalar_t>
bool forward(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  const auto* threshold = static_cast<const acc_t*>(args.threshold);
  const bool charged = args.shape.timesteps > 1 || args.v0;
  bool nan = false;
  const auto pack = [&](const Range& range, kernel_t<scalar_t>* rows, int64_t stride) {
    const int padded = int(packed_bytes(range.n)) * 8;
    for (int64_t t = 0; t < args.shape.timesteps; ++t, rows += stride) {
      std::fill(rows + range.n, rows + padded, kernel_t<scalar_t>{});
      nan |= pack_row(rows, padded, args.bits + t * packed_bytes(args.shape.neurons) + range.begin / 8);
    }
  };
  const auto run = [&](auto channels) {
    forward_blocks<scalar_t, false>(args, channels, first_chunk, last_chunk, pack);
  };
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    if (!charged && !args.v) {
      std::vector<int16_t> ordered(args.shape.channels);
      std::transform(threshold, threshold + args.shape.channels, ordered.begin(), ordered_below);
      run(Channels<int16_t>(args.shape, {ordered.data()}, walk_of(args.shape)));
      return nan;
    }
  }
  run(Channels<acc_t>(args.shape, {threshold, charged ? static_cast<const acc_t*>(args.leak) : nullptr},
                      walk_of(args.shape)));
  return nan;
}

}  // namespace

int64_t lif_chunks_cpu(const LifShape& shape) { return chunks_of(shape); }

bool lif_forward_cpu(const LifForward& args, int64_t first_chunk, int64_t last_chunk) {
  return with_scalar(args.shape.dtype,
                     [&](auto scalar) { return forward<decltype(scalar)>(args, first_chunk, last_chunk); });
}

}  // namespace iirsnn
