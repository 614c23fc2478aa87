"""What the C library does with freed memory of a training process on a CPU.

glibc maps a block of more than 32 MiB afresh each time and gives it back when it is freed, so that
every step of training pays for the page faults of all its large tensors again.
"""

from __future__ import annotations

import ctypes
import sys

#: `retain`: freed memory stays with the process; `system`: the C library is left alone.
POLICIES = ("retain", "system")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_ON_HEAP = 2**30  # bytes


def apply(policy: str) -> bool:
    """Put one of `POLICIES` in force, for this process and from now on.

    Returns whether freed memory now stays: False for `system`, and where there is no glibc
    or an old one that refuses a threshold above 32 MiB.
    """
    if policy == "system" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # with the first alone, memory at the top of the heap would still be given back
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_ON_HEAP) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    )
