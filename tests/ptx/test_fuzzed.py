"""LIF calls of any shape and option: CUDA's kernels of float32, executed from their PTX."""

import pytest
import torch
from hypothesis import given

from tests.fuzz.lif_strategies import calls, check_backward, check_forward
from tests.fuzz.settings import fuzzed

FEW = {"dtypes": (torch.float32,), "most": 60}


@pytest.fixture
def ops(all_launchers):
    yield all_launchers[90].ops
    all_launchers[90].take()


@fuzzed(few=6, share=0.005)
@given(call=calls(**FEW))
def test_forward(ops, call):
    check_forward(call, ops)


@fuzzed(few=6, share=0.005)
@given(call=calls(hard=False, **FEW))
def test_backward(ops, call):
    check_backward(call, ops)
