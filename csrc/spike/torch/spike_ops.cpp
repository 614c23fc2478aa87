// Checks, allocation and threads of the spike_* ops. Their schemas are in spike_schemas.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <tuple>

#include "spike/spike.h"

namespace iirsnn::sparse {
namespace {

using at::IntArrayRef;
using at::Tensor;
constexpr auto kChannelsLast = at::MemoryFormat::ChannelsLast;

DType dtype_of(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, name, ": expected float32 or bfloat16, got ", dtype);
  return dtype == at::kFloat ? DType::float32 : DType::bfloat16;
}

void check_4d(const char* name, IntArrayRef size) {
  TORCH_CHECK_VALUE(size.size() == 4, name, ": expected 4 dimensions, got ", size);
}

int64_t words(int64_t channels) { return ceil_div(channels, kWord); }

Source source_of(const Tensor& packed, const Tensor& table, IntArrayRef size) {
  check_4d("size", size);
  const bool counts = packed.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(counts || packed.scalar_type() == at::kLong, "packed: expected int64 bits or uint8 counts, got ",
                   packed.scalar_type());
  const int64_t last = counts ? size[1] : words(size[1]);
  TORCH_CHECK_VALUE(packed.sizes() == IntArrayRef({size[0], size[2], size[3], last}) && packed.is_contiguous(),
                    "packed: expected contiguous [", size[0], ", ", size[2], ", ", size[3], ", ", last,
                    "] for an input of ", size, ", got ", packed.sizes());
  TORCH_CHECK_VALUE(
      table.scalar_type() == at::kFloat && table.dim() == 1 && table.numel() == kTable && table.is_contiguous(),
      "table: expected contiguous float32 [", kTable, "], got ", table.scalar_type(), " ", table.sizes());
  return {counts ? Kind::counts : Kind::bits, packed.const_data_ptr(), table.const_data_ptr<float>()};
}

Conv conv_of(IntArrayRef size, IntArrayRef weight, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
             int64_t groups) {
  check_4d("size", size);
  check_4d("weight", weight);
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding, dilation: expected two numbers each, got ", stride, padding, dilation);
  TORCH_CHECK_VALUE(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0 && padding[0] >= 0 &&
                        padding[1] >= 0 && weight[2] > 0 && weight[3] > 0,
                    "stride, dilation, kernel: expected numbers >= 1, and padding >= 0, got ", stride, dilation, weight,
                    padding);
  TORCH_CHECK_VALUE(groups > 0 && weight[0] % groups == 0 && size[1] == weight[1] * groups,
                    "weight: expected [outputs, channels / groups, rows, columns] for ", size[1], " channels in ",
                    groups, " groups, got ", weight);
  Conv conv{};
  conv.images = size[0], conv.channels = size[1], conv.height = size[2], conv.width = size[3];
  conv.outputs = weight[0], conv.groups = groups, conv.kernel_h = weight[2], conv.kernel_w = weight[3];
  conv.stride_h = stride[0], conv.stride_w = stride[1], conv.padding_h = padding[0], conv.padding_w = padding[1];
  conv.dilation_h = dilation[0], conv.dilation_w = dilation[1];
  const auto out = [](int64_t in, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t room = in + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / stride + 1;
  };
  conv.out_height = out(conv.height, conv.padding_h, conv.dilation_h, conv.kernel_h, conv.stride_h);
  conv.out_width = out(conv.width, conv.padding_w, conv.dilation_w, conv.kernel_w, conv.stride_w);
  TORCH_CHECK_VALUE(conv.out_height > 0 && conv.out_width > 0, "x: expected images no smaller than the kernel, got ",
                    size, " for a weight of ", weight);
  // events address rows of 128 bytes by 32 bits
  TORCH_CHECK_VALUE(
      conv.width * 192 < (int64_t(1) << 25) && conv.height * (conv.width + conv.out_width) < (int64_t(1) << 25),
      "x: expected a width below 2^25 / 192 and height * (width + output width) below 2^25, got ", size);
  return conv;
}

Tensor packed_like(const Tensor& x, bool counts) {
  return at::empty({x.size(0), x.size(2), x.size(3), counts ? x.size(1) : words(x.size(1))},
                   x.options().dtype(counts ? at::kByte : at::kLong).memory_format(at::MemoryFormat::Contiguous));
}

std::tuple<Tensor, Tensor> pack(const Tensor& x, const Tensor& table, bool counts) {
  check_4d("x", x.sizes());
  Pack work{};
  work.dtype = dtype_of("x", x.scalar_type());
  work.channels_last = x.is_contiguous(kChannelsLast);
  const Tensor dense = work.channels_last || x.is_contiguous() ? x : x.contiguous();
  TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.numel() == kTable && table.is_contiguous(),
                    "table: expected contiguous float32 [", kTable, "], got ", table.scalar_type(), " ", table.sizes());
  Tensor packed = packed_like(x, counts), stats = at::empty({2}, x.options().dtype(at::kLong));
  work.x = dense.const_data_ptr();
  work.images = x.size(0), work.channels = x.size(1), work.positions = x.size(2) * x.size(3);
  work.table = table.const_data_ptr<float>();
  work.inverse_unit = 1.0f / work.table[1];
  work.packed = packed.mutable_data_ptr();
  std::atomic<bool> exact = true;
  std::atomic<int64_t> nonzeros = 0;
  // a few images at a time, so that a wrong table is found out early
  const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 18) / std::max<int64_t>(1, work.channels * work.positions));
  if (x.numel() > 0) {
    at::parallel_for(0, ceil_div(work.images, grain), 1, [&](int64_t first, int64_t last) {
      int64_t count = 0;
      for (int64_t i = first; i < last && exact; ++i) {
        const int64_t end = std::min(work.images, (i + 1) * grain);
        if (!(counts ? pack_counts(work, i * grain, end, count) : pack_bits(work, i * grain, end, count)))
          exact = false;
      }
      nonzeros += count;
    });
  }
  stats.mutable_data_ptr<int64_t>()[0] = exact;
  stats.mutable_data_ptr<int64_t>()[1] = nonzeros;
  return {packed, stats};
}

