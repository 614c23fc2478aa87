"""Where freed memory goes: counted in page faults, in processes of their own."""

import subprocess
import sys

import pytest

from iirsnn.train import freed_memory

FAULTS = """
import resource, sys, torch
from iirsnn.train import freed_memory
applied = freed_memory.apply(sys.argv[1])
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(40 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(applied, min(fill() for _ in range(40)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's; run on Linux")
def test_a_large_tensor_seldom_faults_where_freed_memory_is_retained():
    found = {}
    for policy in freed_memory.POLICIES:
        command = [sys.executable, "-c", FAULTS, policy]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found[policy] = (shown[0] == "True", int(shown[1]))
    assert found["system"][0] is False
    assert found["system"][1] >= 20  # one a 2 MiB page at the least
    if not found["retain"][0]:
        pytest.skip("this C library refuses mallopt; run with glibc 2.36 or later")
    assert found["retain"][1] < found["system"][1] / 2  # once the heap has settled
