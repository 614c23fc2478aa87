"""Every way to the Triton kernels gives the same, in Triton's interpreter (see conftest.py)."""

import copy

import iirsnn.kernels.ops  # noqa: F401  # defines them
import pytest
import torch
from iirsnn.kernels import eager
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.functional import lif
from iirsnn.ops.backend import direct

COMPILED = direct() is not None
#: What each has to do without: the calls of iirsnn._C, their twins in Python, and what goes
#: without ops.
WAYS = {
    "C++": (),
    "Python": ("iirsnn.functional.direct", "iirsnn.nn.batch_norm.direct"),
    "checked": ("iirsnn.functional.direct_to_triton",),
    "op": ("iirsnn.kernels.eager.unwatched", "iirsnn.kernels.eager_batch_norm.unwatched"),
}
NODES = {
    "C++": "LifGradient" if COMPILED else "LifGradientBackward",
    "Python": "LifGradientBackward",
    "checked": "LifGradientBackward",
    "op": "GeneratedBackwardFor_iirsnn_triton_lif_forward_defaultBackward",
}
lif(torch.ones(1, 1), backend="triton")  # iirsnn._C is given the kernels


def without(name, monkeypatch):
    """Take away what only the ways before this one are made of."""
    nothing = (lambda *tensors: False) if name == "op" else (lambda *name: None)
    for missing in WAYS[name]:
        monkeypatch.setattr(missing, nothing)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name in WAYS:
        without(name, monkeypatch)
        if name == request.param:
            break
    return request.param


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.4


CALLS = {
    "T=1": (random(1, 2, 3, 4), {}),
    "T=3": (random(3, 2, 3, 4), {"surrogate": "atan", "detach_reset": False}),
    "T=10": (random(10, 2, 3, 4), {"reset": "hard", "v_reset": 1}),
    "one dimension": (random(3), {}),
    "numbers": (random(3, 5), {"threshold": 0.7, "leak": 0.9}),
    "parameters": (random(3, 5), {"threshold": torch.full((1,), 0.7), "leak": torch.ones(1)}),
    "channels": (random(3, 2, 3, 4), {"threshold": torch.tensor([0.7, 0.8, 0.9])}),
    "T=1, channels": (random(1, 2, 3, 4), {"threshold": torch.tensor([0.7, 0.8, 0.9])}),
    "channels, both": (
        random(3, 2, 3, 4),
        {"threshold": torch.tensor([0.7, 0.8, 0.9]), "leak": torch.tensor([0.9, 1.0, 0.5])},
    ),
    "membrane": (random(3, 2, 5), {"v0": random(2, 5), "return_v": True}),
    "T=1, membrane": (random(1, 2, 5), {"v0": random(2, 5), "return_v": True}),
    "channels last": (random(3, 2, 4, 3).transpose(2, 3), {"leak": torch.tensor([0.9, 1.0, 0.5])}),
    "with holes": (random(3, 2, 8)[..., ::2], {"v0": random(2, 4)}),
    "same": (random(1, 2, 4).expand(3, 2, 4), {}),
    "negated view": (torch.complex(random(3, 4), random(3, 4)).conj().imag, {}),
    "empty": (random(3, 0, 4), {"threshold": torch.ones(1)}),
    "float16": (random(3, 2, 5).half(), {"surrogate_scale": 1}),
}


