"""iirsnn._C, where it was compiled for this torch: any other must not even be imported."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path


def for_another_torch() -> str:
    """Why the extension that is installed must not be imported, or ""."""
    import torch

    if "iirsnn._C" in sys.modules:
        return ""
    spec = importlib.util.find_spec("iirsnn._C")
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return ""
    found = re.search(rb"iirsnn for torch ([0-9.]*)", Path(spec.origin).read_bytes())
    built, here = found and found[1].decode(), torch.__version__.partition("+")[0]
    if built is None or here.startswith(built):  # a nightly build's version goes on
        return ""
    return f"iirsnn._C was compiled for torch {built}, not for {torch.__version__}"


def define_ops() -> None:
    """Import the extension, which defines the ops, where it can be; `backend` says why not."""
    if not for_another_torch():
        with contextlib.suppress(ImportError):
            importlib.import_module("iirsnn._C")
