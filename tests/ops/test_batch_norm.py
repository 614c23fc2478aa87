"""The compiled ops of BatchNorm and LIF in one: values, bits, gradients, registration."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck

import iirsnn._C
from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.ops import reference
from tests import lif_cases
from tests.composed import Composed

forward = torch.ops.iirsnn.bn_lif_forward
backward = torch.ops.iirsnn.bn_lif_backward
LEVELS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)

# [B, C, ...]: what the kernels do differently.
SHAPES = {
    "rows of whole vectors": (3, 6, 8, 8),
    "rows, odd": (3, 5, 7, 5),
    "short rows": (9, 24, 2, 2),
    "several chunks": (5, 12, 32, 32),
    "one channel": (7, 1, 9, 5),
    "no image": (70, 48),
    "one dimension": (4, 6, 17),
    "three dimensions": (2, 3, 4, 3, 5),
}
LAST = {
    "columns": (2, 32, 12, 12),
    "columns, several chunks": (5, 64, 20, 20),
    "columns, odd": (3, 21, 5, 5),
}


def make(shape, timesteps, dtype=torch.float32, *, last=False, channels=False, affine=True):
    """x, weight, bias, threshold, leak, grad_s: a current of mean 1/2 and deviation 2."""
    rng = torch.Generator().manual_seed(timesteps)

    def normal(*size):
        return torch.randn(size, generator=rng)

    def laid(t):
        if last:
            t = t.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, t.shape[:2])
        return t.to(dtype)

    count = shape[1]
    x, grad_s = (laid(normal(timesteps, *shape)) for _ in range(2))
    weight, bias = (1 + 0.3 * normal(count), 0.3 * normal(count)) if affine else (None, None)
    threshold, leak = torch.tensor([0.7]), torch.tensor([0.8])
    if channels:
        threshold, leak = torch.linspace(0.6, 0.9, count), torch.linspace(1.0, 0.7, count)
    return 2 * x + 0.5, weight, bias, threshold, leak, grad_s


EVERY_SHAPE = [
    pytest.param(shape, last, id=name)
    for shapes, last in ((SHAPES, False), (LAST, True))
    for name, shape in shapes.items()
]


def how(reset="soft", detach=True, surrogate="triangle"):
    return reset, 0.125, detach, surrogate, reference.SURROGATES[surrogate][1]


@pytest.fixture
def capability():
    """Sets an instruction set, or skips where the processor lacks it."""
    before = iirsnn._C.build_info()["cpu_capability"]

    def use(name):
        try:
            iirsnn._C.set_cpu_capability(name)
        except ValueError:
            pytest.skip(f"this processor lacks {name}; run on one that has it")

    yield use
    iirsnn._C.set_cpu_capability(before)


def statistics(x):
    """Mean, biased variance of each channel in float64."""
    wide = x.double().transpose(0, 2).flatten(1)
    return wide.mean(1), wide.var(1, correction=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "last"), EVERY_SHAPE)
def test_forward_is_the_reference_on_the_normalised_current(shape, last, dtype):
    lined = (-1, *[1] * (len(shape) - 2))
    for timesteps, reset in [(1, "soft"), *itertools.product((2, 5, 18), reference.RESETS)]:
        x, weight, bias, threshold, leak, _ = make(
            shape, timesteps, dtype, last=last, channels=timesteps == 5, affine=timesteps != 2
        )
        s, mean, var, rstd = forward(x, weight, bias, threshold, leak, 1e-5, *how(reset))
        for got, wanted in zip((mean, var), statistics(x), strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=2.0**-23, atol=2.0**-26)
        torch.testing.assert_close(rstd, (var + 1e-5).rsqrt())
        gain = rstd if weight is None else rstd * weight
        shift = (0.0 if bias is None else bias) - mean * gain
        current = (x.float() * gain.view(lined) + shift.view(lined)).to(dtype)
        wanted, _ = reference.lif_forward(current, threshold, leak, None, *how(reset), False)
        assert torch.equal(s, wanted)
        assert s.stride() == reference.empty_spikes(x).stride()
        assert 0.05 < s.float().mean() < 0.95


def test_a_variance_far_below_the_mean_is_exact():
    x = make(SHAPES["rows of whole vectors"], 3)[0] + 3000
    one = torch.ones(1)
    _, mean, var, _ = forward(x, None, None, one, one, 1e-5, *how())
    for got, wanted in zip((mean, var), statistics(x), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2.0**-23, atol=0)


def wide_gradients(x, weight, bias, threshold, leak, grad_s, options):
    """Spikes and gradients in float64 by torch's batch norm, the reference and autograd."""
    inputs = [
        None if t is None else t.double().requires_grad_()
        for t in (x, weight, bias, threshold, leak)
    ]
    current = F.batch_norm(inputs[0].flatten(0, 1), None, None, *inputs[1:3], training=True)
    s, _ = reference.lif_forward(
        current.unflatten(0, x.shape[:2]), *inputs[3:], None, *options, False
    )
    s.backward(grad_s.double())
    return s.detach(), [None if t is None else t.grad for t in inputs]


