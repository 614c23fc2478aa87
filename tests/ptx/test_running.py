"""The running statistics that BatchNorm's kernels write, executed from PTX: torch's bits."""

import math

import pytest
import torch
from iirsnn.kernels import batch_norm
from torch import Tensor

from tests.bn_lif_cases import EPS, BnCase, bn_inputs
from tests.ptx.bn_launchers import BnLaunchers

SHAPES = {
    "some groups": BnCase("running", (2, 3, 70, 3, 5)),
    "one group": BnCase("running", (1, 4, 8, 9, 12)),
    "channels_last": BnCase("running", (2, 3, 300, 2, 3), "channels_last"),
    "a repeated input": BnCase("running", (3, 2, 5, 4, 4), "same"),
}
MOMENTA = [0.1, 0.0, 0.7, 1.0, None]


@pytest.fixture(scope="session")
def all_bn(all_launchers):
    return BnLaunchers(all_launchers[90])


@pytest.fixture
def bn(all_bn):
    yield all_bn
    all_bn.launchers.take()


def fresh(channels: int, calls: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a norm that was called `calls` times may keep."""
    g = torch.Generator().manual_seed(calls)
    mean, var = torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.1
    return mean, var, torch.tensor([calls])


def updated(running, mean: Tensor, unbiased: Tensor, momentum: float | None):
    """By torch's ops, as nn.BatchNorm counts a call."""
    calls = running[2] + 1
    weight = 1.0 / float(calls) if momentum is None else momentum
    return running[0].lerp(mean, weight), running[1].lerp(unbiased, weight), calls


def some_totals(channels: int, eps: float) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Sums that processes have added up; mean and rstd; the unbiased variance."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(100, channels, generator=g, dtype=torch.float64) + 2
    totals = torch.stack([values.sum(0), values.square().sum(0), torch.full((channels,), 100.0)])
    totals[1, 0] = 0.0  # a variance below 0 by rounding is 0
    totals[:2, 1] = math.nan
    mean = totals[0] / totals[2]
    var = (totals[1] / totals[2] - mean * mean).clamp(min=0)
    unbiased = var * (totals[2] / (totals[2] - 1))
    return totals, (mean.float(), (1 / (var + eps).sqrt()).float()), unbiased.float()


def check_same(got, wanted) -> None:
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_process(bn, shape, momentum):
    x = bn_inputs(SHAPES[shape]).x
    count = x.numel() // x.shape[2]
    running = fresh(x.shape[2], 6)
    without = bn.moments(x, EPS)
    for _ in range(2):
        before = tuple(t.clone() for t in running)
        found = bn.moments(x, EPS, running, momentum)
        check_same(found, without)
        _, mean, var, _ = found
        check_same(running, updated(before, mean, var * (count / (count - 1)), momentum))
    assert len(bn.launchers.take()) == 3


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("shape", ["some groups", "channels_last"])
def test_any_order_of_blocks_and_warps(bn, shape, order):
    """The call is counted after all groups have read how many there were."""
    x = bn_inputs(SHAPES[shape]).x
    count = x.numel() // x.shape[2]
    running = fresh(x.shape[2], 0)
    before = tuple(t.clone() for t in running)
    bn.launchers.rt.options.update(sched="warp", seed=order, order="random")
    try:
        _, mean, var, _ = bn.moments(x, EPS, running, None)
    finally:
        bn.launchers.rt.options.clear()
    check_same(running, updated(before, mean, var * (count / (count - 1)), None))


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("channels", [3, 512, 700])
def test_many_processes(bn, channels, momentum):
    totals, (mean, rstd), unbiased = some_totals(channels, EPS)
    running = fresh(channels, 3)
    before = tuple(t.clone() for t in running)
    check_same(bn.totals(totals, EPS, running, momentum), (mean, rstd))
    check_same(running, updated(before, mean, unbiased, momentum))


# ---- Triton


def kept(running, momentum: float | None) -> batch_norm.Running:
    return batch_norm.Running(*running, math.nan if momentum is None else momentum)


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_one_process(cudarun, shape, momentum):
    x = bn_inputs(SHAPES[shape]).x
    count = x.numel() // x.shape[2]
    running = fresh(x.shape[2], 6)
    with cudarun.emulate(arch=90) as launches:
        without = batch_norm.statistics(x, EPS)
        before = tuple(t.clone() for t in running)
        found = batch_norm.statistics(x, EPS, running=kept(running, momentum))
    check_same(found, without)
    mean, var, _ = found
    check_same(running, updated(before, mean, var * (count / (count - 1)), momentum))
    assert len(launches) == 2


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("channels", [3, 700])
def test_triton_many_processes(cudarun, channels, momentum):
    eps = torch.tensor(EPS).item()  # a number is float32 in Triton
    totals, (mean, rstd), unbiased = some_totals(channels, eps)
    running = fresh(channels, 3)
    before = tuple(t.clone() for t in running)
    with cudarun.emulate(arch=90, sched="warp", order="random") as launches:
        found = batch_norm.totals(totals, EPS, kept(running, momentum))
    check_same(found, (mean, rstd))
    check_same(running, updated(before, mean, unbiased, momentum))
    assert len(launches) == 1
