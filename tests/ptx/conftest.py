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
