"""What cases that choose threads and an instruction set leave behind: nothing."""

import importlib

import pytest
import torch


@pytest.fixture
def as_before():
    kernels = importlib.import_module("iirsnn._C")
    threads, capability = torch.get_num_threads(), kernels.build_info()["cpu_capability"]
    yield
    torch.set_num_threads(threads)
    kernels.set_cpu_capability(capability)
