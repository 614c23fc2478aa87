"""Memory traffic, measured: bytes that ops read and write, bytes autograd keeps, resident memory.

    with Traffic() as traffic:            every op that runs, of any library
        s = neuron(x)
    traffic.read, traffic.written         bytes

    with Kept(parameters) as kept:        what forward keeps for backward
        s = neuron(x)
    kept.bytes                            each storage once, parameters not counted

Bytes are those an op asks for, each tensor argument read once and each result written once,
whether or not a cache serves them.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Write an argument without reading it first.
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_")
# Take the shape of an argument and none of its elements.
SHAPE_ONLY = re.compile(r"(empty|new_|zeros_like|ones_like|full_like|rand|sym_|lift)")
# Return memory that nobody has written yet.
UNWRITTEN = re.compile(r"(empty|new_empty|resize_)")


def touched(tensor: Tensor) -> int:
    """Bytes of the elements, those of an expanded dimension once."""
    if tensor.numel() == 0:
        return 0
    sizes = [
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0
    ]
    return torch.Size(sizes).numel() * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    """The same elements of the same memory (an op that takes one twice reads it once)."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (
        b.data_ptr(),
        b.shape,
        b.stride(),
        b.dtype,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Traffic(TorchDispatchMode):
    """Counts the bytes that every op reads and writes.

    A view moves nothing. An in-place op reads and writes its target, or writes it alone (copy_,
    fill_...). iirsnn's ops and torch's own count as their arguments and results; a custom op of
    another library is entered, and what it calls is counted instead. A kernel fused by
    torch.compile counts as the buffers it is given (const: read; else written, and read as well
    where it is an in-out buffer).
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0
        self.ops: dict[str, int] = {}
        self.entered: set[Any] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled code stays compiled under this mode

    def __enter__(self) -> Traffic:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)

    def add(self, name: str, read: int, written: int) -> None:
        self.read += read
        self.written += written
        self.ops[name] = self.ops.get(name, 0) + read + written

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in ("aten", "prims", "iirsnn"):
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs
                )
        result = func(*args, **kwargs)
        self.add(str(func), *self.of(func, args, kwargs, result))
        return result

    @staticmethod
    def of(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
        """(bytes read, bytes written) of one call."""
        name = func._schema.name.split("::")[1]
        inputs: list[Tensor] = []
        targets: list[Tensor] = []
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            info = argument.alias_info
            if info is None or not info.is_write:
                inputs += _tensors(value)
                continue
            targets += _tensors(value)
            if not argument.is_out and name not in OVERWRITES:
                inputs += _tensors(value)
        outputs = _tensors(result)
        storages = {_storage(t) for t in inputs if t.numel()}
        fresh = [t for t in outputs if _storage(t) not in storages]
        if outputs and not targets and not fresh:
            return 0, 0  # a view
        if SHAPE_ONLY.match(name):
            inputs = []
        unique: list[Tensor] = []
        for tensor in inputs:
            if not any(_same(tensor, other) for other in unique):
                unique.append(tensor)
        written = targets or ([] if UNWRITTEN.match(name) else fresh)
        return sum(map(touched, unique)), sum(map(touched, written))


# ---- Kernels that torch.compile fuses ----

_active: list[Traffic] = []


def watch_inductor() -> None:
    """From now on, kernels that Inductor compiles for the CPU report to the active Traffic."""
    compile_module = importlib.import_module("torch._inductor.async_compile")
    original = compile_module.AsyncCompile.cpp_pybinding
    if getattr(original, "watched", False):
        return

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        kernel = original(self, argtypes, source_code)
        return _Watched(kernel, argtypes, source_code)

    cpp_pybinding.watched = True  # type: ignore[attr-defined]
    compile_module.AsyncCompile.cpp_pybinding = cpp_pybinding


class _Watched:
    """A fused kernel, or the future of one."""

    def __init__(self, kernel: Any, argtypes: list[str], source_code: str) -> None:
        self.kernel = kernel
        self.argtypes = argtypes
        # Inductor names what a kernel updates in place.
        self.in_out = [bool(name) for name in _in_out(argtypes, source_code)]

    def __call__(self, *args: Any) -> None:
        if hasattr(self.kernel, "result"):
            self.kernel = self.kernel.result()
        self.kernel(*args)
        if _active:
            read, written = fused_bytes(args, self.argtypes, self.in_out)
            _active[-1].add("fused kernel", read, written)


def _in_out(argtypes: list[str], source_code: str) -> list[str]:
    """For each argument its name if it is an in-out buffer, else ""."""
    found = re.search(r"void\s+kernel\((.*?)\)\s*\{", source_code, re.DOTALL)
    names = re.findall(r"(\w+)\s*(?:,|$)", found.group(1)) if found else []
    if len(names) != len(argtypes):
        raise RuntimeError(f"traffic: cannot read the arguments of an Inductor kernel: {names}")
    return [name if name.startswith("in_out") else "" for name in names]


def fused_bytes(args: Iterable[Any], argtypes: list[str], in_out: list[bool]) -> tuple[int, int]:
    """(bytes read, bytes written) of a fused kernel, from its C++ argument types."""
    read = written = 0
    for value, kind, both in zip(args, argtypes, in_out, strict=True):
        if not isinstance(value, Tensor):
            continue
        size = touched(value)
        if kind.startswith("const") or both:
            read += size
        if not kind.startswith("const"):
            written += size
    return read, written


# ---- What autograd keeps ----


class Kept:
    """Bytes that a forward pass keeps for backward: unique storages, without `parameters`."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.excluded = {_storage(p) for p in parameters}
        self.storages: dict[int, tuple[Tensor, int]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self.excluded:
            # The tensor is held, so that no other storage takes its address.
            self.storages[key] = (tensor.detach(), tensor.untyped_storage().nbytes())
        return tensor

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.storages.values())


# ---- Resident memory ----


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process that are in memory now; key="VmHWM": the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
    assert found, status
    return 1024 * int(found.group(1))


def forget_peak() -> None:
    """Sets the peak of resident memory to what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5\n")


def peak_of(step: Callable[[], Any]) -> dict[str, int]:
    """Resident bytes before one call of `step`, and at its peak; one call before warms up."""
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the warm-up freed goes back to the system
    forget_peak()
    before = resident()
    step()
    return {"before": before, "peak": resident("VmHWM")}
