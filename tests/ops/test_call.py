"""The shortest way from Python to the compiled kernels, and the ops' two homes: C++ and Python."""

import itertools
import subprocess
import sys

import pytest
import torch

import iirsnn
import iirsnn._C
from iirsnn.functional import SCALES, lif
from iirsnn.ops import backend, batch_norm, spike
from iirsnn.ops import lif as contract

WAYS = {
    "numbers": {},
    "tensors": {"threshold": torch.tensor([0.7]), "leak": torch.tensor([0.9])},
    "number and tensor": {"threshold": 0.7, "leak": torch.tensor([0.9])},
    "channels": {"threshold": torch.tensor([0.7, 0.8, 0.9]), "leak": torch.tensor([0.9, 0.8, 1.0])},
    "channels and one": {"threshold": torch.tensor([0.7, 0.8, 0.9]), "leak": torch.tensor([0.9])},
    "doubles": {"threshold": torch.tensor([0.7]).double()},
    "a scalar tensor": {"threshold": torch.tensor(0.7)},
    "membrane": {"v0": torch.full((2, 3, 4), 0.3), "return_v": True},
    "membrane of double": {"v0": torch.full((2, 3, 4), 0.3).double()},
    "how": {"reset": "hard", "v_reset": 0.1, "detach_reset": False, "surrogate": "atan"},
    "scale": {"surrogate_scale": 1, "backend": "cpu"},
}
INPUTS = {
    "contiguous": lambda x: x,
    "same": lambda x: x[:1].expand(3, 2, 3, 4),
    "channels last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "with holes": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "bfloat16": lambda x: x.bfloat16(),
    "double": lambda x: x.double(),
}


