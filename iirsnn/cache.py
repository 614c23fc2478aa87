"""The folder for what can be made again: downloads, decoded images, calibrations, kernels."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path | None:
    """XDG_CACHE_HOME/iirsnn, by default ~/.cache/iirsnn; None where the user has no home.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says. The folder
    need not exist.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):
        return Path(chosen) / "iirsnn"
    home = os.path.expanduser("~")  # "~" itself without HOME and without an entry in passwd
    return Path(home) / ".cache" / "iirsnn" if os.path.isabs(home) else None
