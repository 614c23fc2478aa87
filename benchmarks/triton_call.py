"""What a call by the Triton backend costs the host: forward and backward beside torch.relu.

    python benchmarks/triton_call.py [--without-extension]

On CPU tensors and without a device: kernels are compiled for sm_90, and all is done that a launch
takes but Triton's launcher in C and the driver. --without-extension is an installation in which
nothing was compiled. Measured as bench_call.py does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

if "--without-extension" in sys.argv:  # before iirsnn looks for it
    sys.modules["iirsnn._C"] = None  # type: ignore[assignment]
    os.environ["IIRSNN_JIT"] = "0"

from bench_call import (
    CHANNELS,
    FIXED,
    LEARNED,
    NEURONS,
    RELU,
    Contenders,
    Empty,
    measure,
    show,
    steps_of,
)

from iirsnn import BatchNormLIF, FusedLIF


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
    return measure(ways)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--without-extension", action="store_true")
    parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    without_a_device()
    extension = sys.modules.get("iirsnn._C")
    print(f"torch {torch.__version__}, {'with' if extension else 'without'} iirsnn._C")
    for name, time_ in a_launch().items():
        print(f"a launch, {name}: {time_:.2f} microseconds")
    for timesteps in (1, 5):
        sizes = (NEURONS,), (2, CHANNELS, 2, 2)
        for functions, size in zip((by_triton(), normed_by_triton()), sizes, strict=True):
            title = f"T = {timesteps}, {list(size)}, the host's part alone, on CPU tensors"
            show(title, steps_of(functions, (timesteps, *size)), RELU)


if __name__ == "__main__":
    main()
