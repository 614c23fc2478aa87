"""BatchNorm and LIF in one on a device: pytest -m gpu, or make gpu-check for the whole of it."""

import pytest

from tests import bn_lif_cases
from tests.bn_lif_cases import BN_CASES, BnImplementation
from tests.gpu.device import ON_A_DEVICE, PREFIXES, prefix
from tests.lif_cases import named

pytestmark = ON_A_DEVICE


@pytest.fixture(params=list(PREFIXES))
def ops(request):
    """The ops of each backend."""
    return BnImplementation.of(prefix(request.param), "cuda")


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
