"""What a call costs: forward and backward on 64 numbers, of neurons beside torch.relu, and of
BatchNormLIF beside the two modules that it stands for.

    python benchmarks/bench_call.py
    python benchmarks/bench_call.py --triton [--without-extension]

On tensors this small nothing is left but the call: dispatch, checks, autograd. Round robin over all
contenders; of each the median over the rounds of the mean of a round, in processor time of the one
thread (which other programs on the machine disturb less than the wall clock).

--triton measures the host's part of the Triton backend, on CPU tensors and without a device:
kernels are compiled for sm_90, and all is done that a launch takes but Triton's launcher in C and
the driver. --without-extension is an installation in which nothing was compiled.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

if "--without-extension" in sys.argv:  # before iirsnn looks for it
    sys.modules["iirsnn._C"] = None  # type: ignore[assignment]
    os.environ["IIRSNN_JIT"] = "0"

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


LEARNED: dict[str, Any] = {}
FIXED: dict[str, Any] = {"learn_threshold": False, "learn_leak": False}
RELU, TWO = "torch.relu", "norm, neuron: learned"
Contenders = dict[str, Callable[[Tensor], Tensor]]


class Driver:
    """Triton's driver of a GPU that is not there: its launches do nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return "a module", 0, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


def without_a_device() -> None:
    """Let the Triton backend take CPU tensors, whose kernels are compiled but not run."""
    import iirsnn.kernels  # noqa: F401  (Triton decides now whether it interprets)
    import triton

    triton.runtime.driver.set_active(Driver())  # type: ignore[arg-type]
    os.environ["TRITON_INTERPRET"] = "1"


def by_triton() -> Contenders:
    return {
        RELU: torch.relu,
        "empty autograd.Function": Empty.apply,
        "FusedLIF, learned": FusedLIF(1.0, 0.9, backend="triton"),
        "FusedLIF, fixed": FusedLIF(1.0, 0.9, backend="triton", **FIXED),
    }


def a_launch() -> dict[str, float]:
    """Microseconds of one launch of the forward kernel, by who finds what is compiled."""
    from iirsnn.kernels import lif as kernels

    x, one = torch.randn(5, NEURONS), torch.ones(1)
    launch, _ = kernels._plan_forward(x.shape, x.stride(), x.dtype, 1, 1, "soft")
    tensors = x, one, one, None, torch.empty_like(x), None
    arguments = (*tensors, *launch.sizes, 0.0, *launch.constants)
    ways: dict[str, Callable[[], Any]] = {
        "kept from the last call": lambda: launch(tensors, 0.0),
        "found by Triton": lambda: launch.kernel[launch.grid](*arguments),
    }
    return round_robin(ways)


def normed_by_triton() -> Contenders:
    return {
        RELU: torch.relu,
        **{
            f"BatchNormLIF: {learned}": BatchNormLIF(
                nn.BatchNorm2d(CHANNELS), FusedLIF(1.0, 0.9, backend="triton", **options)
            )
            for learned, options in (("learned", LEARNED), ("fixed", FIXED))
        },
    }


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
        for learned, options in (("learned", LEARNED), ("fixed", FIXED))
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
    return round_robin({name: step(function, x, grad) for name, function in functions.items()})


def round_robin(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(ROUNDS + 3):  # the first ones warm up
        for name, run in steps.items():
            start = time.thread_time()
            for _ in range(CALLS):
                run()
            if round_ >= 3:
                found[name].append((time.thread_time() - start) / CALLS)
    return {name: 1e6 * statistics.median(times) for name, times in found.items()}


def capability() -> str:
    """Of the compiled kernels."""
    extension = sys.modules.get("iirsnn._C")
    return extension.build_info()["cpu_capability"] if extension else "no extension"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triton", action="store_true")
    parser.add_argument("--without-extension", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contenders = [(neurons, RELU), (normed, TWO)]
    if arguments.triton:
        without_a_device()
        contenders = [(by_triton, RELU), (normed_by_triton, RELU)]
    print(f"torch {torch.__version__}, {capability()}")
    if arguments.triton:
        for name, time_ in a_launch().items():
            print(f"a launch, {name}: {time_:.2f} microseconds")
    for timesteps in (1, 5):
        for (functions, one), shape in zip(
            contenders, ((NEURONS,), (2, CHANNELS, 2, 2)), strict=True
        ):
            times = measure(functions(), (timesteps, *shape))
            print(f"\nT = {timesteps}, {list(shape)}: microseconds, and as a multiple of {one}")
            if arguments.triton:
                print("(the host's part alone, on CPU tensors without a device)")
            for name, time_ in times.items():
                print(f"{name:24} {time_:7.2f} {time_ / times[one]:6.2f}")


if __name__ == "__main__":
    main()
