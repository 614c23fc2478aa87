"""What a call costs: forward and backward on 64 numbers, of neurons beside torch.relu, of
BatchNormLIF beside the two modules that it stands for; on 256, of spike layers beside torch's.

    python benchmarks/bench_call.py [neurons] [layers]

A spike layer computes by events or as torch does, as it decides or is told, or as on a GPU: where
its input comes from tells what it is. "Alone" is without the neuron before it.

On tensors this small nothing is left but the call: dispatch, checks, autograd. Round robin over all
contenders; of each the median over the rounds of the mean of a round, in processor time of the one
thread (which other programs on the machine disturb less than the wall clock).
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from iirsnn import BatchNormLIF, FusedLIF, SpikeAvgPool2d, SpikeConv2d, SpikeLinear
from iirsnn.functional import lif

NEURONS, CHANNELS = 64, 8
ROUNDS, CALLS = 40, 60


class Empty(torch.autograd.Function):
    """What any autograd.Function written in Python costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class TwoNumbers(nn.Module):
    """What an op of torch costs with two learned numbers beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, self.one, self.two)


class TwoModules(nn.Module):
    """What BatchNormLIF stands for."""

    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x: Tensor) -> Tensor:
        spikes: Tensor = self.neuron(self.norm(x.flatten(0, 1)).view(x.shape))
        return spikes


class AfterNeurons(nn.Module):
    """A neuron and a layer for what it fires."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.neuron, self.layer = FusedLIF(1.0, 0.9), layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.neuron(x).flatten(0, 1))
        return out


LEARNED: dict[str, Any] = {}
FIXED: dict[str, Any] = {"learn_threshold": False, "learn_leak": False}
RELU, TWO = "torch.relu", "norm, neuron: learned"
Contenders = dict[str, Callable[[Tensor], Tensor]]


def neurons() -> Contenders:
    return {
        RELU: torch.relu,
        "nn.ReLU": nn.ReLU(),
        "empty autograd.Function": Empty.apply,
        "torch.addcmul, learned": TwoNumbers(),
        "FusedLIF, learned": FusedLIF(1.0, 0.9),
        "FusedLIF, fixed": FusedLIF(1.0, 0.9, **FIXED),
        "lif, numbers": lambda x: lif(x, 1.0, 0.9),
    }


def normed() -> Contenders:
    return {
        f"{name}: {learned}": kind(nn.BatchNorm2d(CHANNELS), FusedLIF(1.0, 0.9, **options))
        for learned, options in (("learned", LEARNED), ("fixed", FIXED))
        for name, kind in (("norm, neuron", TwoModules), ("BatchNormLIF", BatchNormLIF))
    }


def spike_layers(plain: nn.Module, spiking: nn.Module) -> dict[str, nn.Module]:
    """torch's own layer, and ours in each of its ways."""
    layers = {f"nn.{type(plain).__name__}": plain}
    for way in ("auto", "events", "dense", "as on a GPU"):
        layer: Any = copy.deepcopy(spiking)
        if way == "as on a GPU":
            layer._no_events = lambda x, dtype: "as on a GPU"
        else:
            layer.set_mode(way)
        layers[f"{type(layer).__name__}, {way}"] = layer
    return layers


Steps = dict[str, Callable[[], object]]


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaves = [x, *(function.parameters() if isinstance(function, nn.Module) else [])]

    def run() -> None:
        function(x).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def steps_of(functions: Contenders, shape: tuple[int, ...]) -> Steps:
    x = torch.randn(shape).add_(0.5).requires_grad_()
    grad = torch.randn_like(next(iter(functions.values()))(x))
    return {name: step(function, x, grad) for name, function in functions.items()}


def steps_alone(layers: dict[str, nn.Module], shape: tuple[int, ...]) -> Steps:
    """Of layers, without the neuron whose spikes they see."""
    spikes = FusedLIF(1.0, 0.9)(torch.randn(shape).add_(0.5).requires_grad_()).flatten(0, 1)
    grad = torch.randn_like(next(iter(layers.values()))(spikes))

    def alone(layer: nn.Module) -> Callable[[], object]:
        inputs = [spikes, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(spikes), inputs, grad)

    return {f"{name}, alone": alone(layer) for name, layer in layers.items()}


def measure(steps: Steps) -> dict[str, float]:
    """Microseconds of a forward and backward, by contender."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 3):  # the first ones warm up
        for name, run in steps.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            if round_ >= 3:
                found[name].append((time.thread_time() - start) / CALLS)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def show(title: str, steps: Steps, one: str) -> None:
    times = measure(steps)
    print(f"\n{title}: microseconds, and as a multiple of {one}")
    for name, time_ in times.items():
        print(f"{name:32} {time_:7.2f} {time_ / times[one]:6.2f}")


def show_neurons() -> None:
    for timesteps in (1, 5):
        for functions, size, one in (
            (neurons(), (NEURONS,), RELU),
            (normed(), (2, CHANNELS, 2, 2), TWO),
        ):
            show(f"T = {timesteps}, {list(size)}", steps_of(functions, (timesteps, *size)), one)


def show_layers() -> None:
    image = (1, 2, CHANNELS, 4, 4)
    conv = spike_layers(
        nn.Conv2d(CHANNELS, 8, 3, padding=1), SpikeConv2d(CHANNELS, 8, 3, padding=1)
    )
    linear = spike_layers(nn.Linear(64, 8), SpikeLinear(64, 8))
    pool = {"nn.AvgPool2d": nn.AvgPool2d(2), "SpikeAvgPool2d": SpikeAvgPool2d(2)}
    for layers, shape in ((conv, image), (linear, (1, 4, 64)), (pool, image)):
        one, title = next(iter(layers)), f"Spikes {list(shape[1:])}"
        after: Contenders = {name: AfterNeurons(layer) for name, layer in layers.items()}
        show(f"{title}, neuron and layer", steps_of(after, shape), one)
        show(f"{title}, alone", steps_alone(layers, shape), f"{one}, alone")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import iirsnn._C

    print(f"torch {torch.__version__}, {iirsnn._C.build_info()['cpu_capability']}")
    shown = {"neurons": show_neurons, "layers": show_layers}
    for name in sys.argv[1:] or shown:
        shown[name]()


if __name__ == "__main__":
    main()
