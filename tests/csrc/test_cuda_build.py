"""The machine code of csrc/lif/cuda: wide accesses, and nothing spilled. Needs nvcc, not a GPU.

IIRSNN_TEST_EVERY_KERNEL=1 looks at all kernels on all architectures, which takes minutes. Without
it: the kernels of T = 1 and, in packets with the soft reset, those of any T and, on sm_90, of T = 5
and 8; float16's are those of bfloat16 but for the conversion, and left out.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cuda_compiler import compile_kernels, disassembler, toolkit

ARCHITECTURES = [80, 90, 100, 120]
EVERY = os.environ.get("IIRSNN_TEST_EVERY_KERNEL") == "1"
RESETS = "soft", "hard", "none", "soft_delayed"


@dataclass(eq=False)
class Kernel:
    """name: without _kernel. packet: neurons a thread moves at once, 1 or 16 bytes.

    timesteps: 0 for any, or when the kernel has none. usage: what ptxas -v says. code: SASS.
    """

    arch: int
    name: str
    dtype: str
    packet: int
    timesteps: int
    reset: str
    sums_only: bool = False
    usage: str = field(default="", repr=False)
    code: str = field(default="", repr=False)

    @staticmethod
    def of(mangled: str, arch: int) -> Kernel:
        if "totals_kernel" in mangled:  # no template: one double at a time
            return Kernel(arch, "totals", "d", 1, 0, "")
        name, dtype, rest = re.search(
            r"\d([a-z_]+?)_kernelI(?:\d*)(f|d|__half|__nv_bfloat16)(.*?)E+v", mangled
        ).groups()
        numbers = [int(n) for n in re.findall(r"Li(\d+)E", rest + "E")]
        packet, timesteps = (*numbers, 1, 0)[:2] if len(numbers) != 1 else (numbers[0], 0)
        reset = re.search(r"ResetE(\d)", rest)
        sums_only = name == "moments" or "PassE1" in rest  # of bn_lif.cu's Pass
        which = RESETS[int(reset[1])] if reset else ""
        return Kernel(arch, name, dtype, packet, timesteps, which, sums_only)

    @property
    def access(self) -> int:
        """Bits of an access: 16 bytes, or four numbers where every one is another channel's."""
        size = {"f": 4, "d": 8}.get(self.dtype, 2)
        return min(8 * size * self.packet, 128)

    def count(self, operation: str) -> int:
        return len(re.findall(rf"\s{re.escape(operation)}\b", self.code))


def split(ptx: str) -> tuple[str, dict[str, str]]:
    """What precedes the kernels, and each kernel by its mangled name."""
    head, *entries = re.split(r"^(?=\.(?:visible \.)?entry )", ptx, flags=re.MULTILINE)
    return head, {re.search(r"\.entry (\w+)", entry)[1]: entry for entry in entries}


def wanted(kernel: Kernel, arch: int) -> bool:
    if EVERY:
        return True
    if kernel.name not in ("forward", "backward"):
        return kernel.name not in ("fire", "single_backward") or kernel.dtype != "__half"
    few = kernel.reset == "soft" and kernel.packet > 1 and kernel.dtype != "__half"
    return few and (arch != 90 or kernel.timesteps in (0, 5, 8))


def inspect(arch: int, folder) -> list[Kernel]:
    """Compile for one architecture from the PTX for it, sm_120 from that for sm_100."""
    unrolled = 8 if EVERY or arch == 90 else 0
    files, _ = compile_kernels(min(arch, 100), unrolled, few=arch == 90 and not EVERY)
    return [kernel for file in files for kernel in inspect_file(arch, file, folder)]


def inspect_file(arch: int, file: Path, folder) -> list[Kernel]:
    head, entries = split(file.read_text())
    kernels = {name: Kernel.of(name, arch) for name in entries}
    kernels = {name: kernel for name, kernel in kernels.items() if wanted(kernel, arch)}
    source, binary = folder / f"{file.stem}-{arch}.ptx", folder / f"{file.stem}-{arch}.cubin"
    source.write_text(head + "".join(entries[name] for name in kernels))
    command = [toolkit() / "bin" / "ptxas", f"-arch=sm_{arch}", "-v", source, "-o", binary]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    for name, usage in re.findall(
        r"entry function '(\w+)'(.*?)(?=ptxas info\s+: Compiling|\Z)", told, re.DOTALL
    ):
        kernels[name].usage = usage
    command = [disassembler(), "--print-code", "--no-dataflow", binary]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name, code in re.findall(
        r"^\s*\.text\.(\w+):$(.*?)(?=^\s*\.text\.\w+:$|\Z)", sass, re.DOTALL | re.MULTILINE
    ):
        kernels[name].code = code
    return list(kernels.values())


