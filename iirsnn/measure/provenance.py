"""Where a figure comes from: the commit and the machine."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from ..versions import installed


def commit(ignore: Sequence[str] = ()) -> str:
    """The commit of the source tree this package runs from, or its version where there is none.

    "-modified" follows where tracked files have changed, but for paths of the tree in `ignore`.
    """
    source = Path(__file__).resolve().parent
    git = ["git", "-C", str(source)]
    try:
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        _output([*git, "ls-files", "--error-unmatch", Path(__file__).name])
        paths = [":/", *(f":(exclude,top){path}" for path in ignore)]
        changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", *paths])
    except (OSError, subprocess.CalledProcessError):
        return "iirsnn " + installed("iirsnn")
    return head + ("-modified" if changed else "")


def machine() -> str:
    """The processor (and GPU) and the number of threads torch uses."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {torch.get_num_threads()} threads{gpu}"


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