def everything(x, options):
    x = x.detach().requires_grad_()
    leaves = [
        t.requires_grad_()
        for t in (options.get(name) for name in ("threshold", "leak", "v0"))
        if isinstance(t, torch.Tensor)
    ]
    outputs = lif(x, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad([o.sum() for o in outputs], [x, *leaves], allow_unused=True)
    return [*outputs, *grads]


@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("way", WAYS)
def test_the_short_way_is_the_long_one(way, layout, monkeypatch):
    x = INPUTS[layout](torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.4)
    options = WAYS[way]
    short = everything(x, options)
    monkeypatch.setattr("iirsnn.functional.direct", lambda: None)
    for got, wanted in zip(short, everything(x, options), strict=True):
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


NEURONS = {
    "learned": {},
    "fixed": {"learn_threshold": False, "learn_leak": False},
    "one fixed": {"learn_leak": False},
    "channels": {"channels": 3, "leak": 0.8},
    "membrane": {"return_v": True},
    "how": {"reset": "hard", "v_reset": 1, "detach_reset": False, "surrogate": "atan"},
    "scale": {"surrogate_scale": 2, "backend": "cpu"},
}


def of_a_neuron(neuron, x):
    x = x.detach().requires_grad_()
    outputs = neuron(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x, *neuron.parameters()]
    return [*outputs, *torch.autograd.grad([o.sum() for o in outputs], leaves)]


@pytest.mark.parametrize("how", NEURONS)
def test_a_neuron_s_short_way_is_its_long_one(how, monkeypatch):
    x = torch.randn(3, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 0.4
    neuron = iirsnn.FusedLIF(0.7, **NEURONS[how])
    short = of_a_neuron(neuron, x)
    assert iirsnn._C.neuron_call(neuron.__dict__, x, SCALES) is not None
    monkeypatch.setattr("iirsnn.nn.neuron.direct", lambda name: None)
    monkeypatch.setattr("iirsnn.functional.direct", lambda: None)
    for got, wanted in zip(short, of_a_neuron(neuron, x), strict=True):
        assert torch.equal(got, wanted)


def test_what_the_short_way_of_a_neuron_leaves():
    class Property(iirsnn.FusedLIF):
        reset = property(lambda self: "hard", lambda self, value: None)

    x = torch.rand(3, 2)
    parametrized = iirsnn.FusedLIF()
    softplus = torch.nn.Softplus()
    torch.nn.utils.parametrize.register_parametrization(parametrized, "threshold", softplus)
    without, doubled, named = iirsnn.FusedLIF(), iirsnn.FusedLIF().double(), iirsnn.FusedLIF()
    del without.leak
    named.surrogate = "no such"
    left = [
        iirsnn.FusedLIF(stateful=True),
        iirsnn.FusedLIF(packed=True),
        iirsnn.FusedLIF(backend="reference"),
        *(Property(), parametrized, without, doubled, named),
    ]
    for neuron in left:
        assert iirsnn._C.neuron_call(neuron.__dict__, x, SCALES) is None
    assert iirsnn._C.neuron_call([], x, SCALES) is None
    assert iirsnn._C.neuron_call(iirsnn.FusedLIF().__dict__, "x", SCALES) is None
    with pytest.raises(TypeError, match="expected 3 arguments, or 4 with a tuple, got 1"):
        iirsnn._C.neuron_call({})
    hard = iirsnn.FusedLIF(reset="hard", learn_threshold=False, learn_leak=False)
    assert torch.equal(Property()(4 * x), hard(4 * x))
    assert torch.equal(parametrized(4 * x), iirsnn.FusedLIF(float(softplus(torch.ones(1))))(4 * x))
    with pytest.raises(AttributeError, match="leak"):
        without(x)
    with pytest.raises(ValueError, match="surrogate: expected"):
        named(x)


def test_what_the_short_way_takes_and_what_it_leaves():
    def call(x, threshold, leak, v0=None, name="auto"):
        how = ("soft", 0.0, True, "triangle", 0.3, False)
        return iirsnn._C.lif_call(name, x, threshold, leak, v0, *how)

    class Own(torch.Tensor):
        pass

    x, one = torch.rand(3, 2), torch.ones(1)
    taken = [
        (x, 1.0, 1.0),
        (x, one, one),
        (x, torch.nn.Parameter(one), one),
        (x[:1], one, one, x[0]),
    ]
    assert all(isinstance(call(*arguments), torch.Tensor) for arguments in taken)
    left = [
        (x, 1, 1.0),
        (x, True, 1.0),
        (x, -1.0, 1.0),
        (x, 1.0, float("nan")),
        (x, one.double(), one),
        (x, torch.ones(2), torch.ones(2)),
        (x, torch.ones(()), one),
        (x, one, one, x),
        (x, one, one, None, "cuda"),
        (x.int(), one, one),
        (x[:0], one, one),
        (x.to("meta"), one, one),
        (x.as_subclass(Own), one, one),
        ([1.0], one, one),
    ]
    assert all(call(*arguments) is None for arguments in left)
    assert isinstance(lif(x.as_subclass(Own)), Own)


def test_one_dispatch():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(str(func))
            return func(*args, **(kwargs or {}))

    for timesteps, grad in itertools.product((1, 5), (False, True)):
        found = []
        x = torch.rand(timesteps, 64, requires_grad=grad)
        one = torch.ones(1, requires_grad=grad)
        with Names():
            s = lif(x, one, one)
            if grad:
                s.backward(torch.ones_like(s.detach()))
        ours = [name for name in found if name.startswith("iirsnn")]
        assert found[0] == ours[0] == "iirsnn.lif_forward.default"
        assert ours[1:] == ["iirsnn.lif_backward.default"] * grad


def test_schemas_in_cpp_are_those_of_the_twin():
    assert contract.DEFINED_IN_CPP
    for name, schema in (contract.SCHEMAS | batch_norm.SCHEMAS | spike.SCHEMAS).items():
        op = getattr(torch.ops.iirsnn, name).default
        assert str(op._schema) == f"iirsnn::{name}{schema}"
        assert torch.Tag.needs_exact_strides in op.tags


TWIN = """
import sys, torch
sys.modules["iirsnn._C"] = None  # as where nothing is built
from iirsnn.ops import lif as contract
assert not contract.DEFINED_IN_CPP
del sys.modules["iirsnn._C"]  # and compiled later, at first use
from iirsnn.functional import lif
x = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
one = torch.full((3,), 0.9).requires_grad_()
s, v = lif(x, one, one, return_v=True, backend="cpu")
grads = torch.autograd.grad(s.sum() + v.sum(), (x, one))
from iirsnn import SpikeConv2d
from tests.nn.test_spike_layers import test_opcheck
test_opcheck()
torch.manual_seed(0)
layer = SpikeConv2d(3, 2, 3)
layer.set_mode("events")
spikes = (torch.rand(2, 3, 5, 5) < 0.2).float().requires_grad_()
out = layer(spikes)
grads += torch.autograd.grad(out.square().sum(), (spikes, layer.weight))
torch.save([s.detach(), v.detach(), *grads], sys.argv[1])
"""


def test_kernels_that_are_compiled_at_first_use_have_the_twins_autograd(tmp_path):
    subprocess.run([sys.executable, "-c", TWIN, tmp_path / "found"], check=True)
    x = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one = torch.full((3,), 0.9).requires_grad_()
    s, v = lif(x, one, one, return_v=True)
    wanted = [s, v, *torch.autograd.grad(s.sum() + v.sum(), (x, one))]
    torch.manual_seed(0)
    layer = iirsnn.SpikeConv2d(3, 2, 3)
    layer.set_mode("events")
    spikes = (torch.rand(2, 3, 5, 5) < 0.2).float().requires_grad_()
    wanted += torch.autograd.grad(layer(spikes).square().sum(), (spikes, layer.weight))
    for got, t in zip(torch.load(tmp_path / "found"), wanted, strict=True):
        assert torch.equal(got, t)


def test_transforms_of_functorch():
    """A gradient is that of autograd, forward mode raises, a batch runs one by one."""
    x = torch.rand(4, 3, 2, requires_grad=True)
    (wanted,) = torch.autograd.grad(lif(x[0], 0.7, 0.9).sum(), x)
    assert torch.equal(torch.func.grad(lambda x: lif(x, 0.7, 0.9).sum())(x[0]), wanted[0])
    with pytest.raises(NotImplementedError, match="expected a backward pass through lif"):
        torch.func.jvp(lif, (x[0],), (x[0],))
    assert torch.equal(torch.vmap(lif)(x), torch.stack([lif(t) for t in x]))


@pytest.mark.parametrize("learned", [False, True])
def test_compiled_autograd(learned):
    """A graph of gradients that is compiled as a whole has the gradients of one that is not."""
    from torch._dynamo import compiled_autograd

    x = torch.randn(3, 2, 5, requires_grad=True)
    threshold, v0 = torch.full((1,), 0.6, requires_grad=learned), torch.rand(2, 5)
    leaves = [x, threshold] if learned else [x]

    def gradients():
        s, v = lif(x * 2, threshold, 0.9, v0, return_v=True)
        (s * x + v).sum().backward()
        return [(leaf.grad, setattr(leaf, "grad", None))[0] for leaf in leaves]

    wanted = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    for got, grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, grad, rtol=0, atol=0)


def test_a_graph_is_used_once_and_what_it_keeps_is_let_go():
    x = torch.rand(3, 4, requires_grad=True)
    s = lif(x)
    s.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        s.sum().backward()
    s = lif(x * 1)
    assert s.grad_fn.name() == "LifGradient"
    y = x * 1
    loss = lif(y).sum()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_membrane_that_nobody_asked_for_has_no_gradient():
    x = torch.rand(3, 4, requires_grad=True)
    one = torch.ones(1)
    how = "soft", 0.0, True, "triangle", 0.3
    assert not torch.ops.iirsnn.lif_forward(x, one, one, None, *how, False)[1].requires_grad
    assert torch.ops.iirsnn.lif_forward(x, one, one, None, *how, True)[1].requires_grad


def test_the_short_way_is_not_taken_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(backend, "_compiled_reason", {"import": "iirsnn._C is not compiled"})
    monkeypatch.setattr(backend, "_direct", {})
    assert backend.direct() is None


def test_a_call_of_a_neuron_is_a_module_s_where_it_is_more_than_forward(monkeypatch):
    x, seen = torch.rand(3, 2), []

    def see(*_):
        seen.append(1)

    def called(call):
        seen.clear()
        call(x)
        return len(seen)

    class Doubled(iirsnn.FusedLIF):
        def forward(self, x):
            see()
            return super().forward(2 * x)

    neuron = iirsnn.FusedLIF()
    assert called(neuron) == 0
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        for where in (neuron, torch.nn.modules.module):
            name = register if where is neuron else register.replace("register", "register_module")
            handle = getattr(where, name)(see)
            assert called(neuron) == 1
            handle.remove()
            assert called(neuron) == 0
    handle = neuron.register_full_backward_hook(see)
    neuron(x.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1
    handle.remove()
    assert called(Doubled()) == 1
    neuron.forward = see
    assert called(neuron) == 1
    del neuron.forward
    with monkeypatch.context() as patch:
        patch.setattr(iirsnn.FusedLIF, "forward", see)
        assert called(neuron) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", see)
        assert called(neuron) == 1
    with torch.profiler.profile(with_stack=True) as profile:
        torch.nn.Linear(2, 2)(neuron(x))
    named = [event.name for event in profile.events() if event.name.startswith("nn.Module: ")]
    # on Python 3.12 it names none at all
    assert [any(kind in n for n in named) for kind in ("FusedLIF", "Linear")] in ([1, 1], [0, 0])
    assert torch.equal(neuron(x=x), neuron(x))
    with pytest.raises(TypeError):
        neuron(x, x)
