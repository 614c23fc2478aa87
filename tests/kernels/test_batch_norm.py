"""BatchNorm and LIF in one: the Triton kernels in the interpreter (see conftest.py)."""

import copy

import iirsnn.kernels.ops  # noqa: F401  # defines them
import pytest
import torch
from iirsnn.kernels import batch_norm, launch
from iirsnn.kernels.launch import forget_plans
from torch import nn
from torch.library import opcheck

from iirsnn import BatchNormLIF, FusedLIF
from tests import bn_lif_cases
from tests.bn_lif_cases import (
    BN_CASES,
    BN_FEW,
    EPS,
    BnCase,
    BnImplementation,
    bn_inputs,
    bn_options,
    most_are_slow,
)
from tests.composed import Composed
from tests.lif_cases import named

TRITON = BnImplementation.of("triton_", truncates=True)  # Triton's interpreter does


@named(most_are_slow(BN_CASES, BN_FEW))
def test_forward(case):
    bn_lif_cases.check_bn_forward(case, TRITON)


@named(most_are_slow(BN_CASES, BN_FEW))
def test_backward(case):
    bn_lif_cases.check_bn_backward(case, TRITON)


def test_a_variance_far_below_the_mean():
    bn_lif_cases.check_bn_far_mean(TRITON)


def test_nan():
    bn_lif_cases.check_bn_nan(TRITON)


@named(
    [BnCase("contiguous", (3, 9, 5, 12, 12)), BnCase("last", (3, 9, 5, 12, 12), "channels_last")]
)
def test_few_programs_share_many_tiles(case, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: 2)
    monkeypatch.setattr(batch_norm, "processors", lambda device: 2)
    forget_plans()
    bn_lif_cases.check_bn_forward(case, TRITON)
    bn_lif_cases.check_bn_backward(case, TRITON)


def modules(**norm):
    torch.manual_seed(0)
    parts = nn.BatchNorm2d(6, **norm), FusedLIF(0.7, 0.8, backend="triton")
    for parameter in [*parts[0].parameters(), *parts[1].parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.0)
    return BatchNormLIF(*parts), Composed(*copy.deepcopy(parts))


@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"momentum": None}], ids=str)
def test_the_module_runs_on_the_kernels(norm, monkeypatch):
    fused, composed = modules(**norm)
    called = []
    launch = batch_norm.fire
    monkeypatch.setattr(batch_norm, "fire", lambda *args: called.append(1) or launch(*args))
    for timesteps in (2, 1):  # the second time on other running statistics
        x = 3 + 2 * torch.randn(timesteps, 4, 6, 5, 5)
        grad_s = torch.randn(x.shape)
        results = []
        for module in (fused, composed):
            leaf = x.clone().requires_grad_()
            s = module(leaf)
            s.backward(grad_s)
            results.append((s, leaf.grad, [p.grad for p in module.parameters()]))
        (s, grad_x, grads), (wanted_s, wanted_x, wanted) = results
        assert torch.equal(s, wanted_s)
        torch.testing.assert_close(grad_x, wanted_x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(composed.named_buffers()))
    assert called == [1, 1]
    fused.eval()
    with torch.no_grad():
        assert torch.equal(fused(x), composed.eval()(x))
    assert called == [1, 1, 1]


def test_opcheck():
    case = BnCase("opcheck", (3, 2, 6, 4, 4))
    a = bn_inputs(case)
    ops, how = torch.ops.iirsnn, bn_options(case)
    _, mean, _, rstd = TRITON.forward(a.x, *a.parameters, EPS, *how)
    leaves = [t.clone().requires_grad_() for t in (a.x, *a.parameters)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(ops.triton_bn_lif_forward, (*leaves, EPS, *how), test_utils=tests)
    call = (a.x, mean, rstd, *a.parameters, *how)
    opcheck(ops.triton_bn_lif_backward, (a.grad_s, *call), test_utils=tests)
    opcheck(ops.triton_bn_lif_fire, call, test_utils=tests)


def test_refused():
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        TRITON.moments(x, EPS)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, B, C, ...\] without a 0"):
        TRITON.moments(torch.ones(2, 0, 4), EPS)
