#include "spike/spike.h"

#include <atomic>

#include "driver.h"

namespace iirsnn::native {
namespace {

using namespace iirsnn::sparse;

struct Shape {
  const char* name;
  Conv conv;
};
Conv conv_of(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t outputs, int64_t groups,
             int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const auto out = [&](int64_t in) { return (in + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1; };
  return {images, channels, height, width,  outputs, out(height), out(width), groups,
          kernel, kernel,   stride, stride, padding, padding,     dilation,   dilation};
}
const Shape kShapes[] = {
    {"3x3", conv_of(3, 70, 9, 7, 40, 1, 3, 1, 1, 1)},      {"strided", conv_of(2, 64, 9, 8, 33, 1, 3, 2, 1, 1)},
    {"dilated", conv_of(2, 20, 9, 9, 64, 1, 3, 1, 2, 2)},  {"groups", conv_of(3, 48, 6, 5, 90, 3, 3, 1, 1, 1)},
    {"linear", conv_of(37, 130, 1, 1, 33, 1, 1, 1, 0, 1)}, {"5x5", conv_of(2, 200, 7, 7, 16, 1, 5, 1, 2, 1)},
};

// Spikes of 0.75, or counts of 0.125; a third of them zero, or two thirds.
std::vector<float> table_of(bool counts) {
  std::vector<float> table(kTable);
  for (int i = 0; i < kTable; ++i) table[i] = float(i) * (counts ? 0.125f : 0.75f);
  return table;
}

template <typename scalar_t>
constexpr DType kType = DType::float32;
template <>
constexpr DType kType<BFloat16> = DType::bfloat16;

template <typename scalar_t>
void run_shape(const Shape& shape, bool counts, const std::string& name) {
  const Conv& conv = shape.conv;
  Random random(5);
  const std::vector<float> table = table_of(counts);
  std::vector<scalar_t> x(conv.positions() * conv.channels);
  for (scalar_t& value : x) {
    value = Convert<scalar_t>::round(table[random.next() % 3 ? 0 : random.integer(1, counts ? 16 : 1)]);
  }
  const int64_t words = (conv.channels + kWord - 1) / kWord;
  std::vector<uint64_t> packed(conv.positions() * (counts ? (conv.channels + 7) / 8 : words));
  Pack pack{};
  pack.x = x.data();
  pack.dtype = kType<scalar_t>;
  pack.images = conv.images;
  pack.channels = conv.channels;
  pack.positions = conv.height * conv.width;
  pack.table = table.data();
  pack.inverse_unit = 1.0f / table[1];
  pack.packed = packed.data();
  Hash packing;
  const auto pack_all = [&] {
    std::atomic<int64_t> nonzeros{0};
    std::atomic<bool> exact{true};
    in_parts(conv.images, [&](int64_t first, int64_t last) {
      int64_t found = 0;
      if (!(counts ? pack_counts(pack, first, last, found) : pack_bits(pack, first, last, found))) exact = false;
      nonzeros += found;
    });
    packing.add(bool(exact));
    if (exact) packing.add(int64_t(nonzeros)).add(packed);
  };
  pack_all();
  scalar_t odd = Convert<scalar_t>::round(0.3f);
  std::swap(x.back(), odd);
  pack_all();
  std::swap(x.back(), odd);
  pack.channels_last = true;
  pack_all();

  const Source source{counts ? Kind::counts : Kind::bits, packed.data(), table.data()};
  std::vector<scalar_t> back(x.size());
  in_parts(conv.images, [&](int64_t first, int64_t last) {
    unpack({source, kType<scalar_t>, conv.images, conv.channels, pack.positions, back.data()}, first, last);
  });
  print(name + "/pack", packing.add(back));

  const int64_t taps = conv.kernel_h * conv.kernel_w;
  const auto weight = random.reals<scalar_t>(conv.outputs * taps * conv.group_channels(), -1, 1);
  const auto bias = random.reals<float>(conv.outputs, -1, 1);
  const int64_t out_size = conv.images * conv.out_height * conv.out_width * conv.outputs;
  std::vector<scalar_t> out(out_size);
  Forward work{conv, source, weight.data(), kType<scalar_t>, false, bias.data(), out.data()};
  Hash outs;
  for (const int64_t threads : {1, 3}) {
    in_parts(forward_units(work, threads), [&](int64_t first, int64_t last) { forward(work, threads, first, last); });
    outs.add(out);
  }
  print(name + "/forward", outs);

  const auto grad = random.reals<scalar_t>(out_size, -1, 1);
  std::vector<scalar_t> grad_weight(weight.size());
  Hash grads;
  for (const int64_t threads : {1, 3}) {
    WeightGrad gradient{conv, source, grad.data(), kType<scalar_t>, grad_weight.data(), 1, nullptr};
    gradient.splits = weight_grad_splits(conv, threads);
    const Buffer<float> partials(gradient.splits * weight_grad_floats(conv));
    gradient.partials = partials.get();
    in_parts(weight_grad_units(gradient), [&](int64_t first, int64_t last) { weight_grad(gradient, first, last); });
    in_parts(weight_grad_finish_units(gradient),
             [&](int64_t first, int64_t last) { weight_grad_finish(gradient, first, last); });
    grads.add(grad_weight);
  }
  print(name + "/weight_grad", grads);
}

// The input gradient: a convolution of reals, many of them zero, with flipped weights.
void input_gradient(const Shape& shape, const std::string& name) {
  Conv conv = shape.conv;
  if (conv.stride_h > 1) return;  // strided ones are not by events
  std::swap(conv.channels, conv.outputs);
  std::swap(conv.height, conv.out_height);
  std::swap(conv.width, conv.out_width);
  conv.padding_h = conv.padding_w = conv.dilation_h * (conv.kernel_h - 1) - conv.padding_h;
  Random random(6);
  auto grad = random.reals<float>(conv.positions() * conv.channels, -1, 1);
  for (float& value : grad) value = random.next() % 4 ? 0.0f : value;
  const auto weight = random.reals<float>(conv.channels * conv.kernel_h * conv.kernel_w * conv.group_outputs(), -1, 1);
  std::vector<float> out(conv.images * conv.out_height * conv.out_width * conv.outputs);
  const Source source{Kind::reals, grad.data(), nullptr};
  Forward work{conv, source, weight.data(), DType::float32, true, nullptr, out.data()};
  in_parts(forward_units(work, 1), [&](int64_t first, int64_t last) { forward(work, 1, first, last); });
  print(name + "/input_grad", Hash().add(out));
}

}  // namespace

void spike_cases() {
  for (const Shape& shape : kShapes) {
    const std::string name = std::string("spike/") + shape.name;
    for (const bool counts : {false, true}) {
      run_shape<float>(shape, counts, name + (counts ? "/counts" : "/bits") + "/float32");
      run_shape<BFloat16>(shape, counts, name + (counts ? "/counts" : "/bits") + "/bfloat16");
    }
    input_gradient(shape, name);
  }
}

}  // namespace iirsnn::native
