"""Every CUDA kernel compiled to PTX and executed on the CPU, through the project's launchers.

The emulator checks every access against the bounds and alignment of its array, and counts bytes.
"""

import itertools

import pytest
import torch

from iirsnn.ops.backend import why_not
from iirsnn.ops.reference import RESETS, lif_forward
from iirsnn.ops.surrogates import SURROGATES
from tests import lif_cases
from tests.lif_cases import CASES, FEW, Case, inputs, options
from tests.ptx.conftest import EVERY

ARCHITECTURES = [(90, case) for case in CASES] + [(a, case) for a in (80, 100) for case in FEW]
FLOATS = torch.float32, torch.float16, torch.bfloat16


def on_kernels(few, name, value):
    """A test of a value and the key of KERNELS it takes: all that there are make it slow."""
    marks = () if few else pytest.mark.slow
    return pytest.param(value, 90 if few else EVERY, id=name, marks=marks)


def every_t():
    """T with kernels of its own and any T in packets, any T neuron by neuron; each reset."""
    shapes = [*((t, 24) for t in (*range(2, 9), 18)), (18, 25)]
    for i, dtype in enumerate(FLOATS):
        for k, (t, n) in enumerate(shapes):
            for reset in RESETS:
                few = reset == RESETS[k % 4] if i == 0 else reset == "soft" and k % 2 == i - 1
                name = f"T={t} N={n} {dtype} {reset}"
                case = Case(name, (t, n), "contiguous", dtype, reset, detach=False, v0=True)
                yield on_kernels(few, name, case)


@pytest.fixture
def launchers(all_launchers):
    yield (sm_90 := all_launchers[90])
    sm_90.take()


def named(architectures):
    """To compile for an architecture takes minutes: others than sm_90 are slow."""
    cases = [
        pytest.param(
            *(arch, case),
            id=f"sm_{arch} {case.name}",
            marks=() if arch == 90 else pytest.mark.slow,
        )
        for arch, case in architectures
    ]
    return pytest.mark.parametrize(("arch", "case"), cases)


@named(ARCHITECTURES)
def test_forward(all_launchers, arch, case):
    lif_cases.check_forward(case, all_launchers[arch].ops)
    assert all_launchers[arch].take() or 0 in case.shape


@named(ARCHITECTURES)
def test_backward(all_launchers, arch, case):
    lif_cases.check_backward(case, all_launchers[arch].ops)
    assert len(all_launchers[arch].take()) == (0 not in case.shape)  # sums included


@named(ARCHITECTURES)
def test_packed(all_launchers, arch, case):
    lif_cases.check_packed(case, all_launchers[arch].ops)
    assert all_launchers[arch].take() or 0 in case.shape


@pytest.mark.parametrize(("case", "kernels"), [*every_t()])
def test_every_t(all_launchers, case, kernels):
    launchers = all_launchers[kernels]
    lif_cases.check_forward(case, launchers.ops)
    lif_cases.check_backward(case, launchers.ops)
    assert len({name for name, _ in launchers.take()}) == 2


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(launchers, timesteps):
    lif_cases.check_special_values(launchers.ops, timesteps)


@pytest.mark.parametrize("reset", RESETS)
def test_split(launchers, reset):
    lif_cases.check_split(launchers.ops, reset)


def test_repeats(launchers):
    lif_cases.check_repeats(launchers.ops)


