"""BatchNorm and LIF in one, in CUDA and in Triton, executed from PTX on the CPU; bytes counted."""

import functools
import math

import pytest
import torch
from iirsnn.kernels import batch_norm, sums
from iirsnn.kernels import eager_batch_norm as eager
from iirsnn.kernels.launch import forget_plans

from iirsnn.ops.backend import why_not
from tests import bn_lif_cases
from tests.bn_lif_cases import (
    BN_CASES,
    BN_FEW,
    DTYPES,
    EPS,
    TOLERANCE,
    V_RESET,
    BnCase,
    BnImplementation,
    bn_inputs,
    bn_options,
    most_are_slow,
    wide_gradients,
)
from tests.ptx.bn_launchers import BnLaunchers
from tests.ptx.conftest import EVERY, KERNELS


def kernels_for(case):
    """The key of KERNELS that has those of a case for sm_90."""
    return 90 if case in BN_FEW else EVERY


ARCHITECTURES = [(kernels_for(case), case) for case in BN_CASES]
ARCHITECTURES += [(a, c) for a in (80, 100) for c in BN_FEW]
FEW = [(90, case) for case in BN_FEW]
TRITON = BnImplementation.of("triton_")


@pytest.fixture(scope="session")
def all_bn(all_launchers):
    """{a key of KERNELS: a function that returns its BnLaunchers}"""

    def of(arch):
        return functools.cache(lambda: BnLaunchers(all_launchers[arch]))

    return {arch: of(arch) for arch in KERNELS}


@pytest.fixture
def bn(all_bn):
    yield (sm_90 := all_bn[90]())
    sm_90.launchers.take()


def named(architectures):
    ids = [f"sm_{arch} {case.name}" for arch, case in architectures]
    return pytest.mark.parametrize("arch_and_case", most_are_slow(architectures, FEW), ids=ids)


@named(ARCHITECTURES)
def test_forward(all_bn, arch_and_case):
    arch, case = arch_and_case
    bn_lif_cases.check_bn_forward(case, all_bn[arch]().ops)
    all_bn[arch]().launchers.take()


@named(ARCHITECTURES)
def test_backward(all_bn, arch_and_case):
    arch, case = arch_and_case
    bn_lif_cases.check_bn_backward(case, all_bn[arch]().ops)
    all_bn[arch]().launchers.take()


@pytest.mark.parametrize(
    "case",
    most_are_slow([c for c in BN_CASES if c.dtype != torch.float16], BN_FEW),
    ids=lambda case: case.name,
)
def test_same_bits_as_the_cpu_kernels(all_bn, case):
    if (reason := why_not("cpu", "cpu")) is not None:
        pytest.skip(reason)
    bn = all_bn[kernels_for(case)]()
    bn_lif_cases.check_bn_same_bits(case, bn.ops, BnImplementation.of(""))
    bn.launchers.take()


def test_a_variance_far_below_the_mean(bn):
    bn_lif_cases.check_bn_far_mean(bn.ops)


def test_nan(bn):
    bn_lif_cases.check_bn_nan(bn.ops)


def run(ops, a, case):
    how = bn_options(case)
    s, mean, var, rstd = ops.forward(a.x, *a.parameters, EPS, *how)
    return s, mean, var, rstd, *ops.backward(a.grad_s, a.x, mean, rstd, *a.parameters, *how)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", most_are_slow([(5, 4, 8, 9, 12), (1, 40, 8, 16, 16)], [(5, 4, 8, 9, 12)]), ids=str
)
def test_any_order_of_warps(bn, shape, layout):
    """A missing barrier would show: warps run in random order, each until it must wait."""
    case = BnCase("order", shape, layout)
    a = bn_inputs(case)
    wanted = run(bn.ops, a, case)
    for seed in range(2):
        bn.launchers.rt.options.update(sched="warp", seed=seed, order="random")
        try:
            got = run(bn.ops, a, case)
        finally:
            bn.launchers.rt.options.clear()
        assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