Tensor unpack_input(const Tensor& packed, const Tensor& table, IntArrayRef size, at::ScalarType dtype) {
  Unpack work{};
  work.source = source_of(packed, table, size);
  work.dtype = dtype_of("dtype", dtype);
  Tensor x = at::empty(size, packed.options().dtype(dtype).memory_format(kChannelsLast));
  work.images = size[0], work.channels = size[1], work.positions = size[2] * size[3];
  work.x = x.mutable_data_ptr();
  if (x.numel() > 0) {
    at::parallel_for(0, work.images, 1, [&](int64_t first, int64_t last) { unpack(work, first, last); });
  }
  return x;
}

Tensor run_forward(Forward& work, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Conv& conv = work.conv;
  const Tensor dense = weight.contiguous(kChannelsLast);
  work.dtype = dtype_of("weight", weight.scalar_type());
  work.weight = dense.const_data_ptr();
  Tensor sums;
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->numel() == conv.outputs, "bias: expected [", conv.outputs, "], got ",
                      bias->sizes());
    sums = bias->to(at::kFloat).contiguous();
    work.bias = sums.const_data_ptr<float>();
  }
  Tensor out = at::empty({conv.images, conv.outputs, conv.out_height, conv.out_width},
                         weight.options().memory_format(kChannelsLast));
  if (out.numel() == 0) return out;
  work.out = out.mutable_data_ptr();
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, forward_units(work, threads), 1,
                   [&](int64_t first, int64_t last) { forward(work, threads, first, last); });
  return out;
}

Tensor conv2d(const Tensor& packed, const Tensor& table, IntArrayRef size, const Tensor& weight,
              const std::optional<Tensor>& bias, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
              int64_t groups) {
  Forward work{};
  work.conv = conv_of(size, weight.sizes(), stride, padding, dilation, groups);
  work.source = source_of(packed, table, size);
  return run_forward(work, weight, bias);
}

Tensor conv2d_input(const Tensor& grad, const Tensor& weight, IntArrayRef size, IntArrayRef padding,
                    IntArrayRef dilation, int64_t groups) {
  const Conv given = conv_of(size, weight.sizes(), {1, 1}, padding, dilation, groups);
  TORCH_CHECK_TYPE(grad.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat,
                   "grad, weight: expected float32, got ", grad.scalar_type(), ", ", weight.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == IntArrayRef({given.images, given.outputs, given.out_height, given.out_width}),
                    "grad: expected [", given.images, ", ", given.outputs, ", ", given.out_height, ", ",
                    given.out_width, "], got ", grad.sizes());
  const Tensor dense = grad.contiguous(kChannelsLast);
  Forward work{};
  Conv& conv = work.conv;
  conv = given;
  conv.channels = given.outputs, conv.height = given.out_height, conv.width = given.out_width;
  conv.outputs = given.channels, conv.out_height = given.height, conv.out_width = given.width;
  conv.padding_h = given.dilation_h * (given.kernel_h - 1) - given.padding_h;
  conv.padding_w = given.dilation_w * (given.kernel_w - 1) - given.padding_w;
  work.source = {Kind::reals, dense.const_data_ptr(), nullptr};
  work.transposed = true;
  return run_forward(work, weight, std::nullopt);
}

Tensor conv2d_weight(const Tensor& packed, const Tensor& table, IntArrayRef size, const Tensor& grad,
                     IntArrayRef weight_size, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                     int64_t groups) {
  WeightGrad work{};
  work.conv = conv_of(size, weight_size, stride, padding, dilation, groups);
  const Conv& conv = work.conv;
  work.source = source_of(packed, table, size);
  work.dtype = dtype_of("grad", grad.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == IntArrayRef({conv.images, conv.outputs, conv.out_height, conv.out_width}),
                    "grad: expected [", conv.images, ", ", conv.outputs, ", ", conv.out_height, ", ", conv.out_width,
                    "], got ", grad.sizes());
  const Tensor dense = grad.contiguous(kChannelsLast);
  Tensor grad_weight = at::empty(weight_size, grad.options().memory_format(kChannelsLast));
  if (grad.numel() == 0) return grad_weight.zero_();
  if (grad_weight.numel() == 0) return grad_weight;
  work.grad = dense.const_data_ptr();
  work.grad_weight = grad_weight.mutable_data_ptr();
  work.splits = weight_grad_splits(conv, at::get_num_threads());
  Tensor partials;
  if (work.splits > 1) {
    partials = at::empty({work.splits * weight_grad_floats(conv)}, grad.options().dtype(at::kFloat));
    work.partials = partials.mutable_data_ptr<float>();
  }
  at::parallel_for(0, weight_grad_units(work), 1, [&](int64_t first, int64_t last) { weight_grad(work, first, last); });
  at::parallel_for(0, weight_grad_finish_units(work), 1,
                   [&](int64_t first, int64_t last) { weight_grad_finish(work, first, last); });
  return grad_weight;
}

TORCH_LIBRARY_IMPL(iirsnn, CPU, m) {
  m.impl("spike_pack", &pack);
  m.impl("spike_unpack", &unpack_input);
  m.impl("spike_conv2d", &conv2d);
  m.impl("spike_conv2d_input", &conv2d_input);
  m.impl("spike_conv2d_weight", &conv2d_weight);
}

}  // namespace
}  // namespace iirsnn::sparse
