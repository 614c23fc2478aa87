"""The LIF neuron as a module. It knows shapes and state; which kernel runs is functional.lif's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_choice
from ..functional import SCALES, lif
from ..ops.backend import direct
from ..ops.reference import RESETS, acc_dtype
from ..ops.surrogates import SURROGATES


class FusedLIF(nn.Module):
    """Leaky integrate-and-fire neurons over time: the equation is in `iirsnn.functional.lif`.

    Takes an input current [T, B, ...] and returns spikes of the same shape and dtype, or
    (spikes, v [B, ...]) with return_v, or PackedSpikes with packed.

    threshold, leak: where they start. channels=None: one of each for the layer; channels=C: one a
        channel, along dim 2 of [T, B, C, ...]. learn_threshold, learn_leak: parameters, else
        buffers.
    stateful: keep the last membrane and start the next call from it, detached, so that a stream may
        come in pieces of any length; `reset_state()` forgets it. See `state`.
    Raises ValueError for a value out of range, or an input that does not go on where the state is.

    state: the membrane [B, ...] that a stateful neuron keeps, in float32, or float64 for a float64
        input; None before the first call. It is the process's own: no parameter and no buffer, so
        it is not in the state_dict, DistributedDataParallel does not broadcast it and averaged
        models do not average it. It follows .to() to another device, and to float64 and back; a
        deepcopy and a pickle carry a copy of it. It stays one tensor, written in place, so that
        the replays of a CUDA graph go on from each other (call once before the capture). A call
        inside a backward pass, where activation checkpointing computes again what it did not keep,
        raises RuntimeError: the state that it started from is gone.
    """

    over_time = True  # takes [T, B, ...] as a whole, not one merged T*B axis
    threshold: Tensor
    leak: Tensor
    state: Tensor | None

    def __init__(
        self,
        threshold: float = 1.0,
        leak: float = 1.0,
        *,
        channels: int | None = None,
        learn_threshold: bool = True,
        learn_leak: bool = True,
        stateful: bool = False,
        reset: str = "soft",
        v_reset: float = 0.0,
        detach_reset: bool = True,
        surrogate: str = "triangle",
        surrogate_scale: float | None = None,
        packed: bool = False,
        return_v: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("threshold", threshold), ("leak", leak)):
            if isinstance(value, Tensor) and value.numel() != 1:
                shape = tuple(value.shape)
                raise TypeError(f"{name}: expected a number (channels=C for one each), got {shape}")
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold: expected a finite number > 0, got {threshold}")
        if not math.isfinite(leak):
            raise ValueError(f"leak: expected a finite number, got {leak}")
        if channels is not None and channels < 1:
            raise ValueError(f"channels: expected None or a number >= 1, got {channels}")
        check_choice("reset", reset, RESETS)
        check_choice("surrogate", surrogate, tuple(SURROGATES))
        self.channels = channels
        self.stateful = stateful
        self.reset = reset
        self.v_reset = v_reset
        self.detach_reset = detach_reset
        self.surrogate = surrogate
        self.surrogate_scale = surrogate_scale
        self.packed = packed
        self.return_v = return_v
        self.backend = backend
        self._initial = {"threshold": float(threshold), "leak": float(leak)}
        for name, learn in (("threshold", learn_threshold), ("leak", learn_leak)):
            tensor = torch.full((channels or 1,), self._initial[name])
            if learn:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.state = None
        self._fresh = False  # state is 0, and any other shape may take its place

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give threshold and leak the numbers of the constructor again, as after `to_empty`."""
        for name, value in self._initial.items():
            getattr(self, name).fill_(value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            len(args) == 1
            and not kwargs
            and not torch.compiler.is_compiling()
            and type(self).forward is _FORWARD
            and nn.Module.__call__ is _MODULE_CALL
        ):
            call = direct("neuron_call")
            result = None if call is None else call(self.__dict__, args[0], SCALES, _HOOKS)
            if result is not None:
                return result
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            call = direct("neuron_call")  # lif, but for looking up a dozen attributes
            result = None if call is None else call(self.__dict__, x, SCALES)
            if result is not None:
                return result
        v0 = self._before(x) if self.stateful else None
        result = lif(
            x,
            self.threshold,
            self.leak,
            v0,
            reset=self.reset,
            v_reset=self.v_reset,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate,
            surrogate_scale=self.surrogate_scale,
            packed=self.packed,
            return_v=self.return_v or self.stateful,
            backend=self.backend,
        )
        if not self.stateful:
            return result
        s, v = result
        assert self.state is not None
        self.state.copy_(v.detach())
        self._fresh = False
        return (s, v) if self.return_v else s

    def _before(self, x: Tensor) -> Tensor:
        """The state that a call with x starts from, as nothing later changes it."""
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "FusedLIF: expected no call of a stateful neuron inside a backward pass "
                "(activation checkpointing would compute it again from another state), got "
                "one; use stateful=False, or pass the membrane to iirsnn.functional.lif as v0"
            )
        state, dtype = self.state, acc_dtype(x.dtype)
        same = state is not None and (state.shape, state.device) == (x.shape[1:], x.device)
        if state is None or (self._fresh and not same):
            if not compiling and x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("FusedLIF: expected a call before the capture of a CUDA graph")
            with torch.inference_mode(False):  # training may go on from it
                state = torch.zeros_like(x[0], dtype=dtype)
        elif not same:
            raise ValueError(
                f"x: expected [T, {', '.join(map(str, state.shape))}] on {state.device}, like the "
                f"call that the state is from, got {tuple(x.shape)} on {x.device}; call "
                "reset_state() before another batch"
            )
        self.state = state.to(dtype)
        if not torch.is_grad_enabled():
            return self.state
        copied: Tensor = (
            torch.ops.iirsnn.copy_of_state(self.state) if compiling else self.state.clone()
        )
        return copied

    def reset_state(self) -> None:
        """Forget the membrane: the next call starts from 0, and may be of another shape."""
        if self.state is not None:
            self.state.zero_()  # in place: a CUDA graph knows this tensor
            self._fresh = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What .to() and its like do, to the state too."""
        super()._apply(fn, recurse)
        if self.state is not None:
            like = fn(self.state.new_empty(0))
            dtype = self.state.dtype if like.dtype.itemsize < 4 else like.dtype
            on_meta = self.state.is_meta and not like.is_meta  # there is nothing to be moved
            self.state = None if on_meta else self.state.to(like.device, dtype)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.state is not None:  # another process may have sent memory that both write to
            self.state = self.state.clone()

    @torch.no_grad()
    def constrain_(self) -> None:
        """Clamp leak to <= 1 and threshold to >= 1e-3, in place; after each optimiser step."""
        self.leak.clamp_(max=1.0)
        self.threshold.clamp_(min=1e-3)

    def extra_repr(self) -> str:
        def show(name: str) -> str:
            value = getattr(self, name).detach()
            if value.is_meta:
                return f"{name}=meta"
            low, high = value.min().item(), value.max().item()
            text = f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"
            return f"{name}={text}" + (" (fixed)" if name not in self._parameters else "")

        parts = [show("threshold"), show("leak")]
        if self.channels is not None:
            parts.append(f"channels={self.channels}")
        parts.append(f"reset={self.reset}")
        if self.reset == "hard":
            parts.append(f"v_reset={self.v_reset:g}")
        scale = self.surrogate_scale
        parts.append(f"surrogate={self.surrogate}" + ("" if scale is None else f"({scale:g})"))
        if not self.detach_reset:
            parts.append("detach_reset=False")
        parts += [name for name in ("stateful", "packed", "return_v") if getattr(self, name)]
        if self.backend != "auto":
            parts.append(f"backend={self.backend}")
        return ", ".join(parts)


# What a call is to find as it was, to go round nn.Module's, which costs as much as a kernel.
_FORWARD, _MODULE_CALL = FusedLIF.forward, nn.Module.__call__
_HOOKS = tuple(
    getattr(nn.modules.module, f"_global_{name}_hooks")
    for name in ("forward", "forward_pre", "backward", "backward_pre")
)


def reset_state(model: nn.Module) -> None:
    """Call `reset_state()` of every module in the model that has one: its streams end here."""
    for module in model.modules():
        reset = getattr(module, "reset_state", None)
        if callable(reset):
            reset()


def neurons(model: nn.Module) -> list[FusedLIF]:
    """The spiking layers of a model, in the order they were registered."""
    return [module for module in model.modules() if isinstance(module, FusedLIF)]
