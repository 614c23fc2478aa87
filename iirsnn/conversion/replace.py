"""Neurons of SpikingJelly, snnTorch, Norse and sinabs, on the kernels of iirsnn, checked."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError, one_line
from .peers.equation import NoEqualError

LIBRARIES = {
    "norse": "Norse",
    "sinabs": "sinabs",
    "snntorch": "snnTorch",
    "spikingjelly": "SpikingJelly",
}

#: Of a state or gradient in float64, relative to the largest value of the original's. It is float32
#: rounding: snnTorch and sinabs make their spikes, and so a gradient, float32 whatever the input.
TOLERANCE = 1e-5
#: Of spikes in float32: membranes that rounding moves across the threshold.
FLIPS = 1e-3


@dataclass(frozen=True)
class Difference:
    """A neuron against its original on the same random currents, in one dtype.

    flips, spikes: spikes that differ, of how many. largest: difference of a membrane, state or
    gradient, relative to the largest value of that tensor.
    """

    flips: int = 0
    spikes: int = 0
    largest: float = 0.0


@dataclass(frozen=True)
class Replacement:
    """What became of one neuron.

    name: in the model. original: its class. became: the class it has now; None where it was left,
    and `reason` says why. surrogate: of the kernels, or "library" where backward takes the
    original's own function. in_float64, in_float32: the checks, None where none was made.
    """

    name: str
    original: str
    became: str | None = None
    surrogate: str = ""
    reason: str = ""
    in_float64: Difference | None = None
    in_float32: Difference | None = None


@dataclass(frozen=True)
class Replacements:
    """What `replace_neurons` did, a row a neuron; str() of it is a table."""

    rows: tuple[Replacement, ...]

    @property
    def replaced(self) -> tuple[Replacement, ...]:
        """The neurons that run on the kernels now."""
        return tuple(row for row in self.rows if row.became)

    @property
    def left(self) -> tuple[Replacement, ...]:
        """The neurons that stayed as they were, each with its reason."""
        return tuple(row for row in self.rows if not row.became)

    def __str__(self) -> str:
        if not self.rows:
            return f"no neuron of {', '.join(LIBRARIES.values())} found"
        head = ("name", "neuron", "became", "surrogate", "float64", "float32", "spikes that differ")
        cells = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head) - 1)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]])
            for line in cells
        )


def _cells(row: Replacement) -> tuple[str, ...]:
    start = (row.name or "(model)", row.original)
    if not row.became or not row.in_float64 or not row.in_float32:
        return *start, "left", "", "", "", row.reason
    single = row.in_float32
    return (
        *(*start, row.became, row.surrogate),
        *(f"{check.largest:.1e}" for check in (row.in_float64, single)),
        f"{single.flips} of {single.spikes}",
    )


def replace_neurons(model: nn.Module, *, strict: bool = False) -> Replacements:
    """Let the neurons of other libraries in `model` run by `iirsnn.functional.lif`, in place.

    SpikingJelly's IFNode, LIFNode and ParametricLIFNode, snnTorch's Leaky and Lapicque, Norse's
    LIFBoxCell, LIFCell, LIF and Lift around a cell, sinabs' LIF and IAF with single spikes and
    their Squeeze variants. Each keeps its parameters, state, state_dict, call signature, hooks and
    the reset of its library: it is given a subclass of its class with another forward pass.

    A copy of each neuron is first run on random currents over several timesteps, beside its
    original: in float64 spikes are equal, and membranes and gradients to within rounding, or the
    neuron is left. So is one whose options have no equal here (several spikes a step, recurrence,
    inhibition, a recorded membrane, ...). Neurons that were replaced before are passed over.

    strict: raise UsageError (a ValueError) where a neuron would be left, and change nothing.
    Returns a table of what became of each neuron, and why one was left.
    """
    rows, accepted = [], []
    for name, module in model.named_modules():
        peer = _peer_of(module)
        if peer is None or type(module) in peer.FUSED.values():
            continue
        row = _tried(name, module, peer)
        rows.append(row)
        if row.became:
            accepted.append((module, peer))
    done = Replacements(tuple(rows))
    if strict and done.left:
        reasons = "; ".join(
            f"{row.name or 'model'} ({row.original}): {row.reason}" for row in done.left
        )
        raise UsageError(f"replace_neurons: expected neurons that all have an equal, got {reasons}")
    for module, peer in accepted:
        _exchange(module, peer)
    return done


def _peer_of(module: nn.Module) -> Any:
    """The module of `peers` for the library whose neuron this is (or a subclass); else None."""
    for base in type(module).__mro__:
        library = base.__module__.partition(".")[0]
        if library in LIBRARIES:
            peer = import_module(f"{__package__}.peers.{library}")
            return peer if peer.is_neuron(module) else None
    return None


def _exchange(module: nn.Module, peer: Any) -> None:
    for each in module.modules():
        each.__class__ = peer.FUSED.get(type(each), type(each))


def _tried(name: str, module: nn.Module, peer: Any) -> Replacement:
    """The row of one neuron; `became` where it may be exchanged."""
    library = type(module).__module__.partition(".")[0]
    original = f"{LIBRARIES.get(library, library)} {type(module).__name__}"
    became = peer.FUSED.get(type(module))
    if became is None:
        known = ", ".join(sorted(each.__name__ for each in peer.FUSED))
        return Replacement(name, original, reason=f"not one of {known}")
    try:
        scale = peer.equation(module).kernel_scale()
        with torch.random.fork_rng(devices=[]):
            double, single = (_compared(module, peer, d) for d in (torch.float64, torch.float32))
    except NoEqualError as error:
        return Replacement(name, original, reason=str(error))
    except Exception as error:  # of the library, on currents it was not made for
        return Replacement(name, original, reason=f"it could not be checked: {one_line(error)}")
    if double.flips or double.largest > TOLERANCE or single.flips > FLIPS * single.spikes:
        reason = (
            f"not the same on random currents: {double.flips} of {double.spikes} spikes differ in "
            f"float64, {single.flips} in float32, states and gradients by {double.largest:.1e}"
        )
        return Replacement(name, original, None, "", reason, double, single)
    surrogate = "library" if scale is None else peer.equation(module).surrogate.name
    return Replacement(name, original, became.__name__, surrogate, "", double, single)


def _compared(module: nn.Module, peer: Any, dtype: torch.dtype) -> Difference:
    flips = spikes = 0
    largest = 0.0
    for seed, shape in enumerate(_shapes(peer.parameter_shapes(module))):
        original = _copy(module, dtype)
        fused = _copy(module, dtype)
        _exchange(fused, peer)
        x = _current(peer.equation(original), shape, dtype, seed)
        s, *others = _run(original, peer, x, seed)
        s_fused, *others_fused = _run(fused, peer, x, seed)
        flips += int((s != s_fused).sum())
        spikes += s.numel()
        for a, b in zip(others, others_fused, strict=True):
            largest = max(largest, _relative(a, b))
    return Difference(flips, spikes, largest)


def _shapes(parameters: list[torch.Size]) -> list[tuple[int, ...]]:
    """Currents [T, B, ...] that parameters of these shapes broadcast to."""
    several = [tuple(shape) for shape in parameters if len(shape) > 0 and shape.numel() > 1]
    if not several:
        return [(8, 3, 37), (5, 2, 3, 5, 6), (1, 2, 11), (2, 65)]
    neurons = tuple(max(3, size) if size == 1 else size for size in max(several, key=len))
    return [(8, 3, *neurons), (2, 2, *neurons)]


def _current(equation: Any, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """About a third of the neurons fire."""
    rng = torch.Generator().manual_seed(seed)
    height, gain = (
        torch.as_tensor(p, dtype=dtype).detach() for p in (equation.height(), equation.gain)
    )
    unit = height.mean() / gain.mean()
    return (0.3 + torch.randn(shape, generator=rng, dtype=torch.float64)).to(dtype) * unit


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU, without hooks; what it computed before is detached."""
    memo: dict[int, Any] = {
        id(getattr(module, name)): OrderedDict()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    }
    for each in module.modules():
        memories = getattr(each, "_memories", {})
        for tensor in (*vars(each).values(), *each._buffers.values(), *memories.values()):
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(module, memo).to("cpu", dtype)


def _run(module: nn.Module, peer: Any, x: Tensor, seed: int) -> list[Tensor]:
    """Spikes, states and gradients of x and of the parameters, of a random sum of the outputs."""
    rng = torch.Generator().manual_seed(seed)
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        outputs = peer.unroll(module, x)
        loss = torch.zeros((), dtype=torch.float64)
        for out in outputs:
            weights = torch.randn(out.shape, generator=rng, dtype=torch.float64)
            loss = loss + (out.double() * weights).sum()
        wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    none = torch.zeros(())
    return [out.detach() for out in outputs] + [none if g is None else g for g in grads]


def _relative(a: Tensor, b: Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    scale = a.abs().max().item()
    return (a - b).abs().max().item() / (scale or 1.0)
