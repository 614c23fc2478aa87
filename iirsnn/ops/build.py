"""How iirsnn._C is compiled: shared by setup.py and the compilation at first use.

setup.py loads this file by its path, so it imports nothing of iirsnn, and torch only inside
functions.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
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
# Its OpenMP runtime is the one torch has already loaded: compile with -fopenmp, link without.
_OPENMP = ["-fopenmp"]
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


def recipe(mode: str) -> dict[str, Any]:
    """Sources (absolute paths) and flags: keys sources, cxx, nvcc, cuda (bool), why (str)."""
    folder = source_dir()
    sources = sorted(folder.rglob("*.cpp"))
    cuda, why = want_cuda(mode)
    cxx = [*CXX_FLAGS, *_OPENMP, f"-DIIRSNN_FLAGS={','.join(CXX_FLAGS)}"]
    if cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs()
        sources += sorted(folder.rglob("*.cu"))
        archs = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", ",").replace(" ", ",")
        cxx += ["-DIIRSNN_WITH_CUDA", f"-DIIRSNN_CUDA_ARCHS={archs}"]
    return {
        "sources": [str(path) for path in sources],
        "cxx": cxx,
        "nvcc": _NVCC_FLAGS if cuda else [],
        "cuda": cuda,
        "why": why,
    }


# ---- The engine, which needs no torch ----

#: Its library, which iirsnn.runtime loads; iirsnn._C holds the same objects.
ENGINE = "libiirsnn.so"


def engine_sources() -> list[Path]:
    """The sources of libiirsnn; csrc/CMakeLists.txt takes the same."""
    folder = source_dir()
    found = [
        *folder.glob("event/*.cpp"),
        *folder.glob("event/file/*.cpp"),
        *folder.glob("simd/*.cpp"),
    ]
    return sorted(path for path in found if path.name != "bind.cpp")


def compile_engine(folder: Path, version: str) -> list[str]:
    """The objects of its sources, compiled where they are older than what they are made of.

    Raises:
        subprocess.CalledProcessError: a source does not compile.
    """
    csrc = source_dir()
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in csrc.rglob("*.h"))
    flags = [*CXX_FLAGS, "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wno-psabi"]
    flags += [f'-DIIRSNN_VERSION="{version}"', f"-I{csrc}"]

    def compiled(source: Path) -> str:
        made = folder / f"{source.parent.name}-{source.stem}.o"
        if not made.exists() or made.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([*_compiler(), *flags, "-c", str(source), "-o", str(made)], check=True)
        return str(made)

    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(compiled, engine_sources()))


def link_engine(objects: list[str], file: Path) -> None:
    """Make the library of the objects."""
    file.parent.mkdir(parents=True, exist_ok=True)
    hidden = f"-Wl,--version-script={source_dir() / 'event' / 'exports.map'}"
    flags = ["-shared", "-pthread", "-s"]
    if sys.platform.startswith("linux"):
        flags.append(hidden)
    subprocess.run([*_compiler(), *flags, *objects, "-o", str(file)], check=True)


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


# ---- At first use ----


def load() -> str | None:
    """Import iirsnn._C, compiling it first where it is missing and a compiler is at hand.

    So too where it was compiled for another torch. Returns None when its ops are registered, else
    the reason why not. IIRSNN_JIT=0 never compiles. What was compiled is kept, see
    `_compiled_file`. Raises ValueError where IIRSNN_CPU_CAPABILITY asks for what this processor
    lacks.
    """
    from .compiled import for_another_torch

    missing = for_another_torch()
    try:
        if not missing:
            # reads IIRSNN_CPU_CAPABILITY: a wrong one raises here, not inside a parallel region
            importlib.import_module("iirsnn._C").build_info()
            return None
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

    from .. import cache

    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(chosen) / "iirsnn" if chosen else cache.folder()
    if folder is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    facts = [torch.__version__, torch.compiled_with_cxx11_abi(), sys.version, platform.machine()]
    facts += [compiler, version, plan["cxx"], plan["nvcc"], os.environ.get("CXXFLAGS", "")]
    digest = hashlib.sha256(repr(facts).encode())
    for source in sorted(source_dir().rglob("*")):
        if source.suffix in (".h", ".cpp", ".cu"):
            digest.update(source.relative_to(source_dir()).as_posix().encode() + b"\0")
            digest.update(source.read_bytes())
    return folder / "kernels" / digest.hexdigest()[:16] / f"{_JIT_NAME}.so"


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
        module: ModuleType = cpp_extension.load(
            name=_JIT_NAME,
            sources=plan["sources"],
            extra_cflags=plan["cxx"],
            extra_cuda_cflags=plan["nvcc"],
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
