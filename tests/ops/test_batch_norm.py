"""The compiled ops of BatchNorm and LIF in one: values, bits, gradients, registration."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import iirsnn._C
from iirsnn.ops import reference
from tests import lif_cases
from tests.ops.batch_norm_inputs import EVERY_SHAPE, LAST, SHAPES, how, make, modules, run

forward = torch.ops.iirsnn.bn_lif_forward
backward = torch.ops.iirsnn.bn_lif_backward
LEVELS = ("portable", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16)


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