# ---- bytes

LARGE = ("x", "s", "grad_s", "grad_x")


def moved(launches, counts_of):
    """{array: (loaded, stored)} bytes of the arrays of the size of x, and how wide they moved."""
    total = {}
    for name, stats in launches:
        for array, n in counts_of(name, stats):
            loaded, stored = total.get(array, (0, 0))
            total[array] = (loaded + n["ld_bytes"], stored + n["st_bytes"])
    return total


def large(name, stats):
    return [(array, n) for array, n in stats.by_array.items() if array in LARGE]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", most_are_slow([*DTYPES], [torch.float32]), ids=str)
@pytest.mark.parametrize("timesteps", most_are_slow([1, 5, 8, 18], [1, 5]))
def test_bytes(bn, timesteps, dtype, layout):
    """3 elements forward, 5 backward, two launches each; 16 bytes or four channels a time."""
    case = BnCase("bytes", (timesteps, 2, 32, 8, 8), layout, dtype)
    a = bn_inputs(case)
    whole, how = a.x.numel() * dtype.itemsize, bn_options(case)
    _, mean, _, rstd = bn.ops.forward(a.x, *a.parameters, EPS, *how)
    forward = bn.launchers.take()
    assert len(forward) == 2
    got = moved(forward, large)
    # every thread reads the first value of its channels, from cache; the last block that of each
    centre = 128 * dtype.itemsize * forward[0][1].blocks * (4 if layout == "channels_last" else 1)
    centre += 32 * dtype.itemsize
    assert 2 * whole < got["x"][0] <= 2 * whole + centre
    assert got["s"] == (0, whole)
    bn.ops.backward(a.grad_s, a.x, mean, rstd, *a.parameters, *how)
    backward = bn.launchers.take()
    assert len(backward) == 2
    got = moved(backward, large)
    again = (timesteps - 1) // 8 * 8 * whole // timesteps  # of x, before the last segment of 8
    assert got["x"] == (2 * whole + again, 0)
    assert got["grad_s"] == (2 * whole, 0)
    assert got["grad_x"] == (0, whole)
    membranes = (timesteps - 1) // 8 * a.x[0].numel() * 4
    for (_, stats), stored in zip(backward, (membranes, 0), strict=True):
        workspace = stats.by_array.get("workspace", {"ld_bytes": 0, "st_bytes": 0})
        partial = 4 * 8 * 32 * stats.blocks  # at most, in doubles
        assert stored <= workspace["st_bytes"] <= stored + partial
    four = 4 * dtype.itemsize
    half = layout == "channels_last" or timesteps > 6  # backward; see stage_packet
    for launch, width in (
        (forward[1], four if layout == "channels_last" else 16),
        *((launch, four if half else 16) for launch in backward),
    ):
        for _, n in large("", launch[1]):
            for kind in ("ld", "st"):
                assert n[f"{kind}_bytes"] == width * n[f"{kind}_threads"]
                assert n[f"{kind}_bytes"] == 32 * n[f"{kind}_sectors"]


@pytest.mark.parametrize("timesteps", [1, 5])
def test_odd_rows_read_what_they_must(bn, timesteps):
    case = BnCase("odd", (timesteps, 3, 8, 7, 7))
    a = bn_inputs(case)
    run(bn.ops, a, case)
    got = moved(bn.launchers.take()[1:], large)
    assert got == {
        "x": (3 * a.x.nbytes, 0),
        "s": (0, a.x.nbytes),
        "grad_s": (2 * a.x.nbytes, 0),
        "grad_x": (0, a.x.nbytes),
    }


# ---- Triton


@named([*((90, c) for c in BN_CASES), *((80, c) for c in BN_FEW)])
def test_triton_forward(cudarun, arch_and_case):
    arch, case = arch_and_case
    with cudarun.emulate(arch=arch):
        bn_lif_cases.check_bn_forward(case, TRITON)