def everything(x, options, grad):
    x = x.detach().requires_grad_()
    named = {k: t.detach() for k, t in options.items() if isinstance(t, torch.Tensor)}
    leaves = [x, *(t.requires_grad_() for t in named.values())]
    outputs = lif(x, **{**options, **named}, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [grad(o) for o in outputs]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [*(o.detach() for o in outputs), *found], outputs[0].grad_fn.name()


GRADIENTS = {
    "dense": lambda o: random(*o.shape).to(o.dtype),
    "one": lambda o: o.new_ones(()).expand(o.shape),
    "in another order": lambda o: random(*o.shape[::-1]).to(o.dtype).permute(*range(o.dim())[::-1]),
}


@pytest.mark.parametrize("grad", GRADIENTS)
@pytest.mark.parametrize("name", CALLS)
def test_all_give_the_same(name, grad, monkeypatch):
    x, options = CALLS[name]
    found = {}
    for way in WAYS:
        without(way, monkeypatch)
        found[way], _ = everything(x, options, GRADIENTS[grad])
    for way, tensors in found.items():
        for got, wanted in zip(tensors, found["op"], strict=True):
            assert (got.dtype, got.shape, got.stride()) == (
                wanted.dtype,
                wanted.shape,
                wanted.stride(),
            )
            assert torch.equal(got, wanted), way


def test_which_way_is_taken(way):
    _, node = everything(random(3, 5), {"threshold": torch.full((1,), 0.7)}, torch.ones_like)
    assert node == NODES[way]


def test_no_second_derivative(way):
    x = random(3, 5).requires_grad_()
    (grad,) = torch.autograd.grad(lif(x, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_what_nobody_learns_has_no_gradient(way):
    x, threshold = random(3, 5).requires_grad_(), torch.full((1,), 0.7)
    lif(x, threshold, 0.9, backend="triton").sum().backward()
    assert x.grad is not None
    assert threshold.grad is None
    leak = torch.ones(1, requires_grad=True)
    lif(x.detach()[:1], threshold, leak, backend="triton").sum().backward()
    assert torch.equal(leak.grad, torch.zeros(1))
    with torch.no_grad():
        assert lif(x, threshold, leak, backend="triton").grad_fn is None


def test_what_is_kept_is_watched(way):
    x = random(3, 5).requires_grad_()
    y = x * 1
    loss = lif(y, backend="triton").sum()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        s = lif(x * 1, 0.7, 0.9, backend="triton")
    assert len(kept) >= 3  # x, threshold, leak
    s.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        s.sum().backward()


def test_checkpointing(way):
    x, threshold = random(3, 5).requires_grad_(), torch.full((1,), 0.7, requires_grad=True)

    def step(x):
        return lif(x * 2, threshold, 0.9, backend="triton")

    wanted = torch.autograd.grad(step(x).sum(), (x, threshold))
    s = torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False)
    for got, grad in zip(torch.autograd.grad(s.sum(), (x, threshold)), wanted, strict=True):
        assert torch.equal(got, grad)


def test_autocast_changes_nothing(way):
    x = random(3, 5).requires_grad_()
    s = lif(x, 0.7, 0.9, backend="triton")
    with torch.autocast("cpu", torch.bfloat16):
        cast = lif(x, 0.7, 0.9, backend="triton")
    assert cast.dtype == torch.float32
    assert torch.equal(s, cast)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (s, cast)]
    assert torch.equal(*grads)


def test_gradients_of_a_batch_of_gradients(way):
    x = random(3, 5).requires_grad_()
    s = lif(x, 0.7, 0.9, backend="triton")
    many = random(4, 3, 5)
    (got,) = torch.autograd.grad(s, x, many, is_grads_batched=True, retain_graph=True)
    assert torch.equal(
        got, torch.stack([torch.autograd.grad(s, x, g, retain_graph=True)[0] for g in many])
    )


def test_a_graph_of_gradients_that_is_compiled(way):
    from torch._dynamo import compiled_autograd

    x, threshold = random(3, 5).requires_grad_(), torch.full((1,), 0.7, requires_grad=True)

    def gradients():
        lif(x * 2, threshold, 0.9, backend="triton").sum().backward()
        return [(leaf.grad, setattr(leaf, "grad", None))[0] for leaf in (x, threshold)]

    wanted = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    for got, grad in zip(found, wanted, strict=True):
        assert torch.equal(got, grad)


def normed(**options):
    torch.manual_seed(0)
    return BatchNormLIF(nn.BatchNorm2d(3), FusedLIF(0.7, 0.8, backend="triton", **options))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("timesteps", [1, 3, 10])
def test_batch_norm_gives_the_same(timesteps, learned, monkeypatch):
    x, grad = random(timesteps, 2, 3, 4, 4), random(timesteps, 2, 3, 4, 4).mul(2)
    module = normed(learn_threshold=learned, learn_leak=learned)
    found = {}
    for way in WAYS:
        without(way, monkeypatch)
        ours, leaf = copy.deepcopy(module), x.clone().requires_grad_()
        s = ours(leaf)
        s.backward(grad)
        parameters = [p.grad for p in ours.parameters()]
        evaluated = ours.eval()(x).detach()
        with torch.no_grad():
            evaluated = torch.stack([evaluated, ours(x)])
        found[way] = [s.detach(), leaf.grad, *parameters, *ours.norm.buffers(), evaluated]
    for tensors in found.values():
        for got, wanted in zip(tensors, found["op"], strict=True):
            assert torch.equal(got, wanted)


def test_batch_norm_has_no_second_derivative(way):
    x = random(3, 2, 3, 4, 4).requires_grad_()
    (grad,) = torch.autograd.grad(normed()(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


def test_bits(way):
    x = random(3, 2, 5)
    bits = lif(x, 0.7, 0.9, packed=True, backend="triton")
    assert torch.equal(bits.unpack(backend="triton"), lif(x, 0.7, 0.9, backend="triton"))


# ---- those who watch are shown the op


class Names(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


OPS = ["iirsnn.triton_lif_forward.default", "iirsnn.triton_lif_backward.default"]
NORMED = ["iirsnn.triton_bn_lif_forward.default", "iirsnn.triton_bn_lif_backward.default"]


@pytest.mark.parametrize("timesteps", [1, 3])
def test_a_mode_sees_the_ops(way, timesteps):
    for run, shape, ops in (
        (lambda x: lif(x, backend="triton"), (5,), OPS),
        (normed(), (2, 3, 4, 4), NORMED),
    ):
        x = random(timesteps, *shape).requires_grad_()
        with Names() as names:
            s = run(x)
            s.backward(torch.ones_like(s.detach()))
        assert [name for name in names.found if name.startswith("iirsnn")] == ops


def test_a_mode_around_backward_alone_sees_its_op(way):
    x = random(3, 5).requires_grad_()
    s = lif(x, backend="triton")
    with Names() as names:
        s.backward(torch.ones(3, 5))
    assert OPS[1] in names.found


def test_a_function_mode_sees_the_op(way):
    with Functions() as seen:
        lif(random(3, 5), torch.ones(1), torch.ones(1), backend="triton")
    assert any("triton_lif_forward" in name for name in seen.found)


def test_a_subclass_sees_the_op(way):
    class Own(torch.Tensor):
        pass

    assert isinstance(lif(random(3, 5).as_subclass(Own), backend="triton"), Own)


def test_fake_tensors_launch_nothing(way, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr("iirsnn.kernels.launch.Launch.__call__", None)
    with FakeTensorMode():
        s = lif(torch.empty(3, 5, requires_grad=True), backend="triton")
    assert s.shape == (3, 5)
    assert s.requires_grad


def test_transforms_of_functorch(way):
    def spikes(x):
        return lif(x, 0.7, 0.9, backend="triton")

    x = random(4, 3, 2)
    assert torch.equal(torch.vmap(spikes)(x), torch.stack([spikes(t) for t in x]))
    with pytest.raises(RuntimeError, match="functorch transforms"):  # as for every triton_op
        torch.func.grad(lambda x: spikes(x).sum())(x[0])


def test_forward_mode_raises(way):
    import torch.autograd.forward_ad as forward_ad

    x = random(3, 5).requires_grad_()
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        lif(forward_ad.make_dual(x, x), backend="triton")


def test_a_trace_has_the_op(way):
    one = torch.ones(1)
    traced = torch.jit.trace(lambda x: lif(x, one, one, backend="triton"), (random(3, 5),))
    assert "triton_lif_forward" in str(traced.graph)


def test_what_is_left_to_lif(monkeypatch):
    """The twin of iirsnn._C.lif_call: what needs a conversion or an error."""
    x, one = random(3, 2), torch.ones(1)

    def call(x, threshold=one, leak=one, v0=None, backend="triton", **how):
        options = {
            **{"reset": "soft", "v_reset": 0.0, "detach_reset": True},
            **{"surrogate": "triangle", "surrogate_scale": 0.3, "return_v": False, **how},
        }
        return eager.lif_call(backend, x, threshold, leak, v0, *options.values())

    assert torch.equal(call(x), lif(x, backend="triton"))
    assert isinstance(call(x, nn.Parameter(one), v0=x[0], return_v=True), tuple)
    left = [
        call([1.0]),
        call(x.double()),
        call(x[:0]),
        call(x.t()),
        call(x, 1.0),
        call(x, one.double()),
        call(x, torch.ones(2), torch.ones(2)),
        call(x, torch.ones(())),
        call(random(3, 2, 2), torch.ones(2)),
        call(x, v0=x),
        call(x, v0=x[0].double()),
        call(x, backend="auto"),
        call(x, backend="cpu"),
        call(x, reset="none of these"),
        call(x, surrogate="none of these"),
        call(x, v_reset=1),
        call(x, v_reset=float("nan")),
        call(x, surrogate_scale=-1.0),
        call(x, surrogate_scale=None),
        call(x.to("meta"), one.to("meta"), one.to("meta")),
    ]
    assert all(found is None for found in left)
