"""Triton's ops inside torch.compile: nothing is copied that eager code does not copy."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_compiled_code_copies_nothing_for_the_kernels():
    """Before 2.14 torch takes equal calls for memory for one, and copies it for each kernel."""
    script = Path(__file__).with_name("compiled_graphs.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert len(told) == 6
    for name, passes in told.items():
        forward, backward = passes["forward"], passes["backward"]
        assert forward["copies"] == backward["copies"] == [], name
        assert len(forward["memory"]) == len(backward["memory"]) == 1, name
        assert forward["memory"] != backward["memory"], name