# Relative, of an element or of the largest one: float32 roundings of T currents and of sums.
# fast_sigmoid is so steep that it makes five times as much of those of a current.
TOLERANCE = 3e-5


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
@pytest.mark.parametrize("reset", reference.RESETS)
def test_gradients_equal_autograds_in_float64(reset, surrogate, detach):
    tolerance = TOLERANCE * (5 if surrogate == "fast_sigmoid" else 1)
    options = how(reset, detach, surrogate)
    for timesteps, shape in itertools.product((1, 2, 8, 18), ((4, 3, 5, 5), (4, 16, 3, 3))):
        inputs = make(shape, timesteps, last=shape[1] == 16, channels=timesteps == 2)
        check_gradients(inputs, options, tolerance)


@pytest.mark.parametrize(("shape", "last"), EVERY_SHAPE)
def test_gradients_of_every_shape(shape, last):
    for timesteps in (1, 3):
        inputs = make(shape, timesteps, last=last, channels=True, affine=timesteps == 3)
        check_gradients(inputs, how(), TOLERANCE)


def check_gradients(inputs, options, tolerance):
    *tensors, grad_s = inputs
    s, mean, _, rstd = forward(*tensors, 1e-5, *options)
    got = backward(grad_s, tensors[0], mean, rstd, *tensors[1:], *options)
    wanted_s, wanted = wide_gradients(*inputs, options)
    assert torch.equal(s.double(), wanted_s)  # else a spike that rounding moved is compared
    for g, w in zip(got, wanted, strict=True):
        if w is not None:
            largest = max(1.0, w.abs().max().item())
            torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * largest)
    assert got[0].stride() == reference.empty_spikes(tensors[0]).stride()


@pytest.mark.parametrize("timesteps", [1, 2, 5, 8])
@pytest.mark.parametrize(("shape", "last"), EVERY_SHAPE)
def test_gradients_of_parameters_are_summed_in_double(shape, last, timesteps):
    size = (timesteps, *shape, *[1] * (4 - len(shape)))
    x, grad_s = lif_cases.exact_terms(size, last, 2**9)
    one, zero = torch.ones(shape[1]), torch.zeros(shape[1])
    options = ("soft", 0.0, True, "triangle", 1.0)
    call = (grad_s, x, zero, one, None, None, one, one, *options)  # the current is x
    _, sums, _ = torch.ops.iirsnn.bn_lif_gradient_sums(*call)
    wide = (grad_s.double(), None, x.double(), one.double(), one.double(), None)
    grad, threshold, leak, _ = torch.ops.iirsnn.lif_backward(*wide, *options, True)
    others = [d for d in range(x.dim()) if d != 2]
    wanted = torch.stack([threshold, leak, grad.sum(others), (grad * x).sum(others)])
    assert torch.equal(sums, wanted)


def modules(shape, **options):
    """BatchNormLIF and the two modules with the same parameters."""
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    norm = kind(shape[1], **options.pop("norm", {}))
    neuron = FusedLIF(0.7, 0.8, **options)
    for parameter in [*norm.parameters(), *neuron.parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.0)
    return BatchNormLIF(norm, neuron), Composed(*copy.deepcopy((norm, neuron)))


def run(module, x, grad_s):
    x = x.detach().requires_grad_()
    s = module(x)
    s.backward(grad_s)
    return s.detach(), x.grad, [p.grad for p in module.parameters()]


def error(got, exact):
    return (got.double() - exact).norm().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "last"), EVERY_SHAPE)
def test_the_module_errs_at_most_twice_as_much_as_the_two(shape, last, dtype):
    fused, composed = modules(shape)
    wide = copy.deepcopy(composed).double()
    x, *_, grad_s = make(shape, 3, dtype, last=last)
    s, grad_x, _ = run(fused, x, grad_s)
    wanted_s, wanted_x, _ = run(composed, x, grad_s)
    exact_s, exact_x, _ = run(wide, x.double(), grad_s.double())
    if dtype == torch.float32:
        assert torch.equal(s.double(), exact_s)
        # torch's norm rounds by the machine's vectors: rarely, a spike of the two modules moves
        others = [d for d in range(s.dim()) if d != 2]
        same = (wanted_s == s).sum(others) == s.numel() // s.shape[2]
        assert same.float().mean() > 0.9
        wanted_s, wanted_x = wanted_s[:, :, same], wanted_x[:, :, same]
        s, grad_x, exact_x = s[:, :, same], grad_x[:, :, same], exact_x[:, :, same]
    assert torch.equal(s, wanted_s)
    bound = 2 * error(wanted_x, exact_x)
    assert 0 < error(grad_x, exact_x) <= bound
    if dtype == torch.float32:
        assert bound < 1e-5 * exact_x.norm()
    for (name, got), wanted in zip(fused.named_buffers(), composed.buffers(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": {"affine": False}, "learn_threshold": False},
        {"norm": {"momentum": None}, "learn_leak": False, "learn_threshold": False},
        {"norm": {"momentum": 0.3, "eps": 0.1}, "channels": 6, "reset": "hard"},
        {"surrogate": "sigmoid", "surrogate_scale": 2.0, "backend": "cpu"},
    ],
    ids=["not affine", "running mean", "eps, channels", "scale"],
)
def test_the_module_follows_its_parts(options):
    shape = SHAPES["rows of whole vectors"]
    fused, composed = modules(shape, **options)
    for timesteps in (2, 1):  # the second time on other running statistics
        x, *_, grad_s = make(shape, timesteps)
        s, grad_x, grads = run(fused, x, grad_s)
        wanted_s, wanted_x, wanted = run(composed, x, grad_s)
        assert torch.equal(s, wanted_s)
        torch.testing.assert_close(grad_x, wanted_x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(composed.named_buffers()))


