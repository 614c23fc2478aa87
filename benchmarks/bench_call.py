"""What a call costs: forward and backward on 64 numbers, of neurons beside torch.relu, and of
BatchNormLIF beside the two modules that it stands for.

    python benchmarks/bench_call.py

On tensors this small nothing is left but the call: dispatch, checks, autograd. Round robin over all
contenders; of each the median over the rounds of the mean of a round, in processor time of the one
thread (which other programs on the machine disturb less than the wall clock).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import iirsnn._C
from iirsnn import BatchNormLIF, FusedLIF
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


class TwoModules(nn.Module):
    """What BatchNormLIF stands for."""

    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x: Tensor) -> Tensor:
        spikes: Tensor = self.neuron(self.norm(x.flatten(0, 1)).view(x.shape))
        return spikes


FIXED = {"learn_threshold": False, "learn_leak": False}
RELU, TWO = "torch.relu", "norm, neuron: learned"
Contenders = dict[str, Callable[[Tensor], Tensor]]


def neurons() -> Contenders:
    return {
        RELU: torch.relu,
        "nn.ReLU": nn.ReLU(),
        "empty autograd.Function": Empty.apply,
        "FusedLIF, learned": FusedLIF(1.0, 0.9),
        "FusedLIF, fixed": FusedLIF(1.0, 0.9, **FIXED),
        "lif, numbers": lambda x: lif(x, 1.0, 0.9),
    }


def normed() -> Contenders:
    return {
        f"{name}: {learned}": kind(nn.BatchNorm2d(CHANNELS), FusedLIF(1.0, 0.9, **options))
        for learned, options in (("learned", {}), ("fixed", FIXED))
        for name, kind in (("norm, neuron", TwoModules), ("BatchNormLIF", BatchNormLIF))
    }


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaves = [x, *(function.parameters() if isinstance(function, nn.Module) else [])]

    def run() -> None:
        function(x).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def measure(functions: Contenders, shape: tuple[int, ...]) -> dict[str, float]:
    """Microseconds of a forward and backward, by contender."""
    x = torch.randn(shape).add_(0.5).requires_grad_()
    grad = torch.randn(shape)
    steps = {name: step(function, x, grad) for name, function in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 3):  # the first ones warm up
        for name, run in steps.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            if round_ >= 3:
                found[name].append((time.thread_time() - start) / CALLS)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {iirsnn._C.build_info()['cpu_capability']}")
    for timesteps in (1, 5):
        for functions, shape, one in (
            (neurons(), (NEURONS,), RELU),
            (normed(), (2, CHANNELS, 2, 2), TWO),
        ):
            times = measure(functions, (timesteps, *shape))
            print(f"\nT = {timesteps}, {list(shape)}: microseconds, and as a multiple of {one}")
            for name, time_ in times.items():
                print(f"{name:24} {time_:7.2f} {time_ / times[one]:6.2f}")


if __name__ == "__main__":
    main()
