"""BatchNorm and LIF in one on a device: pytest -m gpu, or make gpu-check for the whole of it."""

import pytest
import torch

import iirsnn
from tests import bn_lif_cases
from tests.bn_lif_cases import BN_CASES, BnImplementation

PREFIXES = {"cuda": "", "triton": "triton_"}  # of the ops, by backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run `make gpu-check` on a machine with one",
    ),
]


@pytest.fixture(params=list(PREFIXES))
def ops(request):
    """The ops of each backend."""
    reason = iirsnn.ops.backend.why_not(request.param, "cuda")
    if reason is not None:
        pytest.fail(reason)
    return BnImplementation.of(PREFIXES[request.param], "cuda")


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(BN_CASES)
def test_forward(ops, case):
    bn_lif_cases.check_bn_forward(case, ops)


@named(BN_CASES)
def test_backward(ops, case):
    bn_lif_cases.check_bn_backward(case, ops)


def test_a_variance_far_below_the_mean(ops):
    bn_lif_cases.check_bn_far_mean(ops)


def test_nan(ops):
    bn_lif_cases.check_bn_nan(ops)
