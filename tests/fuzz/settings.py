"""How many cases a fuzz test draws: a fixed few in `make test`, FUZZ_CASES in all by `make fuzz`.

The few are the same on every machine and in every run. The many are new ones each time; a failing
one is printed with the line that repeats it (@reproduce_failure), shrunk to the smallest.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings

#: In all tests together; None: the fixed few.
CASES = int(os.environ["FUZZ_CASES"]) if os.environ.get("FUZZ_CASES") else None


def fuzzed(few: int, share: float) -> Callable[[Any], Any]:
    """A test of `few` fixed cases, or of its share (0 to 1) of FUZZ_CASES."""
    return settings(
        max_examples=few if CASES is None else max(1, round(share * CASES)),
        derandomize=CASES is None,
        database=None,
        deadline=None,  # a busy machine is no failure
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