def test_any_layout_of_x_and_grad_s():
    shape = SHAPES["rows of whole vectors"]
    x, *_, grad_s = make(shape, 3)
    one = grad_s[:1].expand(3, *shape)
    turned = grad_s.transpose(-1, -2).contiguous().transpose(-1, -2)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    same = x[:1].expand(3, *shape)
    padded = torch.cat([x, x], dim=1)[:, : shape[0]]
    for current, grad in ((x, one), (x, turned), *((t, grad_s) for t in (strided, transposed))):
        check_layout(shape, current, grad)
    for current in (same, padded):
        check_layout(shape, current, one)


def check_layout(shape, x, grad_s):
    fused, _ = modules(shape)
    again, _ = modules(shape)
    got, wanted = run(fused, x, grad_s), run(again, x.contiguous(), grad_s.contiguous())
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-5, atol=1e-5)


def test_autocast_runs_the_kernel_on_bfloat16():
    fused, composed = modules((2, 6, 8, 8))
    conv = nn.Conv2d(3, 6, 3, padding=1)
    x = torch.randn(4, 3, 8, 8)
    grads = []
    for module in (fused, composed):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            s = module(conv(x).unflatten(0, (2, 2)))
        assert s.dtype == torch.bfloat16
        s.float().square().mean().backward()
        grads.append(conv.weight.grad.clone())
        assert module.norm.weight.grad.dtype == torch.float32
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-3)


def test_parameters_in_bfloat16():
    fused, composed = modules((2, 6, 8, 8))
    fused.bfloat16()
    composed.bfloat16()
    x, *_, grad_s = make((2, 6, 8, 8), 2, torch.bfloat16)
    got, wanted = run(fused, x, grad_s), run(composed, x, grad_s)
    assert torch.equal(got[0], wanted[0])
    assert all(grad.dtype == torch.bfloat16 for grad in got[2])
    torch.testing.assert_close(got[2], wanted[2], rtol=0.05, atol=0.1)
    torch.testing.assert_close(fused.norm.running_var, composed.norm.running_var)


def everything(dtype):
    found = []
    for shape, last in ((SHAPES["several chunks"], False), (LAST["columns, several chunks"], True)):
        for timesteps in (1, 4):
            *tensors, grad_s = make(shape, timesteps, dtype, last=last, channels=True)
            s, mean, var, rstd = forward(*tensors, 1e-5, *how(surrogate="atan"))
            found += [s, mean, var, rstd]
            x, *parameters = tensors
            found += backward(grad_s, x, mean, rstd, *parameters, *how(surrogate="atan"))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_bits_do_not_depend_on_the_instruction_set(level, dtype, capability):
    capability(level)
    found = everything(dtype)
    capability("portable")
    assert all(torch.equal(p, q) for p, q in zip(found, everything(dtype), strict=True))


def test_bits_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(torch.float32)
        for count in (2, 5):
            torch.set_num_threads(count)
            many = everything(torch.float32)
            assert all(torch.equal(p, q) for p, q in zip(one, many, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_every_spike_of_its_channel(dtype):
    x, *rest, _ = make((2, 3, 4, 4), 2, dtype)
    x[0, 1, 2, 3, 1] = math.nan
    s, mean, *_ = forward(x, *rest, 1e-5, *how())
    assert mean.isnan().tolist() == [False, False, True]
    assert s[:, :, 2].isnan().all()
    assert not s[:, :, :2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_parameter_may_be_any_nan(dtype):
    x, weight, bias, *rest, _ = make((2, 4, 4, 4), 2, dtype)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)
    for parameter in (weight, bias):
        kept = parameter.clone()
        parameter[:3] = bits.view(torch.float32)
        s, *_ = forward(x, weight, bias, *rest, 1e-5, *how())
        assert s[:, :, :3].isnan().all()
        assert not s[:, :, 3].isnan().any()
        parameter.copy_(kept)


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
