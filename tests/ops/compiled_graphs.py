"""What torch.compile makes of Triton's ops for a GPU, told as JSON: there need be none.

Of forward and backward, each: the ops that copy, and how memory for what a kernel writes is asked
for.
"""

import json

import iirsnn.kernels  # noqa: F401 (the ops)
import torch
import triton
from torch._guards import detect_fake_mode
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget

how = "soft", 0.0, True, "triangle", 0.3


class NoGpu:
    """What Triton asks a driver while kernels are traced."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def lif(x, threshold, leak):
    return torch.ops.iirsnn.triton_lif_forward(x, threshold, leak, None, *how, False)[0]


def bn_lif(x, threshold, leak):
    return torch.ops.iirsnn.triton_bn_lif_forward(x, None, None, threshold, leak, 1e-5, *how)[0]


def graphs_of(f, *inputs):
    """{"forward", "backward"} of f, after Inductor's passes."""
    found = {}

    def look(module, inputs, is_backward=False, **options):
        with V.set_fake_mode(detect_fake_mode(inputs)):
            post_grad_passes(module, True)
        nodes = [n for n in module.graph.nodes if n.op == "call_function"]
        found["backward" if is_backward else "forward"] = {
            "copies": [str(n.target) for n in nodes if {"clone", "copy"} & _words(n)],
            "memory": [
                f"{n.args[1:]} {n.kwargs}"
                for n in nodes
                if n.target is torch.ops.aten.new_empty_strided.default
            ],
        }
        (results,) = next(n for n in module.graph.nodes if n.op == "output").args

        def run(given):  # the kernels cannot
            values = [getattr(n, "meta", {}).get("val") for n in results]
            return [None if v is None else torch.empty_strided(v.shape, v.stride()) for v in values]

        run._boxed_call = True
        return run

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=lambda gm, x: compile_fx(gm, x, inner_compile=look))
    s = compiled(*inputs)
    s.backward(torch.empty_like(s))
    return found


def _words(node):
    return set(str(node.target).replace(".", " ").replace("_", " ").split())


triton.runtime.driver.set_active(NoGpu())
told = {}
for timesteps in (1, 5, 12):
    for f in (lif, bn_lif):
        x = torch.randn(timesteps, 2, 8, 4, 4, requires_grad=True)
        parameters = [torch.ones(1, requires_grad=True) for _ in range(2)]
        told[f"{f.__name__} T={timesteps}"] = graphs_of(f, x, *parameters)
print(json.dumps(told))
