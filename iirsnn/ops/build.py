"""How iirsnn._C is compiled: shared by setup.py and the compilation at first use.

setup.py loads this file by its path, so it imports nothing of iirsnn, and torch only inside
functions.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# One rounding per operation and no fast math; the two -fno flags only drop errno and FP traps.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
# Of what is between torch and the kernels: no loops, and in half the time.
_GLUE_FLAGS = ["-O1"]
_NVCC_FLAGS = ["-O3", "--fmad=false"]

#: Of the extension that is compiled at first use.
_JIT_NAME = "iirsnn_C"


def source_dir() -> Path:
    """csrc/ of a checkout, or the copy inside an installed package."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "csrc", here.parent / "csrc"):
        if (folder / "module.cpp").is_file():
            return folder
    raise FileNotFoundError(f"csrc/module.cpp is neither in {here} nor beside it")


def cuda_mode() -> str:
    """IIRSNN_BUILD_CUDA: auto (the default), 0 or 1."""
    mode = os.environ.get("IIRSNN_BUILD_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise RuntimeError(f"IIRSNN_BUILD_CUDA: expected auto, 0 or 1, got {mode!r}")
    return mode


def want_cuda(mode: str) -> tuple[bool, str]:
    """Whether to build the CUDA kernels under a mode of `cuda_mode`, and why.

    A GPU need not be present. Raises RuntimeError for 1 without a toolkit or with a CPU-only torch.
    """
    import torch
    from torch.utils import cpp_extension

    if mode == "0":
        return False, "IIRSNN_BUILD_CUDA=0"
    home = cpp_extension.CUDA_HOME
    reason = ""
    if not (source_dir() / "lif/cuda/lif_forward.cu").is_file():
        reason = "csrc/lif/cuda/lif_forward.cu is missing"
    elif torch.version.cuda is None:
        reason = "this torch was built without CUDA"
    elif home is None or shutil.which("nvcc", path=str(Path(home) / "bin")) is None:
        reason = "nvcc was not found (set CUDA_HOME)"
    elif not (Path(home) / "include" / "cuda_runtime.h").is_file():
        reason = f"{home} has nvcc but no include/cuda_runtime.h (set CUDA_HOME)"
    if reason and mode == "1":
        raise RuntimeError(
            f"IIRSNN_BUILD_CUDA=1: expected a CUDA build to be possible, but {reason}"
        )
    return not reason, reason or f"nvcc of {home}"


def cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, or what the toolkit can target from Turing (CUDA 12: Volta) on."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if asked:
        return asked
    import torch

    major = int((torch.version.cuda or "0").split(".")[0])
    archs = ["7.5", "8.0", "8.6", "8.9", "9.0"]
    if major < 13:
        archs.insert(0, "7.0")
    if major >= 13:
        archs += ["10.0", "12.0"]
    return ";".join([*archs[:-1], archs[-1] + "+PTX"])


def recipe(mode: str, capabilities: str = "native") -> dict[str, Any]:
    """How it is compiled: keys sources, cxx, nvcc, kernels, cuda (bool), why (str).

    Sources (absolute paths) are those that torch's tools compile, by the flags cxx and nvcc;
    kernels is the `kernel_command` of the others, for `capabilities` where nothing else is asked.
    """
    sources = [_glue_source()]
    cuda, why = want_cuda(mode)
    cxx = [*CXX_FLAGS, *_GLUE_FLAGS, *_openmp(), f"-DIIRSNN_FLAGS={','.join(CXX_FLAGS)}"]
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
        found = {*source_dir().rglob("*.cu"), *source_dir().rglob("*_cuda.cpp")}
        sources += sorted(found)
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", ",").replace(" ", ",")
        cxx += ["-DIIRSNN_WITH_CUDA", f"-DIIRSNN_CUDA_ARCHS={archs}"]
    return {
        "sources": [str(path) for path in sources],
        "cxx": cxx,
        "nvcc": _NVCC_FLAGS if cuda else [],
        "kernels": kernel_command(capabilities),
        "cuda": cuda,
        "why": why,
    }


def _openmp() -> list[str]:
    """GCC's OpenMP runtime is the one torch has loaded: compile with -fopenmp, link without.

    Clang's is another, in which torch's functions number no threads: its kernels run on one.
    """
    command = [*_compiler(), "-dM", "-E", "-x", "c++", os.devnull]
    macros = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [] if "__clang__" in macros else ["-fopenmp"]


# ---- The kernels, which need no torch ----

#: The library of the engine, which iirsnn.runtime loads.
ENGINE = "libiirsnn.so"
_WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-missing-field-initializers"]
#: By the macros that a compiler for this processor defines; more than portable on x86-64 alone.
_CAPABILITIES = {
    "avx512": {"__AVX512F__", "__AVX512BW__", "__AVX512VL__", "__AVX512DQ__"},
    "avx2": {"__AVX2__", "__F16C__", "__BMI__"},
}
_LIMITS = {"portable": ["-DIIRSNN_PORTABLE_ONLY"], "avx2": ["-DIIRSNN_NO_AVX512"], "avx512": []}


def kernel_sources() -> list[Path]:
    """The sources that need neither torch nor Python, those that take longest first."""
    root = source_dir()
    # those below a folder torch are what that of the glue includes
    found = {p for p in root.rglob("*.cpp") if "torch" not in p.relative_to(root).parts}
    first = ("backward", "through_time", "spike_", "tiles", "streams")
    return sorted(
        found - {_glue_source()},
        key=lambda path: (not any(part in path.name for part in first), path),
    )


def extension_sources() -> list[Path]:
    """Those of them that iirsnn._C is made of: all but the engine's."""
    return [path for path in kernel_sources() if source_dir() / "event" not in path.parents]


def _glue_source() -> Path:
    return source_dir() / "module.cpp"


def engine_sources() -> list[Path]:
    """The sources of libiirsnn, as csrc/event/sources.txt lists them."""
    folder = source_dir()
    patterns = (folder / "event" / "sources.txt").read_text(encoding="utf-8").split()
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def kernel_flags(capabilities: str) -> list[str]:
    """How a kernel is compiled: for native, what this processor has; usable, that and all that it
    includes; or all.

    Raises:
        RuntimeError: another word.
    """
    if capabilities not in ("native", "usable", "all"):
        raise RuntimeError(
            f"IIRSNN_CAPABILITIES: expected native, usable or all, got {capabilities!r}"
        )
    highest = "avx512" if capabilities == "all" else _processor_capability()
    alone = ["-DIIRSNN_HIGHEST_ALONE"] if capabilities == "native" else []
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi", *_WARNINGS]
    version = f'-DIIRSNN_VERSION="{_version()}"'
    return [*CXX_FLAGS, *flags, *_LIMITS[highest], *alone, version]


def _processor_capability() -> str:
    """What the compiler finds here: portable, avx2 or avx512; each includes those before."""
    command = [*_compiler(), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    macros = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
    if (
        "__x86_64__" not in macros
    ):  # not x86-64, or a compiler that does not say: nothing is left out
        return "avx512"
    return next((name for name, needs in _CAPABILITIES.items() if needs <= macros), "portable")


def kernel_command(capabilities: str = "native") -> list[str]:
    """The compiler and its flags, for IIRSNN_CAPABILITIES or else `capabilities`."""
    asked = os.environ.get("IIRSNN_CAPABILITIES") or capabilities
    return [*_compiler(), *kernel_flags(asked)]


def compile_objects(sources: list[Path], folder: Path, command: list[str]) -> dict[Path, Path]:
    """The object of each source, compiled where it is older than what it is made of.

    Those of each command lie in a folder of their own, with what the compiler said (.log).

    Raises:
        subprocess.CalledProcessError: a source does not compile.
    """
    folder /= hashlib.sha256(repr(command).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        if made.exists() and _newest(made.with_suffix(".d")) < made.stat().st_mtime:
            return made
        part = made.with_suffix(f".{os.getpid()}.o")
        files = [f"-I{source_dir()}", "-c", str(source), "-o", str(part)]
        files += ["-MMD", "-MF", str(made.with_suffix(".d"))]
        with made.with_suffix(".log").open("w+") as log:
            try:
                subprocess.run([*command, *files], check=True, stderr=log)
            except subprocess.CalledProcessError:
                log.seek(0)
                sys.stderr.write(log.read())
                raise
        os.replace(part, made)
        return made

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(sources, pool.map(compiled, sources), strict=True))


def _newest(dependencies: Path) -> float:
    """When the newest file of a compiler's list of them was changed; never, where one is gone."""
    try:
        names = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
        return max(os.stat(name).st_mtime for name in names)
    except OSError:
        return float("inf")


def link_engine(objects: dict[Path, Path], file: Path) -> None:
    """Make the library of its objects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    hidden = f"-Wl,--version-script={source_dir() / 'event' / 'exports.map'}"
    flags = ["-shared", "-pthread", "-s"]
    if sys.platform.startswith("linux"):
        flags.append(hidden)
    parts = [str(objects[source]) for source in engine_sources()]
    subprocess.run([*_compiler(), *flags, *parts, "-o", str(file)], check=True)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def _version() -> str:
    """Of a checkout, or of what is installed."""
    project = source_dir().parent / "pyproject.toml"
    if not project.is_file():
        return importlib.metadata.version("iirsnn")
    text = project.read_text(encoding="utf-8")
    found: list[str] = re.findall(r'^version = "(.*)"', text, re.MULTILINE)
    return found[0]


# ---- At first use ----


def load() -> str | None:
    """Import iirsnn._C, compiling it first where it is missing and a compiler is at hand.

    So too where it was compiled for another torch. Returns None when its ops are registered, else
    the reason why not. IIRSNN_JIT=0 never compiles. What was compiled is kept, see
    `_compiled_file`. Raises UsageError where IIRSNN_CPU_CAPABILITY asks for what this processor
    lacks.
    """
    from .compiled import for_another_torch

    missing = for_another_torch()
    try:
        if not missing:
            # reads IIRSNN_CPU_CAPABILITY: a wrong one raises here, not inside a parallel region
            importlib.import_module("iirsnn._C").build_info()
            return None
    except ValueError as error:
        from ..errors import UsageError

        raise UsageError(str(error)) from None
    except ModuleNotFoundError:
        missing = "iirsnn._C is not compiled"
    except ImportError as error:  # what another torch had and this one has not
        missing = f"iirsnn._C is not for this torch ({_first_line(error)})"
    if os.environ.get("IIRSNN_JIT", "1") == "0":
        return f"{missing} and IIRSNN_JIT=0"
    try:
        return _compile_now(missing)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        return f"{missing} and compiling it now failed: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [type(error).__name__]
    return first


def _compile_now(missing: str) -> str | None:
    import torch
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"{missing} and there is no C++ compiler ({compiler})"
    mode = cuda_mode()
    if torch.cuda.is_available():  # what is compiled at first use is for this machine only
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    elif mode == "auto":
        mode = "0"
    plan = recipe(mode)
    file = _compiled_file(plan, compiler)
    if file is None:
        return f"{missing} and there is no folder to compile in: set HOME or XDG_CACHE_HOME"
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent):
        if file.is_file():
            module = _import(file)
        else:
            print(f"iirsnn: {missing}; compiling its kernels, a minute", file=sys.stderr)
            module = _compile(plan, file)
    sys.modules["iirsnn._C"] = module
    module.build_info()
    return None


def _compiled_file(plan: dict[str, Any], compiler: str) -> Path | None:
    """Where the compiled extension is kept: by a hash of its sources, flags, torch and compiler.

    None for a user without a home.
    """
    import torch

    facts = [torch.__version__, torch.compiled_with_cxx11_abi(), sys.version]
    facts += [plan["cxx"], plan["nvcc"], plan["kernels"]]
    return _kept_file(f"{_JIT_NAME}.so", compiler, facts)


def _kept_file(name: str, compiler: str, facts: list[Any]) -> Path | None:
    """Where what is compiled of csrc is kept: by a hash of it, the compiler, the machine, `facts`.

    None for a user without a home.
    """
    from .. import cache

    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen) / "iirsnn" if chosen else cache.folder()
    if folder is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    facts = [*facts, platform.machine(), compiler, version, os.environ.get("CXXFLAGS", "")]
    digest = hashlib.sha256(repr(facts).encode())
    for source in sorted(source_dir().rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu", ".map", ".txt"):
            digest.update(source.relative_to(source_dir()).as_posix().encode() + b"\0")
            digest.update(source.read_bytes())
    return folder / "kernels" / digest.hexdigest()[:16] / name


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While one process compiles, others wait; the lock of one that is killed is gone with it."""
    import fcntl

    with (folder / "lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks: each compiles for itself
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(plan: dict[str, Any], file: Path) -> ModuleType:
    """Compile in a folder of its own, which what a killed compiler leaves behind cannot disturb."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=file.parent, ignore_cleanup_errors=True) as folder:
        kernels = compile_objects(extension_sources(), Path(folder), plan["kernels"])
        module: ModuleType = cpp_extension.load(
            name=_JIT_NAME,
            sources=plan["sources"],
            extra_cflags=plan["cxx"],
            extra_cuda_cflags=plan["nvcc"],
            extra_ldflags=[str(path) for path in kernels.values()],
            extra_include_paths=[str(source_dir())],
            with_cuda=plan["cuda"],
            build_directory=folder,
        )
        os.replace(str(module.__file__), file)
    module.__file__ = str(file)
    return module


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_JIT_NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine() -> Path:
    """libiirsnn, compiled now or kept from before: where `iirsnn.runtime` is installed without it.

    It takes no torch. IIRSNN_JIT=0 never compiles. Where it is kept: see `_kept_file`.

    Raises:
        RuntimeError: it cannot be compiled; the reason why.
    """
    missing, compiler = f"{ENGINE} is not compiled", _compiler()[0]
    if os.environ.get("IIRSNN_JIT", "1") == "0":
        raise RuntimeError(f"{missing} and IIRSNN_JIT=0")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"{missing} and there is no C++ compiler ({compiler})")
    try:
        command = kernel_command()
        file = _kept_file(ENGINE, compiler, command)
        if file is None:
            raise OSError("there is no folder to compile in: set HOME or XDG_CACHE_HOME")
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.parent):
            if not file.is_file():
                print(f"iirsnn: {missing}; compiling it, a minute", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                    made = Path(folder) / ENGINE
                    link_engine(compile_objects(engine_sources(), Path(folder), command), made)
                    os.replace(made, file)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{missing} and compiling it now failed: {_first_line(error)}"
        ) from error
    return file
