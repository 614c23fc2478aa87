"""These tests execute compiled PTX on the CPU with ptxrun, a tool that is no part of this project.

The environment variable PTXRUN names its folder; without it they are skipped and say so.
"""

from __future__ import annotations

import importlib
import os
import sys

import pytest


def ptxrun_module(name: str):
    """Module `name` of the tool, or a skip."""
    folder = os.environ.get("PTXRUN")
    if not folder:
        pytest.skip("needs the PTX emulator: set PTXRUN to the folder of ptxrun.py")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def cudarun():
    return ptxrun_module("cudarun")


EVERY = "90, every kernel"
#: What is compiled for an architecture: the largest T with kernels of its own, and whether there
#: are but few of them (launch.h). For sm_90 few suffice most tests; all take minutes.
KERNELS = {90: (90, 8, True), EVERY: (90, 8, False), 80: (80, 0, False), 100: (100, 0, False)}


@pytest.fixture(scope="session")
def all_launchers():
    """{a key of KERNELS: the launchers of csrc/lif/cuda}, compiled where a test asks for them."""
    from tests.ptx.cuda_launchers import Launchers, build

    rt = ptxrun_module("ptxcudart")

    class Compiled(dict):
        def __missing__(self, arch):
            self[arch] = Launchers(rt, build(*KERNELS[arch], rt.library_dir()))
            return self[arch]

    return Compiled()
