"""libiirsnn, loaded: its functions with their types, and its errors as ours."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path

from ..errors import RunError, UsageError

NAME = "libiirsnn.so"

_BAD_ARGUMENT, _BAD_FILE, _NO_MEMORY = 1, 2, 3


class NoNetwork(RunError):
    """A file or bytes that hold no network; `reason`: what was expected, and what came."""

    def __init__(self, reason: str, name: str = "network") -> None:
        super().__init__(f"{name}: cannot be read as an event network ({reason})")
        self.reason = reason


class Facts(ctypes.Structure):
    """iirsnn_facts."""

    _fields_ = [
        *((name, c_int64) for name in ("channels", "height", "width", "classes", "timesteps")),
        ("layers", c_int64),
        ("weight_bytes", c_int64),
        ("prepares_pixels", c_int),
    ]


class Layer(ctypes.Structure):
    """iirsnn_layer."""

    _fields_ = [
        ("kind", c_char_p),
        ("name", c_char_p),
        *((name, c_int64) for name in ("channels", "height", "width", "neurons", "spikes")),
        *((name, c_int64) for name in ("additions", "multiplications")),
        *((name, c_int64) for name in ("weight_bytes", "spike_bytes", "value_bytes")),
        ("milliseconds", c_double),
    ]


_FUNCTIONS = {
    "version": (c_char_p, []),
    "capability": (c_char_p, []),
    "set_capability": (c_int, [c_char_p]),
    "message": (c_char_p, []),
    "load_file": (c_int, [c_char_p, POINTER(c_void_p)]),
    "load_memory": (c_int, [c_char_p, c_size_t, POINTER(c_void_p)]),
    "release": (None, [c_void_p]),
    "describe": (c_int, [c_void_p, POINTER(Facts)]),
    "class_name": (c_char_p, [c_void_p, c_int64]),
    "image_notes": (c_char_p, [c_void_p]),
    "prepare": (c_int, [c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "run": (c_int, [c_void_p, c_void_p, c_int64, c_int, c_void_p, POINTER(c_void_p)]),
    "layer_of": (c_int, [c_void_p, c_int64, POINTER(Layer)]),
    "memory_of": (c_int, [c_void_p, POINTER(c_int64)]),
    "spikes_of": (c_int, [c_void_p, c_int64, POINTER(POINTER(c_uint64))]),
    "free_call": (None, [c_void_p]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library beside this file, or compiled at first use.

    Raises:
        RunError: it is not there and cannot be compiled, or cannot be loaded.
        UsageError: IIRSNN_CPU_CAPABILITY asks for what this processor lacks.
    """
    path = _file()
    try:
        found = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(found, f"iirsnn_{name}")
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # AttributeError: of another version
        raise RunError(f"the event engine cannot be loaded: {error}") from error
    if found.iirsnn_capability() is None:
        raise UsageError(found.iirsnn_message().decode())
    return found


def _file() -> Path:
    beside = Path(__file__).with_name(NAME)
    builder = Path(__file__).parents[1] / "ops" / "build.py"
    if beside.exists():
        return beside
    if not builder.exists():  # the distribution iirsnn-runtime compiles nothing
        raise RunError(f"the event engine needs {NAME}, which is not in {beside.parent}")
    import importlib.util

    # by its path: importing its package would need torch
    spec = importlib.util.spec_from_file_location("iirsnn.ops.build", builder)
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    try:
        found: Path = build.engine()
    except RuntimeError as error:
        raise RunError(f"the event engine cannot be loaded: {error}") from error
    return found


def set_capability(name: str) -> None:
    """Use the instruction set portable, avx2 or avx512; UsageError where there is none such."""
    check(library().iirsnn_set_capability(name.encode()))


def check(status: int) -> None:
    """Raises what a status stands for: UsageError, NoNetwork, MemoryError or RunError."""
    if status == 0:
        return
    message = library().iirsnn_message().decode(errors="replace")
    if status == _BAD_ARGUMENT:
        raise UsageError(message)
    if status == _BAD_FILE:
        raise NoNetwork(message)
    raise MemoryError(message) if status == _NO_MEMORY else RunError(message)
