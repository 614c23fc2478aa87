"""Compiles csrc, but for what needs torch or Python, and the driver here, by any compiler.

This processor's kernels are the objects of the package: what its build left is not compiled again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from iirsnn.ops import build as package

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"
PACKAGE = ROOT / "build" / f"objects-{sys.implementation.cache_tag}" / "kernels"  # as in setup.py


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


def compile_all(sources: list[Path], folder: Path, command: list[str]) -> dict[Path, Path]:
    """The object of each source; no compiler may warn."""
    objects = package.compile_objects(sources, folder, command)
    for path in objects.values():
        said = path.with_suffix(".log").read_text()
        assert "warning:" not in said, said
    return objects


@cache
def kernels(toolchain: Toolchain, engine: bool = False) -> dict[Path, Path]:
    """The objects of csrc by their sources; engine: of the library of the event engine alone."""
    toolchain.require()
    sources = package.engine_sources() if engine else package.kernel_sources()
    if toolchain == HOST:
        return compile_all(sources, PACKAGE, package.kernel_command("usable"))
    return compile_all(sources, BUILD, [toolchain.compiler, *package.kernel_flags("all")])


def build(toolchain: Toolchain) -> Path:
    """The driver, linked with the kernels."""
    parts = [*kernels(toolchain).values()]
    command = [toolchain.compiler, *package.kernel_flags("all")]
    parts += compile_all(sorted(HERE.glob("*.cpp")), BUILD, command).values()
    content = "".join(f"{path} {path.stat().st_mtime_ns}" for path in parts)
    target = BUILD / f"driver-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if not target.is_file():
        part = target.with_suffix(f".{os.getpid()}.part")
        subprocess.run([toolchain.compiler, *parts, *toolchain.link, "-o", part], check=True)
        os.replace(part, target)
    return target
