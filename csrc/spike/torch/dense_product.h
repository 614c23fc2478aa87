// The convolution or linear layer of spikes by torch's own products: its node of autograd's graph keeps the spikes as
// bits or counts. iirsnn/nn/spike_convolution.py has its twin, DenseConvolution, for where this is not compiled.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "lif/torch/gradient.h"

namespace iirsnn::sparse {

// ---- The ops that pack and unpack: the compiled ones or Triton's ----

template <typename Signature>
c10::TypedOperatorHandle<Signature> packing_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
inline Tensor pack_bits(const Tensor& x, const Tensor& half, bool triton) {
  using Signature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                               std::string, double, bool);
  const auto run = [&](const auto& op) {
    return std::get<0>(op.call(x.unsqueeze(0), half, half, std::nullopt, "none", 0.0, false));
  };
  if (triton) {
    static const auto op = packing_op<Signature>("iirsnn::triton_lif_packed");
    return run(op);
  }
  static const auto op = packing_op<Signature>("iirsnn::lif_packed");
  return run(op);
}
inline Tensor unpack_bits(const Tensor& bits, at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype,
                          bool triton) {
  using Signature = Tensor(const Tensor&, at::IntArrayRef, at::IntArrayRef, at::ScalarType);
  std::vector<int64_t> sizes{1}, strides{c10::multiply_integers(size)};
  sizes.insert(sizes.end(), size.begin(), size.end());
  strides.insert(strides.end(), stride.begin(), stride.end());
  const auto run = [&](const auto& op) { return op.call(bits, sizes, strides, dtype).squeeze(0); };
  if (triton) {
    static const auto op = packing_op<Signature>("iirsnn::triton_unpack_spikes");
    return run(op);
  }
  static const auto op = packing_op<Signature>("iirsnn::unpack_spikes");
  return run(op);
}

// ---- The product ----

// Without the dispatcher where nothing is to be done.
inline Tensor as_dtype(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }
inline Tensor as_sizes(const Tensor& t, at::IntArrayRef sizes) { return t.sizes() == sizes ? t : t.reshape(sizes); }

struct Product {
  int64_t most, divisor;  // values of x are k / divisor, k = 0..most
  bool triton;            // packs and unpacks, else the compiled kernels
  int64_t dtype;          // of x, as its size and strides
  std::vector<int64_t> size, strides;
  std::vector<int64_t> stride, padding, dilation;  // of a convolution; empty: a linear layer, x [..., C]
  int64_t groups;

  template <typename Product, typename Visit>
  static void each(Product& product, const Visit& visit) {
    for (auto* number : {&product.most, &product.divisor, &product.dtype, &product.groups}) visit(*number);
    for (auto* sizes : {&product.size, &product.strides, &product.stride, &product.padding, &product.dilation}) {
      visit(*sizes);
    }
    visit(product.triton);
  }

  bool bits() const { return most == 1 && divisor == 1; }
  at::ScalarType x_dtype() const { return at::ScalarType(dtype); }

  // What torch computes by a matrix product: a linear layer, and a 1x1 convolution of images of one position.
  bool is_linear(const Tensor& weight) const {
    const auto all = [](const std::vector<int64_t>& sizes, int64_t value) {
      return std::all_of(sizes.begin(), sizes.end(), [&](int64_t size) { return size == value; });
    };
    if (stride.empty()) return true;
    return size[2] == 1 && size[3] == 1 && weight.size(2) == 1 && weight.size(3) == 1 && groups == 1 &&
           all(stride, 1) && all(padding, 0) && all(dilation, 1);
  }

  Tensor packed(const Tensor& x, const Tensor& half) const {
    return bits() ? pack_bits(x, half, triton) : x.mul(divisor).to(at::kByte);
  }
  Tensor unpacked(const Tensor& packed, at::ScalarType as) const {
    if (bits()) return unpack_bits(packed, size, strides, as, triton);
    Tensor x = at::empty_strided(size, strides, packed.options().dtype(as));
    return at::mul_out(x, packed, at::scalar_tensor(1.0 / double(divisor), at::kFloat));  // exact, at once in `as`
  }
};

struct DenseProduct : Gradient<DenseProduct, 2, Product> {
  enum Kept { kPacked, kWeight };
  static constexpr const char* kName = "SpikeProduct";

  static Tensor forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Product& product) {
    const Tensor values = as_dtype(x, weight.scalar_type());
    if (product.stride.empty()) return at::linear(values, weight, bias);
    if (!product.is_linear(weight)) {
      return at::conv2d(values, weight, bias, product.stride, product.padding, product.dilation, product.groups);
    }
    return at::linear(values.flatten(1), weight.flatten(1), bias).unsqueeze(-1).unsqueeze(-1);
  }

  static variable_list gradients(const variable_list& grads, const Tensor* kept, const Product& product,
                                 int64_t wanted) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "iirsnn: expected one backward pass through a spike layer, got one that is to be differentiated again "
                "(create_graph=True)");
    const Tensor &grad = grads[0], &weight = kept[kWeight];
    if (!grad.defined()) return variable_list(3);
    const bool need_x = wanted & 1, need_weight = wanted & 2, need_bias = wanted & 4;
    const auto x = [&] {
      if (need_weight) return product.unpacked(kept[kPacked], weight.scalar_type());
      return at::empty_strided(product.size, product.strides, weight.options());  // its size and layout are read
    };
    Tensor grad_x, grad_weight, grad_bias;
    if (product.is_linear(weight)) {
      const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = grad.numel() / outputs;
      const Tensor flat = as_sizes(grad, {rows, outputs});
      if (need_x) grad_x = as_sizes(flat.mm(as_sizes(weight, {outputs, inputs})), product.size);
      if (need_weight) grad_weight = as_sizes(flat.t().mm(as_sizes(x(), {rows, inputs})), weight.sizes());
      if (need_bias) grad_bias = flat.sum(0);
    } else {
      at::OptionalIntArrayRef bias;
      const int64_t outputs[] = {weight.size(0)};
      if (need_bias) bias = outputs;
      std::tie(grad_x, grad_weight, grad_bias) =
          at::convolution_backward(grad, x(), weight, bias, product.stride, product.padding, product.dilation, false,
                                   {0, 0}, product.groups, {need_x, need_weight, need_bias});
    }
    if (need_x) grad_x = as_dtype(grad_x, product.x_dtype());
    return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
  }
};

}  // namespace iirsnn::sparse
