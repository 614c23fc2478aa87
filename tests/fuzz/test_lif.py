"""LIF neurons of any shape, layout, dtype and option: the CPU kernels against the reference."""

from __future__ import annotations

import torch
from hypothesis import given

import iirsnn._C
from tests.fuzz.lif_strategies import backward, calls, check_backward, check_forward
from tests.fuzz.settings import fuzzed
from tests.lif_cases import Implementation

OPS = Implementation.of("")
LEVELS = ("portable", "avx2", "avx512")
BEST = iirsnn._C.build_info()["cpu_capability"]


def levels():
    """Each instruction set that this processor has, in force."""
    for level in LEVELS[: LEVELS.index(BEST) + 1]:
        iirsnn._C.set_cpu_capability(level)
        yield level


@fuzzed(few=100, share=0.12)
@given(calls())
def test_forward_equals_the_reference(call):
    for _ in levels():
        check_forward(call, OPS)


@fuzzed(few=60, share=0.08)
@given(calls(hard=False))
def test_gradients_are_the_references_and_the_same_bits_everywhere(call):
    found = [backward(call, OPS) for _ in levels()]
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)
    check_backward(call, OPS)
