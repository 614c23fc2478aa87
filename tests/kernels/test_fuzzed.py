"""LIF and BatchNormLIF of any shape and option: Triton's kernels interpreted (see conftest.py)."""

import iirsnn.kernels.ops  # noqa: F401  # defines them
import torch
from hypothesis import given

from tests.fuzz import test_batch_norm as norms
from tests.fuzz.lif_strategies import calls, check_backward, check_forward
from tests.fuzz.settings import fuzzed
from tests.lif_cases import Implementation

TRITON = Implementation.of("triton_")

# Triton's interpreter cuts bfloat16 off instead of rounding it: tests/lif_cases.py has those.
DTYPES = (torch.float32, torch.float16)


@fuzzed(few=12, share=0.01)
@given(calls(DTYPES, most=120))
def test_forward(call):
    check_forward(call, TRITON)


@fuzzed(few=12, share=0.01)
@given(calls(DTYPES, hard=False, most=120))
def test_backward(call):
    check_backward(call, TRITON)


@fuzzed(few=4, share=0.005)
@given(norms.calls(DTYPES[:1], small=True))
def test_a_norm_and_its_neurons(call):
    ops = torch.ops.iirsnn
    if call.has_variance():
        norms.check(call, ops.triton_bn_lif_forward, ops.triton_bn_lif_backward)
