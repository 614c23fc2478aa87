"""Who takes part: LIF neurons that compute one recurrence, made with each library.

    h[t] = v[t-1] / 2 + x[t],  s[t] = h[t] > 1,  v[t] = h[t] - s[t],  v[-1] = 0
    ds/dh = max(0, 1 - |h - 1|), no gradient through the reset's spike

Every contender is a module from x [T, B, ...] to spikes of the same shape. `current` draws x so
that every operation of the recurrence is exact in fp32 and no h meets the threshold: there all
libraries have to give the same bits, forward and backward.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from iirsnn import FusedLIF

LEAK, THRESHOLD = 0.5, 1.0
SURROGATE: dict[str, Any] = {"surrogate": "triangle", "surrogate_scale": 1.0}
LIMIT, REUSED = "limit", "limit, memory reused"


@dataclass(frozen=True)
class Contender:
    """neuron: makes the module. input_scale: what x has to be multiplied by before it."""

    name: str
    neuron: Callable[[], nn.Module]
    package: str
    batch_first: bool = False  # takes and returns [B, T, ...]
    input_scale: float = 1.0
    note: str = ""

    @property
    def version(self) -> str:
        return f"{self.package} {version(self.package)}"


def current(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Odd multiples of 2^-9 (2^-5 unless float32), about N(0.3, 0.8): exact, and never a tie.

    By induction h[t] is an odd multiple of 2^-(9 + t), so it is never the threshold 1, and up to
    t = 8 all of it fits in the 24 bits of a float32.
    """
    step = 2.0**-9 if dtype == torch.float32 else 2.0**-5
    x = torch.randn(shape).mul_(0.8).add_(0.3).clamp_(-3.9, 3.9)
    return x.div_(2 * step).floor_().mul_(2 * step).add_(step).to(dtype)


# ---- The neurons ----


class _Limit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.add(x, grad)


class Limit(nn.Module):
    """What a neuron cannot avoid: reads x and writes as much; backward reads x, g, writes as much.

    Forward is x.clone(), backward torch.add(x, g).
    """

    over_time = True

    def forward(self, x: Tensor) -> Tensor:
        return _Limit.apply(x)


def iirsnn_lif(**options: Any) -> nn.Module:
    fixed = {"learn_threshold": False, "learn_leak": False}
    return FusedLIF(THRESHOLD, LEAK, **{**fixed, **SURROGATE, **options})


def reference() -> nn.Module:
    return iirsnn_lif(backend="reference")


def compiled() -> nn.Module:
    # Without donated buffers, so that its backward pass can be timed again and again.
    importlib.import_module("torch._functorch.config").donated_buffer = False
    return torch.compile(reference(), dynamic=False)


class _SpikingJelly(nn.Module):
    over_time = True

    def __init__(self) -> None:
        super().__init__()
        based = "spikingjelly.activation_based."
        surrogate = importlib.import_module(based + "surrogate")
        self.reset_net = importlib.import_module(based + "functional").reset_net
        self.node = importlib.import_module(based + "neuron").LIFNode(
            tau=1 / (1 - LEAK),
            decay_input=False,
            v_threshold=THRESHOLD,
            v_reset=None,
            surrogate_function=surrogate.PiecewiseQuadratic(1.0),
            detach_reset=True,
            step_mode="m",
        )

    def forward(self, x: Tensor) -> Tensor:
        self.reset_net(self.node)
        return self.node(x)


class _SnnTorch(nn.Module):
    over_time = True

    def __init__(self) -> None:
        super().__init__()
        surrogate = importlib.import_module("snntorch.surrogate")

        def triangle(x: Tensor, grad: Tensor, spikes: Tensor) -> Tensor:
            return grad * (1 - x.abs()).clamp_(min=0)

        self.cell = importlib.import_module("snntorch").Leaky(
            beta=LEAK,
            threshold=THRESHOLD,
            spike_grad=surrogate.custom_surrogate(triangle),
            reset_mechanism="none",
        )

    def forward(self, x: Tensor) -> Tensor:
        spikes, membrane = [], torch.zeros_like(x[0])
        for x_t in x:
            spike, membrane = self.cell(x_t, membrane)
            membrane = membrane - THRESHOLD * spike.detach()
            spikes.append(spike)
        return torch.stack(spikes)


