"""Every file of this folder runs in a process of its own, with TRITON_INTERPRET=1.

Triton decides when it is imported whether it interprets, which the rest of the tests must not. A
file counts as one test of the pytest that met it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class InterpretedRun(pytest.Item):
    def runtest(self) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            cwd=self.config.rootpath,
            capture_output=True,
            text=True,
        )
        if run.returncode != 0:
            pytest.fail(run.stdout + run.stderr, pytrace=False)
        self.add_report_section("call", "interpreted", run.stdout)


class InterpretedFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedRun.from_parent(self, name="TRITON_INTERPRET=1")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    return None if INTERPRETING else InterpretedFile.from_parent(parent, path=module_path)