@pytest.mark.parametrize("kernels", [90, pytest.param(EVERY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_same_bits_as_the_cpu_kernels(all_launchers, surrogate, kernels):
    """Not the sums over neurons: those are taken in another order."""
    if (reason := why_not("cpu", "cpu")) is not None:
        pytest.skip(reason)
    launchers = all_launchers[kernels]
    for dtype, reset in itertools.product(FLOATS, RESETS):
        if kernels != EVERY and dtype != torch.float32 and reset != "soft":
            continue
        case = Case("same", (9, 2, 40), "contiguous", dtype, reset, False, surrogate, v0=True)
        a = inputs(case)
        call = (a.grad_s, None, a.x, a.threshold, a.leak, a.v0, *options(case), False)
        got, wanted = launchers.ops.backward(*call), torch.ops.iirsnn.lif_backward(*call)
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True)), case
    launchers.take()


@pytest.mark.parametrize(
    ("reset", "kernels"), [on_kernels(reset == "soft", reset, reset) for reset in RESETS]
)
@pytest.mark.parametrize("neurons", [36, 35])
def test_float64(all_launchers, reset, neurons, kernels):
    launchers = all_launchers[kernels]
    case = Case("float64", (10, 2, neurons), reset=reset, detach=False, v0=True, grad_v=True)
    a = inputs(case)
    a.x, a.threshold, a.leak, a.v0 = (t.double() for t in (a.x, a.threshold, a.leak, a.v0))
    a.grad_s, a.grad_v = a.grad_s.double(), a.grad_v.double()
    call = (a.x, a.threshold, a.leak, a.v0, *options(case), True)
    for got, wanted in zip(launchers.ops.forward(*call), lif_forward(*call), strict=True):
        assert torch.equal(got, wanted)
    gradients = launchers.ops.backward(a.grad_s, a.grad_v, *call)
    for got, wanted in zip(gradients, lif_cases.reference_gradients(case, a), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    launchers.take()


# ---- bytes


def moved(launches, kind):
    """Bytes of each array, over all launches; the parameters are a few, read from cache."""
    total = {}
    for _, stats in launches:
        for name, counts in stats.by_array.items():
            if counts[f"{kind}_bytes"] and name not in ("threshold", "leak"):
                total[name] = total.get(name, 0) + counts[f"{kind}_bytes"]
    return total


def in_packets(launches, arrays, width=16):
    """Every access to these arrays moves `width` bytes, and a warp's accesses are neighbours."""
    for _, stats in launches:
        for name in arrays & stats.by_array.keys():
            counts = stats.by_array[name]
            for kind in ("ld", "st"):
                assert counts[f"{kind}_bytes"] == width * counts[f"{kind}_threads"]
                assert counts[f"{kind}_bytes"] == 32 * counts[f"{kind}_sectors"]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("timesteps", [1, 2, 5, 9, 17])
def test_bytes(launchers, timesteps, dtype):
    neurons = 2048
    case = Case("bytes", (timesteps, 2, neurons // 2), dtype=dtype)
    a = inputs(case)
    parameters = (a.threshold, a.leak)
    row, all_rows = neurons * dtype.itemsize, timesteps * neurons * dtype.itemsize

    s, _ = launchers.ops.forward(a.x, *parameters, None, *options(case), False)
    forward = launchers.take()
    assert moved(forward, "ld") == {"x": all_rows}
    assert moved(forward, "st") == {"s": all_rows}

    bits, _ = launchers.ops.packed(a.x, *parameters, None, *options(case)[:2], False)
    packed = launchers.take()
    assert moved(packed, "ld") == {"x": all_rows}
    assert moved(packed, "st") == {"bits": timesteps * neurons // 8}

    launchers.ops.unpack(bits, list(s.shape), list(s.stride()), dtype)
    unpack = launchers.take()
    assert moved(unpack, "ld") == {"bits": timesteps * neurons // 8}
    assert moved(unpack, "st") == {"s": all_rows}

    launchers.ops.backward(a.grad_s, None, a.x, *parameters, None, *options(case), False)
    backward = launchers.take()
    segments = -(-timesteps // 8)
    again = (segments - 1) * 8 * row  # the timesteps before the last segment
    checkpoints = max(0, segments - 2) * neurons * 4
    assert moved(backward, "ld") == {"x": all_rows + again, "grad_s": all_rows} | (
        {"workspace": checkpoints} if checkpoints else {}
    )
    assert moved(backward, "st") == {"grad_x": all_rows} | (
        {"workspace": checkpoints} if checkpoints else {}
    )
    arrays = {"x", "s", "grad_s", "grad_x"}
    in_packets([*forward, *packed, *unpack], arrays)
    half = dtype != torch.float32 and timesteps > 6  # eight neurons take too much shared memory
    in_packets(backward, arrays, width=8 if half else 16)
    if timesteps <= 8:
        both = sum(sum(moved(forward + backward, kind).values()) for kind in ("ld", "st"))
        assert both == 5 * timesteps * dtype.itemsize * neurons


def test_bytes_of_membranes(launchers):
    """v0 and v are one read and one write."""
    neurons = 2048
    a = inputs(case := Case("membranes", (5, 2, neurons // 2), v0=True, grad_v=True))
    launchers.ops.forward(a.x, a.threshold, a.leak, a.v0, *options(case), True)
    forward = launchers.take()
    assert moved(forward, "ld") == {"x": 20 * neurons, "v0": 4 * neurons}
    assert moved(forward, "st") == {"s": 20 * neurons, "v": 4 * neurons}
    parameters = (a.threshold, a.leak)
    launchers.ops.backward(a.grad_s, a.grad_v, a.x, *parameters, a.v0, *options(case), False)
    backward = launchers.take()
    read = {"x": 20 * neurons, "grad_s": 20 * neurons, "v0": 4 * neurons, "grad_v": 4 * neurons}
    assert moved(backward, "ld") == read
    assert moved(backward, "st") == {"grad_x": 20 * neurons, "grad_v0": 4 * neurons}
    in_packets(
        [*forward, *backward], {"x", "s", "v0", "v", "grad_s", "grad_v", "grad_x", "grad_v0"}
    )


@pytest.mark.parametrize("timesteps", [5, 20])
def test_same_current_and_gradient_are_read_once(launchers, timesteps):
    neurons = 2048
    a = inputs(case := Case("same", (timesteps, 2, neurons // 2), "same"))
    launchers.ops.forward(a.x, a.threshold, a.leak, None, *options(case), False)
    assert moved(launchers.take(), "ld") == {"x": 4 * neurons}
    grad_s = a.grad_s[:1].expand(a.x.shape)
    launchers.ops.backward(grad_s, None, a.x, a.threshold, a.leak, None, *options(case), False)
    read, segments = moved(launchers.take(), "ld"), -(-timesteps // 8)
    assert {name: read[name] for name in ("x", "grad_s")} == {
        "x": 4 * neurons * (2 * segments - 1),  # once a segment, on the way there and back
        "grad_s": 4 * neurons * segments,
    }


def test_odd_rows_are_read_by_neighbours(launchers):
    """Off 16 bytes: one neuron a lane, and a warp touches at most one sector more than it must."""
    a = inputs(case := Case("odd", (5, 2, 1023)))
    launchers.ops.forward(a.x, a.threshold, a.leak, None, *options(case), False)
    ((_, stats),) = launchers.take()
    for name, kind in (("x", "ld"), ("s", "st")):
        counts = stats.by_array[name]
        assert counts[f"{kind}_bytes"] == a.x.nbytes
        assert counts[f"{kind}_sectors"] <= a.x.nbytes / 32 + counts[f"{kind}_requests"]


# ---- sums over many blocks

MANY_BLOCKS = [
    Case("one parameter", (2, 4, 5000)),
    Case("short rows", (1, 60, 3, 7, 7), threshold_channels=True, leak_channels=True),
    Case("long rows", (2, 3, 5, 30, 31), threshold_channels=True, leak_channels=True),
    Case("odd columns", (2, 2400, 131), threshold_channels=True),
    Case("columns", (1, 2401, 132), threshold_channels=True),
    Case("columns of 16 bits", (2, 2401, 132), dtype=torch.bfloat16, threshold_channels=True),
    Case("unaligned", (1, 18, 160, 20, 20), "unaligned", threshold_channels=True),
    Case("one parameter, unaligned", (1, 1100, 1000), "unaligned"),
]


@pytest.mark.parametrize("case", MANY_BLOCKS, ids=lambda case: case.name)
def test_many_blocks(launchers, case):
    lif_cases.check_backward(case, launchers.ops)
    ((_, backward),) = launchers.take()
    assert backward.blocks <= max(2048, case.shape[2])
    read = backward.by_array.get("workspace", {"ld_bytes": 0})["ld_bytes"]
    assert read <= 2**20 * 17 // 16  # the sums of every block, and of every 32 blocks


# ---- ordering


def gradients(launchers, case):
    a = inputs(case)
    how = options(case)
    bits, _ = launchers.ops.packed(a.x, a.threshold, a.leak, a.v0, *how[:2], False)
    return bits, *launchers.ops.backward(
        *(a.grad_s, a.grad_v, a.x, a.threshold, a.leak, a.v0, *how, True)
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(5, 4, 6, 9, 12), (1, 3, 5, 7, 11)], ids=str)
def test_any_order_of_warps(launchers, shape, layout):
    """A missing barrier would show: warps run in random order, each until it must wait."""
    case = Case("order", shape, layout, threshold_channels=True, leak_channels=True)
    wanted = gradients(launchers, case)
    for seed in range(3):
        launchers.rt.options.update(sched="warp", seed=seed, order="random")
        try:
            got = gradients(launchers, case)
        finally:
            launchers.rt.options.clear()
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))
