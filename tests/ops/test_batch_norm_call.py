"""Calls of BatchNorm and LIF in one: registration, torch.compile, the short way, errors."""

import copy
import itertools

import pytest
import torch
from torch.library import opcheck

from tests.ops.batch_norm_inputs import how, make, modules, run

forward = torch.ops.iirsnn.bn_lif_forward
backward = torch.ops.iirsnn.bn_lif_backward
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for timesteps, last, affine in ((1, False, True), (3, True, False)):
        *tensors, grad_s = make((2, 6, 4, 4), timesteps, dtype, last=last, affine=affine)
        x, *parameters = tensors
        _, mean, _, rstd = forward(*tensors, 1e-5, *how())
        opcheck(backward.default, (grad_s, x, mean, rstd, *parameters, *how()))
        leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
        opcheck(forward.default, (*leaves, 1e-5, *how()))


def test_compiles_without_a_break():
    fused, composed = modules((2, 6, 8, 8))
    x, *_, grad_s = make((2, 6, 8, 8), 3)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    got, wanted = run(compiled, x, grad_s), run(composed, x, grad_s)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.norm.running_mean, composed.norm.running_mean)


def everything_of_the_module(module, x, grad_s):
    found = []
    for _ in range(2):  # the second time on other running statistics
        s, grad_x, grads = run(module, x, grad_s)
        found += [s, grad_x, *grads]
    return [*found, *(buffer.clone() for buffer in module.buffers())]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": {"affine": False}, "learn_threshold": False, "learn_leak": False},
        {"norm": {"momentum": 0.7}, "channels": 6, "reset": "hard", "surrogate": "atan"},
    ],
    ids=["learned", "fixed", "channels"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_short_way_is_the_long_one(options, dtype, monkeypatch):
    for timesteps, last in itertools.product((1, 5), (False, True)):
        short, _ = modules((3, 6, 5, 5), **copy.deepcopy(options))
        long = copy.deepcopy(short)
        x, *_, grad_s = make((3, 6, 5, 5), timesteps, dtype, last=last)
        assert short._short_way(x) is not None
        short = copy.deepcopy(long)
        found = everything_of_the_module(short, x, grad_s)
        with monkeypatch.context() as patch:
            patch.setattr("iirsnn.nn.batch_norm.direct", lambda name: None)
            wanted = everything_of_the_module(long, x, grad_s)
        for got, tensor in zip(found, wanted, strict=True):
            assert torch.equal(got, tensor)


def test_what_the_short_way_leaves_is_not_counted():
    x = make((3, 6, 5, 5), 2)[0]

    def left(x, change=lambda module: None, **norm):
        module, _ = modules((3, 6, 5, 5), norm=norm)
        change(module)
        before = [buffer.clone() for buffer in module.buffers()]
        assert module._short_way(x) is None
        assert all(map(torch.equal, before, module.buffers()))

    left(x, momentum=None)
    left(x.double())
    left(x.to("meta"))
    left(x[..., ::2])
    left(x[:1, :1, :, :1, :1])
    left(x[:0])
    left(x, lambda module: module.norm.double())
    left(x, lambda module: setattr(module.neuron, "backend", "reference"))
    left(x, lambda module: setattr(module.neuron, "surrogate_scale", -1.0))
    left(x, lambda module: module.norm._parameters.pop("weight"))


def test_the_running_statistics_are_written_as_autograd_sees():
    module, _ = modules((3, 6, 5, 5))
    x = make((3, 6, 5, 5), 2)[0]
    kept = module.norm.running_mean * torch.ones(6, requires_grad=True)
    module(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_one_dispatch_of_ours():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    module, _ = modules((3, 6, 5, 5))
    found = []
    with Names():
        s = module(make((3, 6, 5, 5), 2)[0])
        s.backward(torch.ones_like(s))
    names = ["iirsnn.bn_lif_forward.default", "iirsnn.bn_lif_backward.default"]
    assert [name for name in found if name.startswith("iirsnn")] == names
    assert s.grad_fn.name() == "BnLifGradient"
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        s.backward(torch.ones_like(s))


def test_forward_mode_raises():
    x, *parameters, _ = make((2, 6, 4, 4), 1)
    with pytest.raises(NotImplementedError, match="expected a backward pass through lif"):
        torch.func.jvp(lambda x: forward(x, *parameters, 1e-5, *how())[0], (x,), (x,))


def test_compiled_autograd():
    """A graph of gradients that is compiled as a whole has the gradients of one that is not."""
    from torch._dynamo import compiled_autograd

    module, _ = modules((3, 6, 5, 5))
    x, *_, grad_s = make((3, 6, 5, 5), 3)
    wanted = run(copy.deepcopy(module), x, grad_s)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = run(module, x, grad_s)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_second_derivative_raises_one_clear_error():
    fused, _ = modules((2, 6, 8, 8))
    x = make((2, 6, 8, 8), 1)[0].requires_grad_()
    (grad_x,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="iirsnn: expected one backward pass through lif"):
        grad_x.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 3)}, ValueError, r"x: expected shape \[T, B, C, ...\] without a 0"),
        ({"x": torch.ones(2, 0, 3)}, ValueError, r"x: expected shape \[T, B, C, ...\] without a 0"),
        ({"x": torch.ones(2, 4, 3).half()}, TypeError, "x: expected float32 or bfloat16, got Half"),
        ({"x": torch.ones(2, 4, 6)[..., ::2]}, ValueError, r"x: expected x\[0\] dense"),
        ({"weight": torch.ones(4)}, ValueError, r"weight: expected contiguous \[C\] .* got \[4\]"),
        ({"bias": torch.ones(3).half()}, TypeError, "bias: expected float32, got Half"),
        ({"threshold": torch.zeros(1)}, ValueError, "threshold: expected finite values > 0, got 0"),
        ({"leak": torch.ones(2)}, ValueError, r"leak: expected 1-D with 1 element, or C .* \[2\]"),
        ({"reset": "sharp"}, ValueError, "reset: expected soft, hard, .* got 'sharp'"),
        ({"surrogate": "spline"}, ValueError, "surrogate: expected triangle, .* got 'spline'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "x": torch.ones(2, 4, 3),
        "weight": torch.ones(3),
        "bias": torch.ones(3),
        "threshold": torch.ones(1),
        "leak": torch.ones(1),
        "eps": 1e-5,
    }
    names = ("reset", "v_reset", "detach_reset", "surrogate", "surrogate_scale")
    arguments |= dict(zip(names, how(), strict=True))
    with pytest.raises(error, match=message):
        forward(*(arguments | change).values())
