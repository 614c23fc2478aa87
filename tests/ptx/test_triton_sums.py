"""Gradients of parameters that many programs of one Triton launch add up, executed from PTX."""

import pytest
import torch
from iirsnn.kernels import eager, sums
from iirsnn.kernels.launch import now

from tests.lif_cases import SUM_TOLERANCE, Case, inputs, options, reference_gradients

CHANNELS = {"threshold_channels": True, "leak_channels": True}
CASES = {  # of those with one parameter or columns 69 to 72 programs share each: three clusters
    "one parameter": Case("sums", (2, 36_000)),
    "one parameter, T = 1": Case("sums", (1, 70_000)),
    "a plane each": Case("sums", (2, 40, 3, 9, 11), **CHANNELS),
    "a plane each, T = 1": Case("sums", (1, 2, 3, 40, 40), **CHANNELS),
    "a column each": Case("sums", (2, 9, 70, 8, 8), "channels_last", **CHANNELS),
    "a column each, T = 1": Case("sums", (1, 16, 70, 9, 8), "channels_last", **CHANNELS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_in_any_order(cudarun, name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(sums, "_counters", {})
    a = inputs(case)
    given = a.grad_s, a.grad_v, a.x, a.threshold, a.leak, a.v0, *options(case), True
    found = []
    for order in ({}, *({"order": "random", "sched": "warp", "seed": n} for n in range(2))):
        with cudarun.emulate(arch=90, **order) as launches:
            found.append(eager.backward(*given)[1:3])
        assert len(launches) == 1
    (counters,) = sums._counters.values()
    assert not counters.any()
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert (got is None and wanted is None) or torch.equal(got, wanted)
    _, *wanted, _ = reference_gradients(case, a)
    rtol, atol = SUM_TOLERANCE
    for got, reference in zip(found[0], wanted, strict=True):
        if got is not None and reference is not None:
            atol_n = atol * (a.x.numel() / got.numel()) ** 0.5
            torch.testing.assert_close(got.double(), reference.double(), rtol=rtol, atol=atol_n)


def test_counters_are_as_many_as_are_asked_for(monkeypatch):
    monkeypatch.setattr(sums, "_counters", {})
    x = torch.empty(1)
    few = sums.counters_of(x, 3, now)
    assert sums.counters_of(x, 5, now) is few
    many = sums.counters_of(x, 5000, now)
    assert many.numel() == 5000
    assert not many.any()
