"""Every Triton kernel in Triton's interpreter, against the reference (see conftest.py)."""

import pytest
import torch
from iirsnn.kernels import tiles

from tests import lif_cases
from tests.lif_cases import CASES, Implementation

TRITON = Implementation.of("triton_", truncates=True)  # Triton's interpreter does


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(CASES)
def test_forward(case):
    lif_cases.check_forward(case, TRITON)


@named(CASES)
def test_backward(case):
    lif_cases.check_backward(case, TRITON)


@named(CASES)
def test_packed(case):
    lif_cases.check_packed(case, TRITON)


@pytest.mark.parametrize("timesteps", [1, 3])
def test_special_values(timesteps):
    lif_cases.check_special_values(TRITON, timesteps)


@pytest.mark.parametrize("reset", ["soft", "hard", "none", "soft_delayed"])
def test_split(reset):
    lif_cases.check_split(TRITON, reset)


def test_repeats():
    lif_cases.check_repeats(TRITON)


def test_refused():
    lif_cases.check_refused(TRITON)


def test_float64_is_refused():
    one = torch.ones(1)
    with pytest.raises(TypeError, match="float64"):
        TRITON.forward(
            *(torch.ones(2, 3, dtype=torch.float64), one, one, None),
            *("soft", 0.0, True, "triangle", 0.3, False),
        )


@pytest.mark.parametrize("timesteps", [1, 3])
def test_few_programs_share_many_rows(timesteps, monkeypatch):
    monkeypatch.setattr(tiles, "_PROGRAMS", 2)
    case = lif_cases.Case(
        "rows", (timesteps, 50, 70), threshold_channels=True, leak_channels=True, v0=timesteps > 1
    )
    lif_cases.check_backward(case, TRITON)
