"""Compiles csrc, but for what needs torch or Python, and the driver here, by any compiler.

Objects lie in build/native, named by a hash of all that they are made of, and are made once.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from iirsnn.ops.build import CXX_FLAGS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
FOREIGN = re.compile(r"#include <(torch|ATen|c10|pybind11|Python)\b")


@dataclass(frozen=True)
class Toolchain:
    """compiler: a command. runner: what runs its programs, none for this processor's own."""

    compiler: str
    objdump: str
    runner: str = ""
    link: tuple[str, ...] = ("-pthread",)
    packages: str = ""

    def require(self) -> None:
        """Skip unless everything is installed."""
        for program in (self.compiler, self.objdump, self.runner):
            if program and shutil.which(program) is None:
                pytest.skip(
                    f"needs {program} (on Debian and Ubuntu: apt-get install {self.packages})"
                )

    def run(self, program: Path, **environment: str) -> subprocess.CompletedProcess:
        command = [self.runner, program] if self.runner else [program]
        return subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}
        )


HOST = Toolchain(os.environ.get("CXX", "c++"), "objdump", packages="g++ binutils")
CLANG = Toolchain(os.environ.get("IIRSNN_TEST_CLANG", ""), "objdump", packages="clang binutils")
ARM = Toolchain(
    "aarch64-linux-gnu-g++",
    "aarch64-linux-gnu-objdump",
    "qemu-aarch64",
    ("-pthread", "-static"),
    "g++-aarch64-linux-gnu qemu-user",
)


def includes(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """The file and all files of this project that it includes."""
    seen = set() if seen is None else seen
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'#include "(.+?)"', path.read_text()):
            found = [folder / name for folder in (path.parent, CSRC) if (folder / name).is_file()]
            includes(found[0], seen)
    return seen


def sources() -> list[Path]:
    """The driver's, and those of csrc that need neither torch nor Python; the largest first."""
    kernels = [
        path
        for path in CSRC.rglob("*.cpp")
        if not any(FOREIGN.search(file.read_text()) for file in includes(path))
    ]
    return sorted(
        [*kernels, *HERE.glob("*.cpp")], key=lambda path: (-path.stat().st_size, path.name)
    )


@cache
def version(compiler: str) -> str:
    command = [compiler, "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_object(toolchain: Toolchain, source: Path) -> Path:
    """The object of one source, by the package's own flags."""
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-Wno-missing-field-initializers", "-Wno-psabi", *CXX_FLAGS]
    content = b"".join(path.read_bytes() for path in sorted(includes(source)))
    content += f"{flags} {version(toolchain.compiler)}".encode()
    target = BUILD / f"{source.stem}-{hashlib.sha256(content).hexdigest()[:16]}.o"
    if not target.is_file():
        BUILD.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part.o")
        cached = [shutil.which("ccache")] if shutil.which("ccache") else []
        command = [*cached, toolchain.compiler, *flags, "-I", CSRC, "-c", source, "-o", part]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning:" not in done.stderr, done.stderr
        os.replace(part, target)
    return target


def build(toolchain: Toolchain) -> Path:
    """The driver; about two minutes of compiling for each instruction set, the first time."""
    toolchain.require()
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_object(toolchain, source), sources()))
    names = " ".join(path.name for path in objects)
    target = BUILD / f"driver-{hashlib.sha256(names.encode()).hexdigest()[:16]}"
    if not target.is_file():
        part = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run([toolchain.compiler, *objects, *toolchain.link, "-o", part], check=True)
        os.replace(part, target)
    return target
