"""The folder for what can be made again: downloads, decoded images, calibrations, kernels."""

from __future__ import annotations

import functools
import os
from pathlib import Path


def folder() -> Path | None:
    """XDG_CACHE_HOME/iirsnn, by default ~/.cache/iirsnn; None where the user has no home.

    A relative XDG_CACHE_HOME is ignored, as the XDG base directory specification says. The folder
    need not exist.
    """
    return _folder(os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~"))


@functools.lru_cache(maxsize=16)  # spike layers ask in every step
def _folder(chosen: str, home: str) -> Path | None:
    if os.path.isabs(chosen):
        return Path(chosen) / "iirsnn"
    # home is "~" itself without HOME and without an entry in passwd
    return Path(home) / ".cache" / "iirsnn" if os.path.isabs(home) else None
