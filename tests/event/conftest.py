"""Fixtures of the engine's tests: one thread, and each instruction set of this processor."""

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, Readout
from iirsnn.runtime.library import set_capability
from tests.event.networks import LEVELS, images, integers, levels


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers on a busy machine: threads that wait for each other make minutes of seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request):
    if request.param not in levels():
        pytest.skip(f"this processor has no {request.param}")
    set_capability(request.param)
    yield request.param
    set_capability(levels()[-1])


@pytest.fixture
def small():
    network = integers(
        nn.Conv2d(1, 20, 3), FusedLIF(channels=20), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(80, 40), FusedLIF(), Readout(40, 3), timesteps=2, image_shape=(1, 6, 6),
    )  # fmt: skip
    return network, images(5, 1, 6, 6)
