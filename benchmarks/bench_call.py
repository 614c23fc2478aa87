"""What a call costs: forward and backward of a neuron on 64 numbers, beside torch.relu's.

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
from iirsnn import FusedLIF
from iirsnn.functional import lif

NEURONS = 64
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


def contenders() -> dict[str, Callable[[Tensor], Tensor]]:
    fixed = {"learn_threshold": False, "learn_leak": False}
    return {
        "torch.relu": torch.relu,
        "nn.ReLU": nn.ReLU(),
        "empty autograd.Function": Empty.apply,
        "FusedLIF, learned": FusedLIF(1.0, 0.9),
        "FusedLIF, fixed": FusedLIF(1.0, 0.9, **fixed),
        "lif, numbers": lambda x: lif(x, 1.0, 0.9),
    }


def step(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaves = [x, *(function.parameters() if isinstance(function, nn.Module) else [])]

    def run() -> None:
        function(x).backward(grad)
        for leaf in leaves:
            leaf.grad = None

    return run


def measure(timesteps: int) -> dict[str, float]:
    """Microseconds of a forward and backward, by contender."""
    x = torch.randn(timesteps, NEURONS).add_(0.5).requires_grad_()
    grad = torch.randn(timesteps, NEURONS)
    steps = {name: step(function, x, grad) for name, function in contenders().items()}
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
    import iirsnn._C  # after torch, whose libraries it needs

    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {iirsnn._C.build_info()['cpu_capability']}")
    for timesteps in (1, 5):
        times = measure(timesteps)
        print(
            f"\nT = {timesteps}, {NEURONS} neurons: microseconds, and as a multiple of torch.relu"
        )
        for name, time_ in times.items():
            print(f"{name:24} {time_:7.2f} {time_ / times['torch.relu']:6.2f}")


if __name__ == "__main__":
    main()
