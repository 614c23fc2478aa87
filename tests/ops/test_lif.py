"""The compiled CPU ops, called directly: values, bits, shapes, registration."""

import itertools
import math

import pytest
import torch
from torch.library import opcheck

import iirsnn._C
from iirsnn.ops import reference
from tests import lif_cases
from tests.lif_cases import CASES, Case, Implementation, inputs, options

OPS = Implementation.of("")
LEVELS = ("portable", "avx2", "avx512")


def ids(case):
    return case.name


@pytest.fixture(params=LEVELS)
def level(request):
    """Each instruction set this processor has, in force."""
    before = iirsnn._C.build_info()["cpu_capability"]
    try:
        iirsnn._C.set_cpu_capability(request.param)
    except ValueError:
        pytest.skip(f"this processor lacks {request.param}; run on one that has it")
    yield request.param
    iirsnn._C.set_cpu_capability(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_forward_equals_the_reference(case):
    lif_cases.check_forward(case, OPS)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_backward_is_near_the_float64_reference(case):
    lif_cases.check_backward(case, OPS)


@pytest.mark.parametrize("channels", [False, True])
def test_gradients_of_parameters_are_sums_over_all_chunks(channels):
    case = lif_cases.Case(
        "many", (2, 3, 40, 500), threshold_channels=channels, leak_channels=channels
    )
    lif_cases.check_backward(case, OPS)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_packed_equals_the_reference(case):
    lif_cases.check_packed(case, OPS)


@pytest.mark.parametrize("reset", reference.RESETS)
def test_a_split_sequence_equals_the_whole(reset):
    lif_cases.check_split(OPS, reset)


def test_parameter_gradients_repeat():
    lif_cases.check_repeats(OPS)


def test_wrong_arguments_are_refused():
    lif_cases.check_refused(OPS)


def every_way(dtype, timesteps, v0, shape=(2, 3, 5, 7)):
    """x, threshold [3], leak [3], v0 or None: odd N, per channel."""
    rng = torch.Generator().manual_seed(timesteps)
    acc = reference.acc_dtype(dtype)
    x = (torch.randn(timesteps, *shape, generator=rng, dtype=acc) + 0.3).to(dtype)
    threshold = torch.tensor([0.7, 0.9, 1.2], dtype=acc)
    leak = torch.tensor([1.0, 0.9, 0.5], dtype=acc)
    return x, threshold, leak, torch.randn(shape, generator=rng, dtype=acc) if v0 else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reset", reference.RESETS)
def test_spikes_and_membranes_equal_the_reference_bit_for_bit(level, reset, dtype):
    for timesteps, v0 in itertools.product((*range(1, 10), 16, 17, 40), (False, True)):
        arguments = (*every_way(dtype, timesteps, v0), reset, 0.125, True, "triangle", 0.3, True)
        s, v = OPS.forward(*arguments)
        s_ref, v_ref = reference.lif_forward(*arguments)
        assert torch.equal(s, s_ref), timesteps
        assert torch.equal(v, v_ref), timesteps


def test_the_kernels_bits_do_not_depend_on_the_instruction_set():
    def everything():
        found = []
        for case in CASES:
            a = inputs(case)
            arguments = (a.x, a.threshold, a.leak, a.v0)
            found += OPS.forward(*arguments, *options(case), True)
            found += OPS.backward(a.grad_s, a.grad_v, *arguments, *options(case), True)
        return found

    before = iirsnn._C.build_info()["cpu_capability"]
    if before == "portable":
        pytest.skip("this processor has neither AVX2 nor AVX-512; run on one that has")
    results = {}
    for name in LEVELS[: LEVELS.index(before) + 1]:
        iirsnn._C.set_cpu_capability(name)
        results[name] = everything()
    assert iirsnn._C.build_info()["cpu_capability"] == before
    for name in results:
        for got, wanted in zip(results[name], results["portable"], strict=True):
            assert torch.equal(got, wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("timesteps", [1, 17])
def test_results_of_32_mib_are_those_of_their_parts(level, timesteps, dtype):
    """From there on kernels write past the caches, parts of them do not."""
    neurons = 2**25 // dtype.itemsize // timesteps // 64 * 64 + 64
    rng = torch.Generator().manual_seed(0)
    both = torch.randn(2, 4099, generator=rng).repeat(1, timesteps * neurons // 4099 + 1)
    both = both[:, : timesteps * neurons].to(dtype).view(2, timesteps, neurons)
    parameters = (torch.ones(1), torch.tensor([0.5]), None, "soft", 0.0, False, "triangle", 0.3)

    def results(x, grad_s):
        s = OPS.forward(x, *parameters, False)[0]
        return s, OPS.backward(grad_s, None, x, *parameters, False)[0]

    whole = results(*both)
    for part in (slice(0, neurons // 2), slice(neurons // 2, None)):
        for got, wanted in zip(whole, results(*both[..., part].contiguous()), strict=True):
            assert torch.equal(got[:, part], wanted)


# Relative, of an element or of the largest one: the roundings of up to 35 timesteps. fast_sigmoid
# is so steep (its slope changes by 2 a = 50 in one threshold) that it makes five times as much of
# them.
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
@pytest.mark.parametrize("reset", reference.RESETS)
def test_gradients_equal_the_references_autograd(reset, surrogate, detach, dtype):
    scale = reference.SURROGATES[surrogate][1]
    how = (reset, 0.125, detach, surrogate, scale)
    tolerance = GRADIENT_TOLERANCE[dtype] * (5 if surrogate == "fast_sigmoid" else 1)
    for timesteps, v0 in itertools.product((1, 2, 8, 35), (False, True)):
        inputs = every_way(torch.float64, timesteps, v0)
        inputs = [None if t is None else t.to(dtype) for t in inputs]
        rng = torch.Generator().manual_seed(7)
        grad_s = torch.randn(inputs[0].shape, generator=rng, dtype=dtype)
        grad_v = torch.randn(inputs[0].shape[1:], generator=rng, dtype=dtype)
        got = OPS.backward(grad_s, grad_v, *inputs, *how, True)
        wide = [None if t is None else t.double().requires_grad_() for t in inputs]
        outputs = reference.lif_forward(*wide, *how, True)
        if dtype == torch.float32:  # a spike that rounding moved would be no error of the gradient
            s = reference.lif_forward(*inputs, *how, False)[0]
            assert torch.equal(s.double(), outputs[0].detach())
        wanted = torch.autograd.grad(
            outputs,
            [t for t in wide if t is not None],
            [grad_s.double(), grad_v.double()],
            allow_unused=True,
        )
        for g, w in zip(got, wanted, strict=False):
            w = torch.zeros_like(g).double() if w is None else w
            largest = max(1.0, w.abs().max().item())
            torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_err_at_most_twice_as_much_as_torchs(dtype):
    x, threshold, leak, _ = every_way(dtype, 6, False, (4, 3, 64))
    grad_s = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    how = (None, "soft", 0.0, True, "atan", 2.0)
    got = OPS.backward(grad_s, None, x, threshold, leak, *how, True)[0].double()

    def by_autograd(t):
        x_t = x.to(t).requires_grad_()
        parameters = (p.to(reference.acc_dtype(t)) for p in (threshold, leak))
        s, _ = reference.lif_forward(x_t, *parameters, *how, False)
        return torch.autograd.grad(s, x_t, grad_s.to(t))[0].double()

    exact = by_autograd(torch.float64)
    bound = 2 * (by_autograd(dtype) - exact).abs().max()
    assert 0 < bound < 0.05
    assert (got - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_is_read_and_rounded_as_torch_does(level, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, -1)
    one = torch.ones(1)
    # without reset the membrane is the current itself
    _, v = OPS.forward(every, one, one, None, "none", 0.0, True, "triangle", 0.3, True)
    assert torch.equal(
        v.nan_to_num(7.0, math.inf, -math.inf),
        every[0].float().nan_to_num(7.0, math.inf, -math.inf),
    )
    # a boxcar's slope is one number at the threshold: grad_x is a product to be rounded
    for timesteps, scale in itertools.product((1, 2), (0.3, 1.7, 400.0, 1e-3)):
        grad_s = every.expand(timesteps, -1).contiguous()
        x = torch.ones_like(grad_s)
        x[1:] = 0.0
        how = (None, "none", 0.0, True, "boxcar", scale)
        got = OPS.backward(grad_s, None, x, one, one, *how, False)[0][-1]
        wanted = (every[0].float() * (torch.tensor(0.5) / torch.tensor(scale))).to(dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_results_do_not_depend_on_the_number_of_threads(threads):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, 6, 60, 60, generator=rng)  # N = 172800: several chunks
    grad_s = torch.randn(x.shape, generator=rng)
    threshold, leak = torch.linspace(0.8, 1.2, 6), torch.linspace(0.5, 1.0, 6)
    how = ("soft", 0.0, False, "sigmoid", 4.0)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        s, v = OPS.forward(x, threshold, leak, None, *how, True)
        results.append((s, v, *OPS.backward(grad_s, None, x, threshold, leak, None, *how, True)))
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


# [B, C, H, W], channels innermost: blocks of one channel, of some, of all; channels wide enough to
# be pieces of a block, and not; one neuron a channel, in passes that fill blocks and that do not.
MAPS = [
    ((3, 64, 28, 28), False),
    ((3, 64, 14, 14), False),
    ((9, 64, 7, 7), False),
    ((1, 64, 149, 149), False),
    ((40, 64, 5, 3), False),
    ((5, 3, 28, 28), False),
    ((5, 3, 14, 14), False),
    ((20, 3, 7, 7), False),
    ((1, 3, 149, 149), False),
    ((60, 3, 5, 3), False),
    ((2, 512, 7, 7), False),
    ((4, 10, 16, 8), False),  # of whole vectors, just wide
    ((9, 30, 15, 15), False),  # of no whole vectors, in several chunks
    ((40, 256, 2, 2), False),
    ((9, 600, 2, 2), False),
    ((2000, 10, 1, 1), False),
    ((40, 1000, 1, 1), False),
    ((3, 100, 14, 14), True),
    ((5, 64, 20, 20), True),
    ((2, 16, 56, 56), False),  # longer than a block, of whole cache lines, and not
    ((2, 7, 50, 50), False),
]
# In columns of some passes over all channels: two of them at once past a row, the third of three;
# passes that are no whole words, of which one is left; maps below a vector; many channels.
MANY = [
    ((180, 64, 7, 7), False),
    ((12, 256, 14, 14), False),
    ((9, 512, 7, 7), False),
    ((35, 512, 7, 7), False),
    ((33, 512, 4, 4), False),
    ((200, 512, 2, 2), False),
    ((45, 100, 7, 7), False),
    ((3, 1400, 7, 7), False),
    ((4, 2048, 7, 7), False),
    ((333, 64, 2, 2), False),
    ((70, 20, 7, 7), False),
    ((1001, 10, 1, 1), False),
    ((135, 65, 7, 7), False),
]


def on_map(shape, last, timesteps):
    """x, threshold, leak, None, and grad_s; x and leak so that float32 holds every membrane."""
    rng = torch.Generator().manual_seed(timesteps)

    def laid(t):
        if last:
            t = t.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, t.shape[:2])
        return t

    size = (timesteps, *shape)
    x = (torch.randint(-128, 256, size, generator=rng) + 0.5) / 128
    channel = torch.arange(shape[1])
    threshold, leak = 0.75 + channel % 7 / 16, 0.5 ** (channel % 3)
    return laid(x), threshold, leak, None, laid(torch.randn(size, generator=rng))


# Neurons go through three timesteps in registers where the reset is detached, else row by row.
ANY_SIZE = [
    *itertools.product(MAPS, [(1, True), (3, True), (3, False)]),
    *itertools.product(MANY, [(1, True), (2, True), (5, True)]),
]


@pytest.mark.parametrize(("map_", "time"), ANY_SIZE, ids=str)
def test_parameters_of_channels_on_maps_of_any_size(level, map_, time):
    (shape, last), (timesteps, detach) = map_, time
    *arguments, grad_s = on_map(shape, last, timesteps)
    x, threshold, leak, _ = arguments
    how = ("soft", 0.0, detach, "triangle", 1.0)
    s, _ = OPS.forward(*arguments, *how, False)
    assert torch.equal(s, reference.lif_forward(*arguments, *how, False)[0])
    got = OPS.backward(grad_s, None, *arguments, *how, True)
    for c in range(0, shape[1], max(1, shape[1] // 5)):  # a channel alone, with scalar parameters
        one = (grad_s[:, :, c].contiguous(), None, x[:, :, c].contiguous())
        alone = OPS.backward(*one, threshold[c : c + 1], leak[c : c + 1], None, *how, False)[0]
        assert torch.equal(got[0][:, :, c], alone)
    wide = (None if t is None else t.double() for t in (grad_s, None, *arguments))
    wanted = OPS.backward(*wide, *how, True)
    for sums, exact in zip(got[1:3], wanted[1:3], strict=True):
        terms = x.numel() // shape[1]
        bounds = {"rtol": 1e-5, "atol": 1e-6 * math.sqrt(terms)}
        torch.testing.assert_close(sums.double(), exact, **bounds)


@pytest.mark.parametrize(("timesteps", "detach"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize(("shape", "last"), MAPS, ids=str)
def test_one_parameter_of_channels_beside_a_scalar(shape, last, timesteps, detach):
    x, threshold, leak, v0, grad_s = on_map(shape, last, timesteps)
    how = ("soft", 0.0, detach, "triangle", 1.0)
    for some in ((threshold, leak[1:2].contiguous()), (threshold[1:2].contiguous(), leak)):
        every = [p.expand(shape[1]).contiguous() for p in some]
        s, _ = OPS.forward(x, *some, v0, *how, False)
        assert torch.equal(s, reference.lif_forward(x, *every, v0, *how, False)[0])
        got = OPS.backward(grad_s, None, x, *some, v0, *how, True)
        wanted = OPS.backward(grad_s, None, x, *every, v0, *how, True)
        assert torch.equal(got[0], wanted[0])
        for g, w, p in zip(got[1:3], wanted[1:3], some, strict=True):
            bounds = {"rtol": 1e-5, "atol": 1e-6 * math.sqrt(x.numel())}
            torch.testing.assert_close(g.double(), w.double().sum_to_size(p.shape), **bounds)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize(("shape", "last"), MAPS + MANY, ids=str)
def test_sums_on_maps_depend_on_neither_instruction_set_nor_threads(threads, shape, last, detach):
    *arguments, grad_s = on_map(shape, last, 1 if (shape, last) in MANY else 3)
    before = iirsnn._C.build_info()["cpu_capability"]
    found = []
    for name in LEVELS[: LEVELS.index(before) + 1]:
        iirsnn._C.set_cpu_capability(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            how = ("soft", 0.0, detach, "triangle", 1.0, True)
            found.append(OPS.backward(grad_s, None, *arguments, *how)[:3])
    assert iirsnn._C.build_info()["cpu_capability"] == before
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


# float32 holds each term exactly, and the sum of some ten, but not that of a vector's lane over a
# block: in double all of them add up without an error.
@pytest.mark.parametrize("timesteps", [1, 2, 5, 8])
@pytest.mark.parametrize("channels", [False, True], ids=["scalar", "per channel"])
@pytest.mark.parametrize(("shape", "last"), MAPS[:5] + MAPS[-2:] + MANY[:1], ids=str)
def test_gradients_of_parameters_are_summed_in_double(shape, last, channels, timesteps):
    for largest, which in ((2**12, 1), (2**9, 2)):
        x, grad_s = lif_cases.exact_terms((timesteps, *shape), last, largest)
        one = torch.ones(shape[1] if channels else 1)
        how = ("soft", 0.0, True, "triangle", 1.0, True)
        got = OPS.backward(grad_s, None, x, one, one, None, *how)[which]
        wide = (grad_s.double(), None, x.double(), one.double(), one.double(), None)
        wanted = OPS.backward(*wide, *how)[which]
        assert torch.equal(got, wanted.float())


def test_a_scalar_beside_a_per_channel_parameter_gets_one_gradient():
    x, threshold, leak, _ = every_way(torch.float64, 5, False)
    grad_s = torch.ones_like(x)
    how = (None, "soft", 0.0, True, "triangle", 0.3, True)
    one = leak[1:2].contiguous()
    got = OPS.backward(grad_s, None, x, threshold, one, *how)
    spread = OPS.backward(grad_s, None, x, threshold, one.expand(3).contiguous(), *how)
    assert got[2].shape == (1,)
    torch.testing.assert_close(got[2], spread[2].sum(0, keepdim=True))
    assert torch.equal(got[1], spread[1])


# Of scalar parameters, of channels narrow and wide, of one neuron each: thresholds that a half
# holds and that it does not, the least and the largest.
FIRING = [(1, 1, 65536), (64, 16, 64), (2, 8, 4096), (4096, 16, 1)]


@pytest.mark.parametrize("shape", FIRING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_value_fires_as_in_the_reference(level, dtype, shape):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every.view(1, *shape)
    thresholds = [1.0, 0.7501, 2.0**-126, 1e-40, 3e38, 0.1, 65504.0, 1.0 + 2.0**-20]
    for first in range(len(thresholds) if shape[1] == 1 else 1):
        threshold = torch.tensor(thresholds * 2).roll(-first)[: shape[1]]
        how = (None, "soft", 0.0, True, "triangle", 1.0, False)
        s, _ = OPS.forward(x, threshold, torch.ones(1), *how)
        wanted, _ = reference.lif_forward(x, threshold, torch.ones(1), *how)
        assert torch.equal(s.isnan(), wanted.isnan())
        assert torch.equal(s.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_special_values():
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1.0 + 2.0**-23])
    one = torch.ones(1)
    for timesteps in (1, 3):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            x_t = x.to(dtype).expand(timesteps, -1)
            acc = one.to(reference.acc_dtype(dtype))
            s, _ = OPS.forward(x_t, acc, acc, None, "hard", 0.0, True, "triangle", 0.3, False)
            fine = dtype in (torch.float32, torch.float64)
            assert s[:, 0].isnan().all()
            assert s[0, 1:].tolist() == [1, 0, 0, 1 if fine else 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 63, 700, 1024, -1])
@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("channels", [1, 64])
def test_nan_cannot_be_packed(timesteps, position, dtype, channels):
    x = torch.zeros(timesteps, 1025 if channels == 1 else 100, channels, dtype=dtype)
    one = torch.ones(channels, dtype=reference.acc_dtype(dtype))
    OPS.packed(x, one, one, None, "soft", 0.0, False)
    x[-1].view(-1)[position] = math.nan
    with pytest.raises(ValueError, match="packed: expected a current without NaN, got NaN"):
        OPS.packed(x, one, one, None, "soft", 0.0, False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": torch.zeros(1)}, ValueError, "threshold: expected finite values > 0, got 0"),
        ({"threshold": torch.tensor([math.nan])}, ValueError, "threshold: expected finite"),
        ({"leak": torch.tensor([math.inf])}, ValueError, "leak: expected finite values, got inf"),
        ({"leak": torch.ones(2)}, ValueError, r"leak: expected 1-D with 1 element, or C .* \[2\]"),
        ({"leak": torch.ones(1).double()}, TypeError, "leak: expected Float for x of Float, got"),
        ({"v0": torch.ones(5)}, ValueError, r"v0: expected shape \[4, 3\], got \[5\]"),
        ({"v0": torch.ones(4, 3).half()}, TypeError, "v0: expected Float for x of Float, got Half"),
        ({"x": torch.ones(0, 4, 3)}, ValueError, r"x: expected shape \[T, \*neurons\] with T >= 1"),
        ({"x": torch.ones(2, 4, 6)[..., ::2]}, ValueError, r"x: expected x\[0\] dense"),
        ({"x": torch.ones(2, 4, 3).int()}, TypeError, "x: expected float32, float64, float16 or"),
        ({"reset": "sharp"}, ValueError, "reset: expected soft, hard, .* got 'sharp'"),
        ({"surrogate": "spline"}, ValueError, "surrogate: expected triangle, .* got 'spline'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(change, error, message):
    good = {
        "x": torch.ones(2, 4, 3),
        "threshold": torch.ones(1),
        "leak": torch.ones(1),
        "v0": None,
        "reset": "soft",
        "v_reset": 0.0,
        "detach_reset": True,
        "surrogate": "triangle",
        "surrogate_scale": 0.3,
        "return_v": False,
    }
    OPS.forward(**good)
    with pytest.raises(error, match=message):
        OPS.forward(**good | change)


def test_unpack_refuses_bits_of_another_shape():
    with pytest.raises(ValueError, match=r"bits: expected uint8 \[2, 16\] for spikes"):
        OPS.unpack(torch.zeros(2, 8, dtype=torch.uint8), [2, 65], [65, 1], torch.float32)


OPCHECK_CASES = [
    Case("T=1", (1, 2, 3, 4)),
    Case("T=3", (3, 2, 3, 4), threshold_channels=True, leak_channels=True, v0=True),
    Case("channels_last", (2, 2, 3, 4, 4), "channels_last"),
    Case("same current", (3, 2, 4), "same"),
]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("case", OPCHECK_CASES, ids=ids)
def test_opcheck_forward(case, grad):
    a = inputs(case)
    tensors = [a.x.detach(), a.threshold, a.leak, a.v0]
    if grad:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    for return_v in (True, False):
        opcheck(OPS.forward.default, (*tensors, *options(case), return_v))


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=ids)
def test_opcheck_the_other_ops(case):
    a = inputs(case)
    tensors = (a.x, a.threshold, a.leak, a.v0)
    opcheck(OPS.backward.default, (a.grad_s, a.grad_v, *tensors, *options(case), True))
    opcheck(OPS.packed.default, (*tensors, "soft", 0.0, True))
    bits, _ = OPS.packed(*tensors, "soft", 0.0, False)
    stride = list(reference.empty_spikes(a.x).stride())
    opcheck(OPS.unpack.default, (bits, list(a.x.shape), stride, torch.float32))


def test_a_second_derivative_raises_one_clear_error():
    x = torch.rand(2, 5, requires_grad=True)
    one = torch.ones(1)
    s, _ = OPS.forward(x, one, one, None, "soft", 0.0, True, "triangle", 0.3, False)
    (grad_x,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="iirsnn: expected one backward pass through lif"):
        grad_x.sum().backward()
