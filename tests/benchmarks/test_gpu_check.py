"""make gpu-check where there is nothing to check."""

import os
import subprocess
import sys
from pathlib import Path


def test_says_in_one_line_that_there_is_no_gpu():
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "no CUDA device" in run.stderr.splitlines()[-1]
