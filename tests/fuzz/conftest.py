"""What cases that choose threads and instruction sets leave behind: nothing."""

import importlib

import pytest
import torch

from iirsnn.runtime.library import library, set_capability


@pytest.fixture(autouse=True)
def as_before():
    """torch's threads, and the instruction sets of the kernels and of the engine."""
    kernels = importlib.import_module("iirsnn._C")
    threads, capability = torch.get_num_threads(), kernels.build_info()["cpu_capability"]
    engines = library().iirsnn_capability().decode()
    yield
    torch.set_num_threads(threads)
    kernels.set_cpu_capability(capability)
    set_capability(engines)