class _Norse(nn.Module):
    over_time = True

    def __init__(self) -> None:
        super().__init__()
        norse = importlib.import_module("norse.torch")
        box = importlib.import_module("norse.torch.functional.lif_box")
        parameters = box.LIFBoxParameters(
            tau_mem_inv=torch.tensor(1000 * (1 - LEAK)),
            v_th=torch.tensor(THRESHOLD),
            method="triangle",
            alpha=1.0,
            reset_method=lambda spike, v, reset, th: v - spike.detach() * th,
        )
        self.lift = norse.Lift(norse.LIFBoxCell(parameters, dt=0.001))

    def forward(self, x: Tensor) -> Tensor:
        return self.lift(x)[0]


class _Sinabs(nn.Module):
    over_time = True

    def __init__(self) -> None:
        super().__init__()
        activation = importlib.import_module("sinabs.activation")

        def triangle(v: Tensor, th: Tensor) -> Tensor:
            return (1 - (v - th).abs()).clamp_(min=0)

        def subtract(spikes: Tensor, state: dict[str, Tensor], th: Tensor) -> dict[str, Tensor]:
            return {**state, "v_mem": state["v_mem"] - spikes.detach() * th}

        self.layer = importlib.import_module("sinabs.layers").LIF(
            tau_mem=-1 / math.log(LEAK),
            train_alphas=True,
            spike_threshold=torch.tensor(THRESHOLD),
            spike_fn=activation.SingleSpike,
            reset_fn=subtract,
            surrogate_grad_fn=triangle,
            norm_input=False,
        )
        with torch.no_grad():
            self.layer.alpha_mem.fill_(LEAK)  # exp(-1 / tau) has a rounding error
        self.layer.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.layer.reset_states()
        self.layer.zero_grad()
        return self.layer(x)


CONTENDERS = (
    Contender("iirsnn", iirsnn_lif, "iirsnn"),
    Contender("reference", reference, "torch"),
    Contender("torch.compile", compiled, "torch", note="of the reference"),
    Contender(
        "SpikingJelly",
        _SpikingJelly,
        "spikingjelly",
        note="spikes at h >= threshold",
    ),
    Contender(
        "snnTorch",
        _SnnTorch,
        "snntorch",
        note="Leaky without reset, the loop subtracts: its reset_delay=False takes a reset from "
        "the membrane before it fires, which is another neuron where v > threshold",
    ),
    Contender(
        "Norse",
        _Norse,
        "norse",
        input_scale=1 / (1 - LEAK),
        note="LIFBoxCell multiplies x by 1 - leak, so it gets x / (1 - leak); reset_method given, "
        "its own lets a gradient through the spike",
    ),
    Contender(
        "sinabs",
        _Sinabs,
        "sinabs",
        batch_first=True,
        note="spikes at h >= threshold; [B, T, ...]; reset_fn given, its own lets a gradient "
        "through the spike",
    ),
)


def available() -> tuple[list[Contender], dict[str, str]]:
    """Who can run here, and of each that cannot, why."""
    found, missing = [], {}
    for contender in CONTENDERS:
        try:
            assert contender.version
            contender.neuron()
        except (ImportError, PackageNotFoundError) as error:
            missing[contender.name] = f"{type(error).__name__}: {error}"
        else:
            found.append(contender)
    return found, missing


def prepared(contender: Contender, x: Tensor) -> Tensor:
    """x [T, B, ...] as the contender takes it: scaled, [B, T, ...] if it wants that."""
    x = x * contender.input_scale if contender.input_scale != 1 else x
    return x.transpose(0, 1).contiguous() if contender.batch_first else x


def both_passes(name: str, timesteps: int, elements: int) -> Callable[[], Any]:
    """One contender's forward and backward of float32, alone."""
    contender = next(c for c in CONTENDERS if c.name == name)
    neuron = contender.neuron()
    x = current((timesteps, elements // timesteps // 64, 64))
    leaf = prepared(contender, x).requires_grad_()
    return lambda: torch.autograd.grad(neuron(leaf), leaf, torch.ones_like(leaf))
