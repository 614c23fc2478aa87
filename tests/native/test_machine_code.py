"""The machine code of the inner loops: arithmetic of full width, and nothing spilled.

Read from the objects of the package, so it is the code that users get.
"""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache

import pytest

from tests.native.toolchain import ARM, CSRC, HOST, kernels

INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\s+(.+)")
# Loops end in a conditional branch; blocks moved out of the way come back by others.
BRANCH = re.compile(r"(?:b\.\w+|cbn?z|tbn?z|j(?!mp)\w+)\s+(?:.*,\s*)?([0-9a-f]+) <")


@cache
def functions(toolchain, folder: str) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction, by the function's name."""
    found = {}
    for source, path in kernels(toolchain).items():
        if CSRC / folder in source.parents:
            command = [toolchain.objdump, "-dC", "--no-show-raw-insn", path]
            listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, code in re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", listing, re.MULTILINE):
                found[name] = [(int(at, 16), text) for at, text in INSTRUCTION.findall(code)]
    return found


def inner_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """What lies between a branch backwards and its target, where no other such loop does."""
    index = {at: i for i, (at, _) in enumerate(code)}
    spans = []
    for i, (_, text) in enumerate(code):
        branch = BRANCH.match(text)
        start = index.get(int(branch[1], 16)) if branch else None
        if start is not None and start <= i:
            spans.append((start, i))
    return [
        [text for _, text in code[first : last + 1]]
        for first, last in spans
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans)
    ]


def loops(toolchain, folder: str, loop: str, version: str, having: str) -> list[list[str]]:
    """The inner loops, with an instruction like `having`, of a version of a loop."""
    found = [
        inner
        for name, code in functions(toolchain, folder).items()
        if re.search(rf"Versions<.*\b{loop}.*::{version}\(", name)
        for inner in inner_loops(code)
        if any(re.match(having, text) for text in inner)
    ]
    assert found, f"no inner loop of {loop} has {having}"
    return found


def matching(loop: list[str], pattern: str) -> list[str]:
    return [text for text in loop if re.match(pattern, text)]


# Outputs of a tile by their weights; 16 registers of 16 bytes hold the sums. Its loops: of plain
# spikes; of the digits of pooled counts, where a row of fp32 that counts twice is doubled, one more
# addition; of rows that were widened.
TILES = ["Fp32, 64", "Bf16, 64", "Int8, 128"]


def check_tile(found: list[list[str]], add: str, registers: int, memory: str) -> None:
    """Full-width additions, once or twice a register, and sums that stay in registers."""
    counts = {len(matching(loop, add)) for loop in found}
    assert registers in counts, counts
    assert counts <= {registers, 2 * registers}, counts
    for loop in found:
        assert not matching(loop, memory), loop


needs_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="looks at AVX2 code: run it on an x86-64 machine"
)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
def test_arm_adds_an_event(tile):
    add = r"(add|ssra)\s+v\d+\.8h" if tile.startswith("Int8") else r"fadd\s+v\d+\.4s"
    found = loops(ARM, "event", f"TileLoop<.*{tile},", "portable", "rbit")
    check_tile(found, add, 16, r"st[rpu]\s|ld[rp]\s+q.*\[sp")


@needs_x86
@pytest.mark.parametrize("tile", TILES)
def test_avx2_adds_an_event(tile):
    add = r"vpaddw.*%ymm" if tile.startswith("Int8") else r"vaddps.*%ymm"
    found = loops(HOST, "event", f"TileLoop<.*{tile},", "avx2", r"tzcnt|(rep )?bsf")
    check_tile(found, add, 8, r"v?mov\S*\s+%\S+,.*\(|v.*\(%rsp\)")


FORWARD = r"(ForwardRow<float, float|ForwardRows<float), \(iirsnn::Reset\)0, false>"


@pytest.mark.slow  # compiles every LIF forward loop for another processor
def test_arm_lif_forward():
    for loop in loops(ARM, "lif", FORWARD, "portable", r"fmul\s+v\d+\.4s"):
        assert len(matching(loop, r"fadd\s+v\d+\.4s")) == len(matching(loop, "fmul")), loop
        assert not matching(loop, r"f(add|sub|mul)\s+[sd]\d|st[rpu]\s+q.*\[sp"), loop


@needs_x86
def test_avx2_lif_forward():
    for loop in loops(HOST, "lif", FORWARD, "avx2", r"vmulps.*%ymm"):
        assert len(matching(loop, r"vaddps.*%ymm")) == len(matching(loop, "vmul")), loop
        assert not matching(loop, r"v(add|sub|mul)s[sd]|vmov\S*\s+%ymm\d+,.*\(%rsp"), loop
