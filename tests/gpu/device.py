"""What the tests on a device share."""

import pytest
import torch

import iirsnn

PREFIXES = {"cuda": "", "triton": "triton_"}  # of the ops, by backend

ON_A_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run `make gpu-check` on a machine with one",
    ),
]


def prefix(backend):
    """Of the backend's ops; a backend that cannot run there fails the test."""
    reason = iirsnn.ops.backend.why_not(backend, "cuda")
    if reason is not None:
        pytest.fail(reason)
    return PREFIXES[backend]
