#pragma once

#include <pybind11/pybind11.h>

namespace iirsnn::event {

void bind(pybind11::module_& m);  // the class EventEngine

}  // namespace iirsnn::event
