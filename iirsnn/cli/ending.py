"""How a command ends where it is one of many processes of a run; imports no torch by itself."""

from __future__ import annotations

import os
import sys
from typing import Any


def is_main() -> bool:
    """Whether this is the first process of its run, by what launched it."""
    return int(os.environ.get("RANK", 0)) == 0


def speaks() -> bool:
    """Whether an error of this process is the one to print: each run prints one, the first.

    The others end because of it, or have it as well.
    """
    dist = _connected()
    if dist is None:
        return is_main()
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.add("iirsnn/errors", 1) == 1
    except RuntimeError:  # it lived in process 0
        return True


def leave(code: int) -> None:
    """End this process: at once where there are others, so that nothing waits for them."""
    if _connected() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _connected() -> Any:
    """torch.distributed where this process is connected with others, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
