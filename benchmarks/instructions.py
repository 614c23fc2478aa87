"""CUDA's kernels in machine code, counted without a GPU: python benchmarks/instructions.py

Compiles csrc/lif/cuda for sm_90 and counts the instructions that a thread executes from one packet
of neurons to the next, loops and branches too (sass.py says how), for a neuron and timestep. Left
out is what a thread does once, before its first packet and after its last: parameters, sums over
threads. Soft reset, detached, triangle; aligned rows of whole packets; no v0, no grad_v.

A share is that of all issue slots while memory is busy all the time:
instructions * bandwidth / bytes a neuron and timestep / issue slots.

    python benchmarks/instructions.py --csrc FOLDER

counts the csrc of another commit (git archive COMMIT csrc | tar -x -C PARENT), but for kernels that
took other arguments then.

Needs nvcc of CUDA_HOME, or in its usual place; nvdisasm and cuobjdump from there or from Triton's
wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import sass

from iirsnn.ops.build import _NVCC_FLAGS

ROOT = Path(__file__).resolve().parents[1]
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))

# {GPU: (bytes a second, instructions a second that its threads are issued)}
GPUS = {
    "H100": (3.35e12, 132 * 4 * 32 * 1.98e9),  # SXM
    "A100": (2.04e12, 108 * 4 * 32 * 1.41e9),  # 80 GB SXM
}

THREADS = 128  # of a block
PACKETS = 4, 8  # of a thread: from these to those. T = 1 and statistics take two and four at once
SOFT = "LNS_5ResetE0E"  # arguments of templates, as they stand in a symbol
SUMS, GRAD_X = "LNS1_4PassE1E", "LNS1_4PassE2E"


class Kernel(NamedTuple):
    source: str
    name: str
    dtype: str
    columns: bool  # channels_last, with parameters a channel
    more: str = ""  # arguments of its template

    @property
    def packet(self) -> int:
        """Its neurons."""
        return 4 if self.dtype == "fp32" or self.columns else 8

    @property
    def timesteps(self) -> int:
        return 1 if self.name.startswith("single") else 5

    @property
    def symbol(self) -> str:
        dtype = {"fp32": "f", "bf16": "13__nv_bfloat16"}[self.dtype]
        template = f"{dtype}Li{self.packet}ELb{self.columns:d}E{self.more}"
        return f"{len(self.name)}{self.name}I{template}EEv"


class Counts(NamedTuple):
    instructions: float  # for a neuron and timestep
    registers: int
    size: int  # bytes of code
    stack: int  # bytes, what is spilled too


# ---- what a launch gives a kernel, in the order of its arguments

POINTER = 1 << 20


def walk(kernel: Kernel, packets: int) -> bytes:
    """struct Walk of one block: its threads stand side by side on a row, in columns on rows."""
    channels = kernel.packet if kernel.columns else 1
    inner = 1 if kernel.columns else packets * kernel.packet
    per_row = 1 if kernel.columns else packets
    magic, shift = divider(per_row)
    sizes = channels, inner, packets, per_row, channels * inner, 1, 1
    return struct.pack("7q Qi0q i0q", *sizes, magic, shift, 1)


def divider(divisor: int) -> tuple[int, int]:
    """struct Divider."""
    if divisor == 1:
        return 0, 0
    shift = (divisor - 1).bit_length() - 1
    return -(-(1 << 64 + shift) // divisor), shift


def arguments(kernel: Kernel, packets: int) -> bytes:
    """Of a launch that gives each thread so many packets."""
    packets *= THREADS
    neurons, timesteps, p = packets * kernel.packet, kernel.timesteps, POINTER
    options = struct.pack("ffi?0i", 0, 0.3, 0, True)
    channel_inputs = struct.pack("8P??f0q", *[p] * 8, True, True, 0)
    values = timesteps * neurons
    match kernel.source, kernel.name:
        case "lif_backward", "single_backward_kernel":
            parts = [struct.pack("4Pq", p, p, p, p, neurons), options, struct.pack("4P", *[p] * 4)]
        case "lif_backward", "backward_kernel":  # from threshold on: without v0, grad_v and grad_v0
            tensors = struct.pack("Pq Pq 4P 3P", p, neurons, p, neurons, p, p, 0, 0, p, 0, p)
            sizes = struct.pack("2q", timesteps, neurons)
            parts = [tensors, sizes, options, struct.pack("4P", *[p] * 4)]
        case "bn_lif_moments", "moments_kernel":
            out = struct.pack("6P2dq 3Pd", *[p] * 6, 1e-5, values, 1, p, p, p, 0.1)
            parts = [struct.pack("P2q", p, timesteps, neurons), out]
        case "bn_lif", "fire_kernel":
            parts = [struct.pack("PqP2q", p, neurons, p, timesteps, neurons), channel_inputs]
        case "bn_lif", "backward_kernel":
            tensors = struct.pack("Pq Pq 2P2q", p, neurons, p, neurons, p, p, timesteps, neurons)
            parts = [tensors, options, struct.pack("9Pd", *[p] * 9, values), channel_inputs]
        case _:
            raise ValueError(f"expected a kernel of the table, got {kernel}")
    return b"".join([*parts, walk(kernel, packets)])


# ---- compiled and counted


def compiled(source: str, csrc: Path) -> Path:
    """Its machine code, kept in build/ for the same sources, flags and compiler."""
    flags = [*_NVCC_FLAGS, "-DIIRSNN_FEW_KERNELS", "-arch=sm_90", "-cubin"]
    digest = hashlib.sha256(f"{flags} {output('nvcc', '--version')}".encode())
    for path in sorted(csrc.rglob("*.*")):
        digest.update(path.read_bytes())
    cubin = ROOT / "build/instructions" / f"{source}-{digest.hexdigest()[:16]}.cubin"
    if not cubin.is_file():
        cubin.parent.mkdir(parents=True, exist_ok=True)
        part = cubin.with_suffix(".part")
        output("nvcc", *flags, "-I", csrc, csrc / f"lif/cuda/{source}.cu", "-o", part)
        part.replace(cubin)
    return cubin


def output(tool: str, *command: str | Path) -> str:
    """What a tool of the toolkit, or of Triton's wheel, prints."""
    places = [TOOLKIT / "bin"]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin")
    for path in (place / tool for place in places):
        if path.is_file():
            return subprocess.run([path, *command], check=True, stdout=PIPE, text=True).stdout
    raise FileNotFoundError(f"{tool} is in none of {', '.join(map(str, places))}")


