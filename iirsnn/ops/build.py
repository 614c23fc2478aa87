"""How iirsnn._C is compiled: shared by setup.py and the compilation at first use.

setup.py loads this file by its path, so it imports nothing of iirsnn, and torch only inside
functions.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

# One rounding per operation and no fast math; the two -fno flags only drop errno and FP traps.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
# Its OpenMP runtime is the one torch has already loaded: compile with -fopenmp, link without.
_OPENMP = ["-fopenmp"]
_NVCC_FLAGS = ["-O3", "--fmad=false"]


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
    if not (source_dir() / "lif/cuda/lif_cuda.cu").is_file():
        reason = "csrc/lif/cuda/lif_cuda.cu is missing"
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


def load() -> str | None:
    """Import iirsnn._C, compiling it first where it is missing and a compiler is at hand.

    Returns None when its ops are registered, else the reason why not. IIRSNN_JIT=0 never compiles.
    The result of a compilation is cached by torch.utils.cpp_extension. Raises ValueError where
    IIRSNN_CPU_CAPABILITY asks for what this processor lacks.
    """
    try:
        # reads IIRSNN_CPU_CAPABILITY: a wrong one raises here, not inside a parallel region
        importlib.import_module("iirsnn._C").build_info()
        return None
    except ModuleNotFoundError:
        missing = "iirsnn._C is not compiled"
    except ImportError as error:  # built against another torch, or another Python
        return f"iirsnn._C cannot be imported: {error}"
    if os.environ.get("IIRSNN_JIT", "1") == "0":
        return f"{missing} and IIRSNN_JIT=0"
    try:
        return _compile_now()
    except (RuntimeError, OSError, ImportError) as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        return f"{missing} and compiling it now failed: {first}"


def _compile_now() -> str | None:
    import torch
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        return f"iirsnn._C is not compiled and there is no C++ compiler ({compiler})"
    mode = cuda_mode()
    if torch.cuda.is_available():  # what is compiled at first use is for this machine only
        major, minor = torch.cuda.get_device_capability()
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    elif mode == "auto":
        mode = "0"
    plan = recipe(mode)
    print("iirsnn: loading its kernels; the first time compiles them (a minute)", file=sys.stderr)
    module = cpp_extension.load(
        name="iirsnn_C",
        sources=plan["sources"],
        extra_cflags=plan["cxx"],
        extra_cuda_cflags=plan["nvcc"],
        extra_include_paths=[str(source_dir())],
        with_cuda=plan["cuda"],
    )
    sys.modules["iirsnn._C"] = module
    module.build_info()
    return None
