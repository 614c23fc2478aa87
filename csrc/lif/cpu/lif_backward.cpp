#include "lif/cpu/backward.h"
#include "lif/cpu/lif_cpu.h"

namespace iirsnn {
namespace {

constexpr int kParameterSums = kSums<false>;

template <typename scalar_t>
void backward(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  const auto* threshold = static_cast<const acc_t*>(args.threshold);
  acc_t one;
  std::vector<acc_t> each(args.shape.channels > 1 ? args.shape.channels : 0);
  acc_t* const inverse = each.empty() ? &one : each.data();
  for (int64_t c = 0; c < args.shape.channels; ++c) inverse[c] = acc_t(1) / threshold[c];
  const bool charged = args.shape.timesteps > 1 || !through_time<kernel_t<scalar_t>, Pass::all>(args);
  Channels<acc_t> channels(
      args.shape, {charged ? threshold : nullptr, charged ? static_cast<const acc_t*>(args.leak) : nullptr, inverse},
      walk_of<scalar_t, Pass::all>(args));
  double* sums = args.grad_threshold ? static_cast<double*>(args.workspace) : nullptr;
  backward_blocks<scalar_t, Pass::all>(args, channels, sums, first_chunk, last_chunk);
}

}  // namespace

int64_t lif_backward_workspace_cpu(const LifBackward& args) {
  const int64_t sums = chunks_of(args.shape) * kParameterSums * args.shape.channels;
  return args.grad_threshold ? sums * int64_t(sizeof(double)) : 0;
}

void lif_backward_cpu(const LifBackward& args, int64_t first_chunk, int64_t last_chunk) {
  with_scalar(args.shape.dtype, [&](auto scalar) { backward<decltype(scalar)>(args, first_chunk, last_chunk); });
}

void lif_backward_finish_cpu(const LifBackward& args) {
  const int64_t channels = args.shape.channels;
  auto* sums = static_cast<double*>(args.workspace);
  with_scalar(args.shape.dtype, [&](auto scalar) {
    using acc_t = typename Convert<decltype(scalar)>::acc_t;
    add_sums(args.shape, walk_of<decltype(scalar), Pass::all>(args), kParameterSums, sums);
    std::copy_n(sums + kThresholdSum * channels, channels, static_cast<acc_t*>(args.grad_threshold));
    std::copy_n(sums + kLeakSum * channels, channels, static_cast<acc_t*>(args.grad_leak));
  });
}

}  // namespace iirsnn
