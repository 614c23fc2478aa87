"""Launches of Triton's kernels without a device: what is asked of Triton, and how often."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch
from torch.export import export

triton = pytest.importorskip("triton", reason="triton is not installed")

import iirsnn.kernels  # noqa: E402  (Triton decides now whether it interprets)
from iirsnn.kernels import eager  # noqa: E402
from iirsnn.kernels import lif as lif_kernels  # noqa: E402
from iirsnn.kernels.launch import Launch, forget_plans, planned  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from iirsnn import BatchNormLIF, FusedLIF  # noqa: E402
from iirsnn.functional import lif  # noqa: E402
from tests.nn.test_capture import Watch  # noqa: E402


class Kernel:
    """Stands for a JITFunction: `asked` are calls of Triton, `launched` those of what it gave."""

    arg_names = ("x_ptr", "y_ptr", "N", "stride", "scale", "KIND")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def ask(*arguments):
            self.asked.append((grid, arguments))
            return Compiled(self)

        return ask


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def a_launch():
    kernel = Kernel()
    return kernel, Launch(kernel, 3, {"KIND": 1, "N": 5, "stride": 7, "not its own": 0})


def test_triton_is_asked_once():
    kernel, launch = a_launch()
    x = torch.empty(8)
    for _ in range(3):
        launch((x, None), 0.5)
    assert kernel.asked == [((3, 1, 1), (x, None, 5, 7, 0.5, 1))]
    assert kernel.launched == [((3, 1, 1), (x.data_ptr(), None, 5, 7, 0.5, 1))] * 2


def test_another_number_asks_for_nothing():
    """As when a surrogate is narrowed while a network trains."""
    kernel, launch = a_launch()
    x = torch.empty(8)
    for scale in (0.5, 0.7, 1.0):
        launch((x, None), scale)
    assert len(kernel.asked) == 1
    assert [arguments[4] for _, arguments in kernel.launched] == [0.7, 1.0]


def test_no_kernel_is_compiled_for_a_scale_or_a_reset():
    names = [module.name for module in pkgutil.iter_modules(iirsnn.kernels.__path__)]
    modules = [importlib.import_module(f"iirsnn.kernels.{name}") for name in names]
    kernels = {k.fn for m in modules for k in vars(m).values() if hasattr(k, "fn")}
    found = [inspect.get_annotations(kernel) for kernel in kernels]
    assert sum("constexpr" in str(every) for every in found) > 10
    numbers = [inspect.signature(kernel).parameters for kernel in kernels]
    numbers = [p for every in numbers for n, p in every.items() if n in ("scale", "v_reset")]
    assert len(numbers) > 10
    assert not any("constexpr" in str(parameter.annotation) for parameter in numbers)


def test_a_kernel_for_tensors_that_are_not_aligned_is_another_one():
    kernel, launch = a_launch()
    x, y = torch.empty(8), torch.empty(9)[1:]
    for tensors in ((x, y), (x, x), (x, y), (x, x)):
        launch(tensors, 0.5)
    for of_calls in (kernel.asked, kernel.launched):
        assert len(of_calls) == 2
    assert [arguments[1] for _, arguments in kernel.launched] == [y.data_ptr(), x.data_ptr()]


def test_a_kernel_without_a_tensor_is_another_one():
    """As the two passes backward of BatchNormLIF are, and need_parameter_grads."""
    kernel, launch = a_launch()
    x = torch.empty(8)
    for tensors in ((x, None), (x, x)) * 3:
        launch(tensors, 0.5)
    assert [arguments[1] is None for _, arguments in kernel.asked] == [True, False]
    assert [arguments[1] is None for _, arguments in kernel.launched] == [True, False] * 2


def test_a_missing_argument_is_seen():
    with pytest.raises(KeyError, match="stride"):
        Launch(Kernel(), 3, {"KIND": 1, "N": 5})


def test_what_specialises_a_kernel_is_planned_for():
    """Of x and grad_s their layouts and dtypes; of parameters how many; and every name."""
    shape, strides = torch.Size((3, 2, 4)), (8, 4, 1)
    of = lif_kernels._plan_forward
    plan = of(shape, strides, torch.float16, 1, 1, "soft")
    assert of(shape, strides, torch.float16, 1, 1, "soft") is plan
    others = [
        of(torch.Size((2, 2, 4)), strides, torch.float16, 1, 1, "soft"),
        of(shape, (0, 4, 1), torch.float16, 1, 1, "soft"),
        of(shape, strides, torch.bfloat16, 1, 1, "soft"),
        of(shape, strides, torch.float16, 4, 1, "soft"),
        of(shape, strides, torch.float16, 1, 1, "hard"),
    ]
    assert plan not in others
    with pytest.raises(ValueError, match="reset"):
        of(shape, strides, torch.float16, 1, 1, "none of these")
    forget_plans()
    assert of(shape, strides, torch.float16, 1, 1, "soft") is not plan


def test_what_has_no_hash_is_planned_every_time():
    seen = []
    plan = planned(lambda *sizes: seen.append(sizes))
    for sizes in ((1, 2), (1, 2), ([1], 2), ([1], 2)):
        plan(*sizes)
    assert len(seen) == 3


@pytest.fixture
def nothing_launched(monkeypatch):
    """Tensors of a CPU are taken, and kernels are not launched; the list of their names."""
    if not isinstance(lif_kernels.lif_forward_kernel, JITFunction):
        pytest.skip("Triton interprets: run without TRITON_INTERPRET=1")
    names = []
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: names.append(self.__name__))
    return names


def test_a_call_launches_its_kernels_and_no_more(nothing_launched):
    """Of a few neurons, whose partial sums are the gradients of their parameters."""
    for timesteps, kernels in (
        (1, ["single_step_forward_kernel", "single_step_backward_kernel"]),
        (5, ["lif_forward_kernel", "lif_backward_kernel"]),
    ):
        nothing_launched.clear()
        x = torch.rand(timesteps, 64, requires_grad=True)
        FusedLIF(1.0, 0.9, backend="triton")(x).backward(torch.ones(timesteps, 64))
        assert nothing_launched == kernels


def test_launchers_do_nothing_that_a_capture_forbids(nothing_launched):
    x, one = torch.rand(5, 64), torch.ones(1)
    with Watch() as watch:
        s, v = eager.forward(x, one, one, x[0], "soft", 0.0, True)
        how = "soft", 0.0, True, "triangle", 0.3, True
        eager.backward(s, v, x, one, one, x[0], *how)
    assert watch.ops > 0
    assert nothing_launched == ["lif_forward_kernel", "lif_backward_kernel"]


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_code_has_the_ops(nothing_launched, packed):
    found = []

    def keep(module, inputs):
        found.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    @torch.compile(backend=keep, fullgraph=True)
    def step(x):
        s = lif(x * 2, 0.7, 0.9, packed=packed, backend="triton")
        return s.bits if packed else s

    step(torch.rand(3, 5))
    assert any(("triton_lif_packed" if packed else "triton_lif_forward") in name for name in found)
    module = BatchNormLIF(torch.nn.BatchNorm2d(3), FusedLIF(1.0, 0.9, backend="triton"))
    torch.compile(module, backend=keep, fullgraph=True)(torch.rand(2, 2, 3, 4, 4))
    assert any("triton_bn_lif_forward" in name for name in found)


def test_exported_programs_have_the_op(nothing_launched):
    program = export(FusedLIF(1.0, 0.9, backend="triton"), (torch.rand(3, 5),))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.iirsnn.triton_lif_forward.default in called
    assert nothing_launched == []


NOTHING_COMPILED = """
import os, sys, torch
sys.modules["iirsnn._C"] = None
os.environ["IIRSNN_JIT"] = "0"
import iirsnn.kernels
from iirsnn.functional import lif
from triton.runtime.jit import JITFunction
JITFunction.run = lambda *_, **__: None
os.environ["TRITON_INTERPRET"] = "1"
x = torch.rand(3, 5, requires_grad=True)
for parameter in (torch.ones(1), 0.9):
    s = lif(x, parameter, parameter, backend="triton")
    assert s.grad_fn.name() == "LifGradientBackward", s.grad_fn
    s.sum().backward()
"""


def test_where_nothing_is_compiled_no_op_is_called_either():
    subprocess.run([sys.executable, "-c", NOTHING_COMPILED], check=True)
