#pragma once

#include <pybind11/pybind11.h>

namespace iirsnn {

void bind_lif_call(pybind11::module_& m);     // the functions lif_call and neuron_call
void bind_bn_lif_call(pybind11::module_& m);  // the function bn_lif_call

}  // namespace iirsnn
