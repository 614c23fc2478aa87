#include "lif/cpu/backward.h"
#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/normalised.h"

namespace iirsnn {
namespace {

// Where the pass before wrote the gradient of the current: grad_x in its place.
template <typename scalar_t>
struct GradBlock {
  int n;  // whole vectors
  int64_t timesteps;
  const scalar_t* x;
  int64_t x_stride;
  scalar_t* grad_x;
  int64_t grad_x_stride;
  Parameters<float> parameters;
};

template <typename scalar_t>
struct GradRows {
  template <int kBytes>
  static IIRSNN_INLINE void run(const GradBlock<scalar_t>* block) {
    using P = typename Parts<scalar_t, kBytes>::P;
    const GradBlock<scalar_t> b = *block;
    for_each_piece<P>(b.parameters, b.n, [&](const auto& p, int begin, int end) IIRSNN_INLINE_LAMBDA {
      for (int64_t t = 0; t < b.timesteps; ++t) {
        const scalar_t* x = b.x + t * b.x_stride;
        scalar_t* grad_x = b.grad_x + t * b.grad_x_stride;
        for (int i = begin; i < end; i += P::kSize) {
          const P centred = load<P>(x + i) - p.of(kMean, i);
          store(grad_x + i, input_gradient(load<P>(grad_x + i), centred, p, i));
        }
      }
    });
  }
};

template <typename scalar_t>
void grad_x_blocks(const BnLif& args, Channels<float>& channels, int64_t first_chunk, int64_t last_chunk) {
  const LifShape& shape = args.shape;
  const auto kernel = version<GradRows<scalar_t>>();
  const int64_t stride = row_stride<scalar_t>(shape);
  const Buffer<scalar_t> copies(some_staged<scalar_t>(shape, channels.walk(), last_chunk) ? 2 * shape.timesteps * stride
                                                                                          : 0);
  // from the last chunk to the first: what the pass before has read last is still in the cache
  for (int64_t chunk = last_chunk - 1; chunk >= first_chunk; --chunk) {
    for_each_block(shape, chunk, channels.walk(), kBlock, 1, [&](const Range& range) {
      const auto* x = static_cast<const scalar_t*>(args.x) + range.begin;
      auto* grad_x = static_cast<scalar_t*>(args.grad_x) + range.begin;
      GradBlock<scalar_t> block{whole_vectors<scalar_t>(range.n),
                                shape.timesteps,
                                x,
                                shape.x_stride_t,
                                grad_x,
                                shape.neurons,
                                channels.of(range)};
      const bool copied = staged<scalar_t>(range.n);
      if (copied) {
        block.x_stride = block.grad_x_stride = stride;
        block.x = copies.get();
        block.grad_x = copies.get() + shape.timesteps * stride;
        stage(x, shape.x_stride_t, shape.timesteps, range.n, copies.get(), stride);
        stage(grad_x, shape.neurons, shape.timesteps, range.n, block.grad_x, stride);
      }
      kernel(&block);
      if (copied) unstage(block.grad_x, stride, shape.timesteps, range.n, grad_x, shape.neurons);
    });
  }
}

LifBackward backward_of(const BnLif& args) {
  LifBackward call{args.shape,     args.reset,           args.v_reset, args.detach_reset,
                   args.surrogate, args.surrogate_scale, args.grad_s,  args.grad_s_stride_t};
  call.x = args.x;
  call.grad_x = args.grad_x;
  return call;
}

// Few timesteps are gone through twice: sums, then grad_x. Of more, the first pass leaves their gradients.
template <typename scalar_t, Pass kPass>
void backward(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  const LifBackward call = backward_of(args);
  const NormalisedChannels normalised(args);
  const bool twice = through_time<scalar_t, kPass>(call);
  Channels<float> channels = normalised.backward(args, walk_of<scalar_t, kPass>(call));
  if (kPass == Pass::grad_x && !twice) return grad_x_blocks<scalar_t>(args, channels, first_chunk, last_chunk);
  backward_blocks<scalar_t, kPass>(call, channels, args.sums, first_chunk, last_chunk);
}

template <Pass kPass>
void backward(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  if (args.shape.dtype == DType::float32) return backward<float, kPass>(args, first_chunk, last_chunk);
  backward<BFloat16, kPass>(args, first_chunk, last_chunk);
}

}  // namespace

void bn_lif_backward_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  backward<Pass::sums>(args, first_chunk, last_chunk);
}

void bn_lif_backward_finish_cpu(const BnLif& args) {
  const LifBackward call = backward_of(args);
  const Walk walk =
      args.shape.dtype == DType::float32 ? walk_of<float, Pass::sums>(call) : walk_of<BFloat16, Pass::sums>(call);
  add_sums(args.shape, walk, kBnLifSums, args.sums);
}

void bn_lif_grad_x_cpu(const BnLif& args, int64_t first_chunk, int64_t last_chunk) {
  backward<Pass::grad_x>(args, first_chunk, last_chunk);
}

}  // namespace iirsnn