@pytest.fixture(scope="module")
def every_kernel(tmp_path_factory):
    """{architecture: its kernels}, compiled where a test asks for them."""
    folder = tmp_path_factory.mktemp("cubin")
    disassembler()
    return functools.cache(lambda arch: inspect(arch, folder))


@pytest.fixture(
    params=[pytest.param(a, marks=[] if a == 90 else pytest.mark.slow) for a in ARCHITECTURES],
    ids=lambda arch: f"sm_{arch}",
)
def kernels(request, every_kernel):
    return every_kernel(request.param)


def test_all_are_there(kernels):
    assert {k.name for k in kernels} == {
        *("forward", "backward", "single_forward", "single_backward", "unpack"),
        *("moments", "totals", "fire", "single_fire"),
    }
    assert {k.dtype for k in kernels} == {"f", "d", "__half", "__nv_bfloat16"}


def test_nothing_in_local_memory(kernels):
    for kernel in kernels:
        usage = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", kernel.usage)
        assert usage.groups() == ("0", "0"), kernel
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel


def test_registers_leave_enough_loads_in_flight(kernels):
    """32 KiB of an SM's loads can wait for memory at once, whatever the registers they take.

    20 KiB where the first pass of a BatchNorm loads 8 bytes at a time, 28 where float16's second
    one does, and bfloat16's from sm_100 on.
    """
    for kernel in kernels:
        if kernel.name not in ("forward", "backward", "single_forward", "single_backward"):
            continue
        registers = int(re.search(r"Used (\d+) registers", kernel.usage)[1])
        threads = min(2048, 65536 // (128 * -(-registers // 8) * 8) * 128)
        if kernel.packet > 1:
            least = 32
            if kernel.access == 64 and kernel.name == "single_backward":
                fewer = kernel.dtype == "__half" or kernel.arch >= 100
                least = 20 if kernel.sums_only else 28 if fewer else 32
            assert kernel.access // 8 * loads(kernel) * threads >= least * 1024, (kernel, threads)


def test_backward_of_16_bits_takes_few_registers(kernels):
    """All but the first pass of a BatchNorm, which keeps two sums more."""
    registers = {
        kernel: int(re.search(r"Used (\d+) registers", kernel.usage)[1])
        for kernel in kernels
        if kernel.name in ("backward", "single_backward")
        and kernel.dtype in ("__half", "__nv_bfloat16")
        and not kernel.sums_only
    }
    assert registers
    assert max(registers.values()) < 128, max(registers, key=registers.get)


def loads(kernel: Kernel) -> int:
    """Packets of x, and of grad_s, that a thread asks for before it needs one."""
    if kernel.timesteps:
        return kernel.timesteps
    many = {"single_forward": 2, "forward": 8, "backward": 16, "single_backward": 4, "unpack": 0}
    return (many | {"moments": 4, "fire": 8, "single_fire": 4})[kernel.name]


def stores(kernel: Kernel) -> int:
    """Packets that it writes; the first passes of a BatchNorm write none."""
    return 0 if kernel.sums_only else max(1, kernel.timesteps)


def test_packets_move_in_128_bits(kernels):
    for kernel in kernels:
        if kernel.packet == 1:
            continue
        bypass = "BYPASS." if kernel.access == 128 else ""
        staged = f"LDGSTS.E.{bypass}{kernel.access}"  # backward: to shared memory
        load = staged if kernel.name == "backward" else f"LDG.E.{kernel.access}.CONSTANT"
        assert kernel.count(load) >= loads(kernel), kernel
        assert kernel.count(f"STG.E.{kernel.access}") >= stores(kernel), kernel
        if kernel.name in ("forward", "backward"):  # the rest are parameters, 4 bytes, 8 for double
            assert kernel.count("LDG.E.U8.CONSTANT") == kernel.count("LDG.E.U16.CONSTANT") == 0
            assert kernel.count("STG.E.U16") == 0, kernel
