// Schemas of the spike_* ops and what they return for tensors without data; iirsnn/ops/spike.py says what they mean,
// and is their twin where this file is not compiled.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

namespace iirsnn::sparse {
namespace {

using c10::SymInt;
using c10::SymIntArrayRef;

Tensor empty_channels_last(const Tensor& like, SymIntArrayRef size, at::ScalarType dtype) {
  return at::empty_symint(size, like.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
}

std::tuple<Tensor, Tensor> pack_meta(const Tensor& x, const Tensor&, bool counts) {
  const SymInt channels = x.sym_size(1);
  const SymInt size[] = {x.sym_size(0), x.sym_size(2), x.sym_size(3), counts ? channels : (channels + 63) / 64};
  return {at::empty_symint(size, x.options().dtype(counts ? at::kByte : at::kLong)),
          at::empty({2}, x.options().dtype(at::kLong))};
}

Tensor unpack_meta(const Tensor& packed, const Tensor&, SymIntArrayRef size, at::ScalarType dtype) {
  return empty_channels_last(packed, size, dtype);
}

Tensor conv2d_meta(const Tensor&, const Tensor&, SymIntArrayRef size, const Tensor& weight,
                   const std::optional<Tensor>&, SymIntArrayRef stride, SymIntArrayRef padding, SymIntArrayRef dilation,
                   const SymInt&) {
  std::vector<SymInt> out{size[0], weight.sym_size(0)};
  for (int i = 0; i < 2; ++i) {
    const SymInt reach = dilation[i] * (weight.sym_size(2 + i) - 1) + 1;
    out.push_back((size[2 + i] + padding[i] * 2 - reach) / stride[i] + 1);
  }
  return empty_channels_last(weight, out, weight.scalar_type());
}

Tensor conv2d_input_meta(const Tensor& grad, const Tensor&, SymIntArrayRef size, SymIntArrayRef, SymIntArrayRef,
                         const SymInt&) {
  return empty_channels_last(grad, size, grad.scalar_type());
}

Tensor conv2d_weight_meta(const Tensor&, const Tensor&, SymIntArrayRef, const Tensor& grad, SymIntArrayRef weight_size,
                          SymIntArrayRef, SymIntArrayRef, SymIntArrayRef, const SymInt&) {
  return empty_channels_last(grad, weight_size, grad.scalar_type());
}

// Where the kernels are compiled at first use, the Python twin has defined the ops already.
bool spike_defined_here = false;

TORCH_LIBRARY_FRAGMENT(iirsnn, m) {
  spike_defined_here = !c10::Dispatcher::singleton().findSchema({"iirsnn::spike_pack", ""}).has_value();
  if (!spike_defined_here) return;
  const std::vector<at::Tag> tags{at::Tag::needs_exact_strides};  // all that comes out is channels_last
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  const std::string packed = "Tensor packed, Tensor table, SymInt[] size, ";
  const std::string geometry = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor";
  define("spike_pack(Tensor x, Tensor table, bool counts) -> (Tensor packed, Tensor stats)");
  define("spike_unpack(" + packed + "ScalarType dtype) -> Tensor");
  define("spike_conv2d(" + packed + "Tensor weight, Tensor? bias, " + geometry);
  define(
      "spike_conv2d_input(Tensor grad, Tensor weight, SymInt[] size, SymInt[] padding, SymInt[] dilation, SymInt "
      "groups) -> Tensor");
  define("spike_conv2d_weight(" + packed + "Tensor grad, SymInt[] weight_size, " + geometry);
}

TORCH_LIBRARY_IMPL(iirsnn, Meta, m) {
  if (!spike_defined_here) return;
  m.impl("spike_pack", &pack_meta);
  m.impl("spike_unpack", &unpack_meta);
  m.impl("spike_conv2d", &conv2d_meta);
  m.impl("spike_conv2d_input", &conv2d_input_meta);
  m.impl("spike_conv2d_weight", &conv2d_weight_meta);
}

}  // namespace
}  // namespace iirsnn::sparse
