"""nvcc and its companions, for the tests that compile csrc/lif/cuda without a GPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from iirsnn.ops.build import _NVCC_FLAGS

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "lif/cuda").glob("*.cu"))
# what they include
HEADERS = [
    *sorted((CSRC / "lif/cuda").glob("*.h")),
    *(CSRC / "lif" / name for name in ("lif.h", "lif_step.h", "surrogate.h")),
    *(CSRC / "simd" / name for name in ("memory.h", "scalar.h")),
]


def toolkit() -> Path:
    """The folder of a CUDA toolkit, or a skip."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1]]
    for place in map(Path, [*filter(None, places), "/usr/local/cuda"]):
        if (place / "bin" / "nvcc").is_file() and (place / "include" / "cuda_runtime.h").is_file():
            return place
    pytest.skip("needs nvcc: put a CUDA toolkit on PATH or set CUDA_HOME")


def disassembler() -> Path:
    """nvdisasm, from the toolkit or from triton's wheel, or a skip."""
    triton = importlib.util.find_spec("triton")
    places = [toolkit() / "bin"]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / "nvdisasm").is_file():
            return place / "nvdisasm"
    pytest.skip("needs nvdisasm: neither the CUDA toolkit nor a triton wheel has it here")


def compile_kernels(
    arch: int,
    unrolled: int,
    few: bool = False,
    link: Iterable[str] = (),
    launchers: Path | None = None,
) -> tuple[list[Path], Path]:
    """Compile csrc/lif/cuda, once for the same sources: the PTX of each, and a library of all.

    arch: PTX for compute_<arch>. unrolled: the largest T with kernels of its own. few: as launch.h
    says. launchers: a source that goes into the library too, linked with the arguments `link`;
    without it there is no library. Warnings are errors.
    """
    flags = [*_NVCC_FLAGS, f"-DIIRSNN_UNROLLED_TIMESTEPS={unrolled}", "-I", CSRC, "--threads", "2"]
    if few:
        flags.append("-DIIRSNN_FEW_KERNELS")
    flags += ["--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
    content = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    folder = ROOT / "build" / "kernels" / digest(content + f"{arch} {flags}".encode())
    ptx = [folder / f"{source.stem}.ptx" for source in SOURCES]
    library = folder / library_name(link, launchers)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / "lock").open("a") as lock,  # of several test processes, one compiles
        tempfile.TemporaryDirectory(dir=folder) as part,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.is_file() if launchers else all(path.is_file() for path in ptx):
            return ptx, library
        command = [toolkit() / "bin" / "nvcc", *flags, "--keep", "--keep-dir", part]
        command += ["-gencode", f"arch=compute_{arch},code=compute_{arch}", *SOURCES]
        if launchers:
            command += [launchers, "-shared", "-Xcompiler", "-fPIC", "-o", "library.so", *link]
        else:
            command.append("-ptx")
        subprocess.run(command, check=True, cwd=part)
        for path in ptx:
            os.replace(Path(part) / path.name, path)
        if launchers:
            os.replace(Path(part) / "library.so", library)
    return ptx, library


def library_name(link: Iterable[str], launchers: Path | None) -> str:
    content = launchers.read_bytes() if launchers else b""
    return f"lif-{digest(content + repr(link).encode())}.so"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
