// The Python module and the ops for torch, whose headers take longer to compile than all else: in one source, once.
// Facts of the build; importing it registers the ops.

// Before any header: one of the flags ends in "errno", which <cerrno> makes a macro of.
#define IIRSNN_STRING(...) #__VA_ARGS__
#define IIRSNN_EXPANDED(...) IIRSNN_STRING(__VA_ARGS__)
static const char kFlags[] = IIRSNN_EXPANDED(IIRSNN_FLAGS);

#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "lif/torch/bn_lif_autograd.cpp"
#include "lif/torch/bn_lif_call.cpp"
#include "lif/torch/bn_lif_torch.cpp"
#include "lif/torch/lif_autograd.cpp"
#include "lif/torch/lif_call.cpp"
#include "lif/torch/lif_torch.cpp"
#include "lif/torch/triton_call.cpp"
#include "simd/capability.h"
#include "spike/torch/layer_calls.cpp"
#include "spike/torch/spike_ops.cpp"
#include "spike/torch/spike_schemas.cpp"

#if defined(__clang__)
#define IIRSNN_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define IIRSNN_COMPILER "gcc " __VERSION__
#else
#define IIRSNN_COMPILER "unknown"
#endif

// iirsnn.ops.build finds this in the file before it dares to import it.
static const char kBuiltFor[] = "iirsnn for torch " TORCH_VERSION;

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = IIRSNN_COMPILER;
        info["torch"] = kBuiltFor + sizeof("iirsnn for torch ") - 1;
        info["flags"] = kFlags;
#if defined(IIRSNN_WITH_CUDA)
        info["cuda"] = true;
        info["cuda_archs"] = IIRSNN_EXPANDED(IIRSNN_CUDA_ARCHS);
#else
        info["cuda"] = false;
        info["cuda_archs"] = "";
#endif
        info["cpu_capability"] = iirsnn::cpu_capability();
        info["lowest_capability"] = iirsnn::lowest_capability();
        info["compiled_capability"] = iirsnn::compiled_capability();
        return info;
      },
      "What was compiled: compiler, torch, flags, cuda (bool), cuda_archs, lowest_capability and compiled_capability "
      "(the highest); and the "
      "cpu_capability in force.");
  m.def("set_cpu_capability", &iirsnn::set_cpu_capability, pybind11::arg("name"),
        "Use the CPU kernels for portable, avx2 or avx512; ValueError where the processor lacks it.");
  iirsnn::bind_lif_call(m);
  iirsnn::bind_bn_lif_call(m);
  iirsnn::sparse::bind_layer_calls(m);
  iirsnn::bind_triton(m);
}