@cache
def machine_code(source: str, csrc: Path) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """{symbol: text} and {symbol: {REG: registers, STACK: bytes, ...}} of its kernels."""
    cubin = compiled(source, csrc)
    usage = output("cuobjdump", "--dump-resource-usage", cubin)
    uses = {
        symbol: {key: int(n) for key, n in re.findall(r"([A-Z]+)\S*:(\d+)", line)}
        for symbol, line in re.findall(r"Function (\w+):\s*(.*)", usage)
    }
    return sass.sections(output("nvdisasm", "-c", cubin)), uses


def count(kernel: Kernel, csrc: Path) -> Counts | None:
    """None where it takes other arguments."""
    texts, usage = machine_code(kernel.source, csrc)
    (symbol,) = (each for each in texts if kernel.symbol in each)
    code, uses = sass.parse(texts[symbol]), usage[symbol]
    given = [arguments(kernel, packets) for packets in PACKETS]
    if sass.ARGUMENTS + len(given[0]) != uses["CONSTANT"]:
        return None
    first, last = (sass.executed(code, each) for each in given)
    instructions = (last - first) / ((PACKETS[1] - PACKETS[0]) * kernel.packet * kernel.timesteps)
    size = sass.SIZE * len(code.instructions)
    return Counts(instructions, uses["REG"], size, uses["STACK"] + uses["LOCAL"])


# ---- the table


class Row(NamedTuple):
    title: str
    moved: int  # elements of x
    second: str  # what the second kernel is
    kernels: list[Kernel]


def rows() -> Iterator[Row]:
    for name, more in ("single_backward_kernel", ""), ("backward_kernel", SOFT):
        for dtype, columns in product(("fp32", "bf16"), (False, True)):
            arguments = [more + summed for summed in ("Lb0E", "Lb1E")]
            pair = [Kernel("lif_backward", name, dtype, columns, each) for each in arguments]
            title = f"LIF backward, T = {pair[0].timesteps}, {dtype}"
            yield Row(title + ", channels_last" * columns, 3, "with sums", pair)
    for title, moved, source, name, more in (
        ("BatchNorm statistics", 1, "bn_lif_moments", "moments_kernel", ""),
        ("BatchNorm + LIF spikes", 2, "bn_lif", "fire_kernel", SOFT),
        ("BatchNorm + LIF sums", 2, "bn_lif", "backward_kernel", SOFT + SUMS),
        ("BatchNorm + LIF grad_x", 3, "bn_lif", "backward_kernel", SOFT + GRAD_X),
    ):
        for dtype in "fp32", "bf16":
            pair = [Kernel(source, name, dtype, columns, more) for columns in (False, True)]
            yield Row(f"{title}, T = 5, {dtype}", moved, "channels_last", pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    csrc = parser.parse_args().csrc.resolve()
    stack, others = 0, []
    print("| kernel | instructions | bytes | H100 | A100 | registers | KiB |")
    print("|---|---|--:|---|---|---|---|")
    for title, moved, second, kernels in rows():
        size = moved * (4 if kernels[0].dtype == "fp32" else 2)
        one, two = (count(kernel, csrc) for kernel in kernels)
        if one is None or two is None:
            others.append(title)
            continue
        cells = [f"{one.instructions:.1f}, {second} {two.instructions:.1f}", str(size)]
        for bandwidth, slots in GPUS.values():
            shares = (100 * each.instructions * bandwidth / size / slots for each in (one, two))
            cells.append(", ".join(f"{share:.0f} %" for share in shares))
        cells.append(f"{one.registers}, {two.registers}")
        cells.append(f"{one.size / 1024:.0f}, {two.size / 1024:.0f}")
        print(f"| {title} | {' | '.join(cells)} |")
        stack = max(stack, one.stack, two.stack)
    print(f"\nStack, spills too: {stack} bytes. {output('nvcc', '--version').splitlines()[-2]}")
    for title in others:
        print(f"Not counted, as it took other arguments: {title}")


if __name__ == "__main__":
    main()
