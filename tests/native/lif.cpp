#include <atomic>
#include <cmath>
#include <limits>

#include "driver.h"
#include "lif/cpu/bn_lif_cpu.h"
#include "lif/cpu/lif_cpu.h"

namespace iirsnn::native {
namespace {

const char* const kResets[] = {"soft", "hard", "none", "soft_delayed"};
const char* const kSurrogates[] = {"triangle", "atan", "sigmoid", "fast_sigmoid", "boxcar"};
constexpr int64_t kTimesteps[] = {1, 5, 20};
constexpr double kVReset = -0.125;

template <typename scalar_t>
struct Type;
template <>
struct Type<float> {
  static constexpr DType dtype = DType::float32;
  static constexpr const char* name = "float32";
};
template <>
struct Type<double> {
  static constexpr DType dtype = DType::float64;
  static constexpr const char* name = "float64";
};
template <>
struct Type<Half> {
  static constexpr DType dtype = DType::float16;
  static constexpr const char* name = "float16";
};
template <>
struct Type<BFloat16> {
  static constexpr DType dtype = DType::bfloat16;
  static constexpr const char* name = "bfloat16";
};

// Channels as kernels meet them, neurons that fill no whole vectors, blocks or chunks.
struct Layout {
  const char* name;
  int64_t neurons, channels, inner;
};
constexpr Layout kLayouts[] = {
    {"scalar", 1037, 1, 1037}, {"few", 7, 1, 7},      {"inner", 1065, 3, 5},  {"last", 1280, 64, 1},
    {"odd", 1233, 9, 1},       {"rows", 1152, 2, 64}, {"wide", 1584, 4, 132},
};
// Columns of narrow channels: one or two a pass, passes that go together, and what is left of them and of a word.
constexpr Layout kColumns[] = {{"column", 6015, 3, 5}, {"columns", 17820, 9, 60}};

template <typename scalar_t>
LifShape shape_of(const Layout& layout, int64_t timesteps) {
  return {Type<scalar_t>::dtype, timesteps, layout.neurons, layout.neurons, layout.channels, layout.inner};
}

std::string name_of(const char* op, const char* dtype, int reset, int64_t timesteps, const Layout& layout) {
  return std::string(op) + "/" + dtype + "/" + kResets[reset] + "/T" + std::to_string(timesteps) + "/" + layout.name;
}

template <typename scalar_t>
void forward(Reset reset, const LifShape& shape, bool state, bool nan, Hash& hash) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  Random random(1);
  const int64_t steps = shape.timesteps, n = shape.neurons;
  auto x = random.reals<scalar_t>(steps * n, -0.5, 1.5);
  if (nan) x[n / 2] = Convert<scalar_t>::round(std::numeric_limits<acc_t>::quiet_NaN());
  const auto threshold = random.reals<acc_t>(shape.channels, 0.75, 1.25);
  const auto leak = random.reals<acc_t>(shape.channels, 0.5, 1), v0 = random.reals<acc_t>(n, -1, 1);
  std::vector<scalar_t> s(steps * n);
  std::vector<uint8_t> bits(steps * packed_bytes(n));
  std::vector<acc_t> v(n);
  LifForward args{};
  args.shape = shape;
  args.reset = reset;
  args.v_reset = kVReset;
  args.x = x.data();
  args.threshold = threshold.data();
  args.leak = leak.data();
  if (state) {
    args.v0 = v0.data();
    args.v = v.data();
  }
  const int64_t chunks = lif_chunks_cpu(shape);
  args.s = s.data();
  std::atomic<bool> same{true};
  const auto run = [&](int64_t first, int64_t last) {
    if (!lif_forward_cpu(args, first, last)) same = false;
  };
  in_parts(chunks, run);
  hash.add(s).add(v);
  args.s = nullptr;
  args.bits = bits.data();
  same = true;
  in_parts(chunks, run);
  hash.add(bool(same)).add(bits).add(v);
  in_parts(steps,
           [&](int64_t first, int64_t last) { unpack_spikes_cpu(bits.data(), s.data(), shape.dtype, n, first, last); });
  hash.add(s);
}

template <typename scalar_t>
void backward(Reset reset, Surrogate surrogate, const LifShape& shape, bool state, bool parameters, bool detach,
              Hash& hash) {
  using acc_t = typename Convert<scalar_t>::acc_t;
  Random random(2);
  const int64_t steps = shape.timesteps, n = shape.neurons;
  const auto x = random.reals<scalar_t>(steps * n, -0.5, 1.5), grad_s = random.reals<scalar_t>(steps * n, -1, 1);
  const auto threshold = random.reals<acc_t>(shape.channels, 0.75, 1.25);
  const auto leak = random.reals<acc_t>(shape.channels, 0.5, 1), v0 = random.reals<acc_t>(n, -1, 1),
             grad_v = random.reals<acc_t>(n, -1, 1);
  std::vector<scalar_t> grad_x(steps * n);
  std::vector<acc_t> grad_v0(n), grad_threshold(shape.channels), grad_leak(shape.channels);
  LifBackward args{};
  args.shape = shape;
  args.reset = reset;
  args.v_reset = kVReset;
  args.detach_reset = detach;
  args.surrogate = surrogate;
  args.surrogate_scale = surrogate == Surrogate::triangle ? 0.3 : 2.0;
  args.grad_s = grad_s.data();
  args.grad_s_stride_t = n;
  args.x = x.data();
  args.threshold = threshold.data();
  args.leak = leak.data();
  args.grad_x = grad_x.data();
  if (state) {
    args.grad_v = grad_v.data();
    args.v0 = v0.data();
    args.grad_v0 = grad_v0.data();
  }
  if (parameters) {
    args.grad_threshold = grad_threshold.data();
    args.grad_leak = grad_leak.data();
  }
  std::vector<double> workspace(lif_backward_workspace_cpu(args) / sizeof(double));
  args.workspace = workspace.data();
  in_parts(lif_chunks_cpu(shape), [&](int64_t first, int64_t last) { lif_backward_cpu(args, first, last); });
  if (parameters) lif_backward_finish_cpu(args);
  hash.add(grad_x).add(grad_v0).add(grad_threshold).add(grad_leak);
}

template <typename scalar_t>
void cases() {
  for (int reset = 0; reset < 4; ++reset) {
    for (const int64_t timesteps : kTimesteps) {
      for (const Layout& layout : kLayouts) {
        const LifShape shape = shape_of<scalar_t>(layout, timesteps);
        Hash hash;
        for (const bool state : {false, true}) forward<scalar_t>(Reset(reset), shape, state, false, hash);
        forward<scalar_t>(Reset(reset), shape, true, true, hash);
        print(name_of("lif_forward", Type<scalar_t>::name, reset, timesteps, layout), hash);
        for (int surrogate = 0; surrogate < 5; ++surrogate) {
          const Surrogate chosen = Surrogate(surrogate);
          Hash hash;
          for (const bool parameters : {false, true}) {
            backward<scalar_t>(Reset(reset), chosen, shape, false, parameters, true, hash);
          }
          backward<scalar_t>(Reset(reset), chosen, shape, true, true, surrogate % 2 == 1, hash);
          const std::string name = name_of("lif_backward", Type<scalar_t>::name, reset, timesteps, layout);
          print(name + "/" + kSurrogates[surrogate], hash);
        }
      }
    }
  }
}

template <typename scalar_t>
void in_columns() {
  for (const Layout& layout : kColumns) {
    for (const int64_t timesteps : {1, 2, 5, 7}) {
      const LifShape shape = shape_of<scalar_t>(layout, timesteps);
      Hash hash;
      for (const bool state : {false, true}) {
        forward<scalar_t>(Reset::soft, shape, state, false, hash);
        for (const Surrogate surrogate : {Surrogate::triangle, Surrogate::atan}) {
          for (const bool parameters : {false, true}) {
            backward<scalar_t>(Reset::soft, surrogate, shape, state, parameters, true, hash);
          }
        }
      }
      print(name_of("lif", Type<scalar_t>::name, int(Reset::soft), timesteps, layout), hash);
    }
  }
}

// The same current, and the same gradient, at every timestep; and what is so large that it is written past the caches.
void special_cases() {
  LifShape constant = shape_of<float>(kLayouts[0], 5);
  constant.x_stride_t = 0;
  Hash hash;
  forward<float>(Reset::soft, constant, false, false, hash);
  backward<float>(Reset::soft, Surrogate::triangle, constant, false, true, true, hash);
  print("lif/constant", hash);

  constexpr int64_t kLarge = (int64_t(4) << 20) + 16;
  const Layout large{"large", kLarge, 1, kLarge};
  Hash streamed;
  forward<float>(Reset::soft, shape_of<float>(large, 2), false, false, streamed);
  print("lif_forward/large", streamed);
  Hash back;
  backward<float>(Reset::soft, Surrogate::triangle, shape_of<float>(large, 2), false, false, true, back);
  print("lif_backward/large", back);
}

// ---- BatchNormLIF ----

template <typename scalar_t>
void batch_norm(Reset reset, Surrogate surrogate, const LifShape& shape, bool affine, bool detach, Hash& hash) {
  Random random(3);
  const int64_t steps = shape.timesteps, n = shape.neurons, channels = shape.channels;
  const auto x = random.reals<scalar_t>(steps * n, -2, 3), grad_s = random.reals<scalar_t>(steps * n, -1, 1);
  const auto threshold = random.reals<float>(channels, 0.75, 1.25), leak = random.reals<float>(channels, 0.5, 1),
             weight = random.reals<float>(channels, 0.5, 1.5), bias = random.reals<float>(channels, -0.5, 0.5);
  const int64_t chunks = lif_chunks_cpu(shape);
  std::vector<double> moments(chunks * kMoments * channels), sums(chunks * kBnLifSums * channels);
  in_parts(chunks, [&](int64_t first, int64_t last) { moments_cpu(shape, x.data(), moments.data(), first, last); });
  moments_finish_cpu(shape, moments.data());
  std::vector<float> mean(channels), rstd(channels);
  const double count = double(steps) * double(n / channels);
  for (int64_t c = 0; c < channels; ++c) {
    const double centre = moments[c] / count;
    mean[c] = float(centre);
    rstd[c] = float(1 / std::sqrt(moments[channels + c] / count - centre * centre + 1e-5));
  }
  std::vector<scalar_t> s(steps * n), grad_x(steps * n);
  BnLif args{};
  args.shape = shape;
  args.reset = reset;
  args.v_reset = kVReset;
  args.detach_reset = detach;
  args.surrogate = surrogate;
  args.surrogate_scale = surrogate == Surrogate::triangle ? 0.3 : 2.0;
  args.x = x.data();
  args.mean = mean.data();
  args.rstd = rstd.data();
  args.weight = affine ? weight.data() : nullptr;
  args.bias = affine ? bias.data() : nullptr;
  args.threshold = threshold.data();
  args.leak = leak.data();
  args.s = s.data();
  args.grad_s = grad_s.data();
  args.grad_s_stride_t = n;
  args.grad_x = grad_x.data();
  args.sums = sums.data();
  in_parts(chunks, [&](int64_t first, int64_t last) { bn_lif_forward_cpu(args, first, last); });
  in_parts(chunks, [&](int64_t first, int64_t last) { bn_lif_backward_cpu(args, first, last); });
  bn_lif_backward_finish_cpu(args);
  hash.add(moments).add(s).add(sums);
  in_parts(chunks, [&](int64_t first, int64_t last) { bn_lif_grad_x_cpu(args, first, last); });
  hash.add(grad_x);
}

template <typename scalar_t>
void batch_norm_of() {
  for (int reset = 0; reset < 4; ++reset) {
    for (const int64_t timesteps : kTimesteps) {
      for (const Layout& layout : kLayouts) {
        const LifShape shape = shape_of<scalar_t>(layout, timesteps);
        Hash hash;
        for (int surrogate = 0; surrogate < 5; ++surrogate) {
          batch_norm<scalar_t>(Reset(reset), Surrogate(surrogate), shape, surrogate != 1, surrogate % 2 == 0, hash);
        }
        print(name_of("bn_lif", Type<scalar_t>::name, reset, timesteps, layout), hash);
      }
    }
  }
  for (const Layout& layout : kColumns) {
    Hash hash;
    for (const int64_t timesteps : {1, 5, 7}) {
      batch_norm<scalar_t>(Reset::soft, Surrogate::triangle, shape_of<scalar_t>(layout, timesteps), true, true, hash);
    }
    print(std::string("bn_lif/") + Type<scalar_t>::name + "/" + layout.name, hash);
  }
}

}  // namespace

void lif_cases() {
  cases<float>();
  cases<double>();
  cases<Half>();
  cases<BFloat16>();
  in_columns<float>();
  in_columns<double>();
  in_columns<Half>();
  in_columns<BFloat16>();
  special_cases();
}

void batch_norm_cases() {
  batch_norm_of<float>();
  batch_norm_of<BFloat16>();
}

}  // namespace iirsnn::native
