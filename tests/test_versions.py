"""What versions are reported where iirsnn is run from a checkout, without being installed."""

import subprocess
import sys
from pathlib import Path

from iirsnn.versions import installed

ROOT = Path(__file__).resolve().parent.parent


def test_a_package_that_is_not_installed():
    assert installed("no-such-package") == "not installed"
    assert installed("numpy")[0].isdigit()


def test_the_command_line_runs_from_a_checkout(tmp_path):
    """sys.path without what pip wrote of iirsnn."""
    code = f"""
import importlib.metadata, sys
real = importlib.metadata.version
def version(name):
    if name == "iirsnn":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["iirsnn", "--version"]
from iirsnn.cli import main
main()
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (0, "iirsnn not installed\n"), run.stderr