@named([*((90, c) for c in BN_CASES), *((80, c) for c in BN_FEW)])
def test_triton_backward(cudarun, arch_and_case):
    arch, case = arch_and_case
    with cudarun.emulate(arch=arch):
        bn_lif_cases.check_bn_backward(case, TRITON)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", most_are_slow([*DTYPES[:2]], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("timesteps", most_are_slow([1, 5], [5]))
def test_triton_bytes(cudarun, timesteps, dtype, layout):
    case = BnCase("bytes", (timesteps, 4, 64, 8, 8), layout, dtype)
    a = bn_inputs(case)
    with cudarun.emulate(arch=90) as launches:
        run(TRITON, a, case)
    names = [name for name, _, _ in launches]
    assert names == ["moments_kernel", "fire_kernel", "backward_kernel", "backward_kernel"]
    moments, fire, sums, grad_x = (stats.by_array for _, _, stats in launches)
    whole = a.x.nbytes
    # every thread reads the first value of its channels, from cache; those of the last twice
    centre = 128 * 16 * (launches[0][2].blocks + 1)
    assert whole < moments["arg0"]["ld_bytes"] <= whole + centre
    assert (fire["arg0"]["ld_bytes"], fire["arg7"]["st_bytes"]) == (whole, whole)
    assert sums["arg0"]["ld_bytes"] == sums["arg1"]["ld_bytes"] == whole
    assert grad_x["arg0"]["ld_bytes"] == grad_x["arg1"]["ld_bytes"] == whole
    assert sum(n["st_bytes"] for n in grad_x.values()) == whole
    for n in (fire["arg0"], sums["arg0"], sums["arg1"], grad_x["arg1"]):
        assert n["ld_bytes"] == 16 * n["ld_threads"]


MANY = {  # of so many tiles of 512 bytes that 36 programs share a channel: two clusters
    "planes": BnCase("planes", (2, 9, 2, 20, 20)),
    "columns": BnCase("columns", (2, 2, 70, 6, 6), "channels_last", channels=True),
    "one program each": BnCase("alone", (2, 3, 6, 4, 4)),
}


@pytest.mark.parametrize("name", MANY)
def test_triton_in_any_order_of_programs_and_warps(cudarun, name, monkeypatch):
    """The same bits, counters left at 0, a call counted once: a missing barrier would show."""
    case = MANY[name]
    monkeypatch.setattr(sums, "_counters", {})
    monkeypatch.setattr(batch_norm, "_LOADS_BYTES", 512)
    monkeypatch.setattr(batch_norm, "_BLOCK_BYTES", 512)
    forget_plans()
    a, channels, found = bn_inputs(case), case.shape[2], []
    for order in ({}, {"order": "random", "sched": "warp", "seed": 0}):
        running = torch.zeros(channels), torch.ones(channels), torch.tensor([7])
        kept = batch_norm.Running(*running, math.nan)
        with cudarun.emulate(arch=90, **order) as launches:
            s, *of_x = eager.forward(a.x, *a.parameters, EPS, case.reset, V_RESET, running=kept)
            mean, _, rstd = of_x
            call = a.x, mean, rstd, *a.parameters, *bn_options(case)
            found.append([s, *of_x, *running, *eager.backward(a.grad_s, *call)])
        assert len(launches) == 4
        assert running[2] == 8
    forget_plans()
    (counters,) = sums._counters.values()
    assert not counters.any()
    assert all(torch.equal(got, wanted) for got, wanted in zip(*found, strict=True))
    for got, wanted in zip(found[0][7:], wide_gradients(case, a), strict=True):
        tolerance = TOLERANCE * max(1.0, wanted.abs().max().item())
        torch.testing.assert_close(got.double(), wanted, rtol=TOLERANCE, atol=tolerance)
