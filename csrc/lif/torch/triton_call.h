// The Triton kernels, whose launches are functions of iirsnn.kernels, as the gradients in C++ call them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <pybind11/pybind11.h>

#include <tuple>

#include "lif/torch/bn_lif_ops.h"
#include "lif/torch/gradient.h"

namespace iirsnn {

// Whether the backend of this name is the Triton kernels for x, and Python has handed them over.
bool triton_takes(const char* backend, const Tensor& x);

// What `run` returns with its gradient, in lif_autograd.cpp and bn_lif_autograd.cpp: s and v; s, mean, var and rstd.
std::tuple<Tensor, Tensor> lif_with_gradient(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                             const OptionalTensor& v0, const Options& options,
                                             c10::function_ref<std::tuple<Tensor, Tensor>()> run);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_with_gradient(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& threshold,
    const Tensor& leak, const Options& options, c10::function_ref<std::tuple<Tensor, Tensor, Tensor, Tensor>()> run);

// s, v (undefined where it is not wanted), with their gradient.
std::tuple<Tensor, Tensor> lif_by_triton(const Tensor& x, const Tensor& threshold, const Tensor& leak,
                                         const OptionalTensor& v0, Options options);

// What the ops triton_lif_backward and triton_bn_lif_backward return; undefined where that is not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> lif_backward_by_triton(const Tensor& grad_s, const Tensor& grad_v,
                                                                  const Tensor& x, const Tensor& threshold,
                                                                  const Tensor& leak, const Tensor& v0,
                                                                  const Options& options, bool parameters);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> bn_lif_backward_by_triton(
    const Tensor& grad_s, const Tensor& x, const Tensor& mean, const Tensor& rstd, const Tensor& weight,
    const Tensor& bias, const Tensor& threshold, const Tensor& leak, const Options& options, bool learned);

// s, with its gradient; mean, var, rstd. The call is counted in `running`.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_lif_by_triton(const Tensor& x, const OptionalTensor& weight,
                                                            const OptionalTensor& bias, const Tensor& threshold,
                                                            const Tensor& leak, double eps, Options options,
                                                            const Running& running);

void bind_triton(pybind11::module_& m);  // the function take_triton

}  // namespace iirsnn
