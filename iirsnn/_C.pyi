"""The compiled extension (csrc/module.cpp). Importing it registers the ops."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def set_cpu_capability(name: str) -> None: ...
def lif_call(
    backend: str,
    x: Tensor,
    threshold: float | Tensor,
    leak: float | Tensor,
    v0: Tensor | None,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float | None,
    return_v: bool,
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def neuron_call(
    neuron: dict[str, Any],
    x: Tensor,
    scales: dict[str, float],
    hooks: tuple[dict[int, Any], ...] = (),
    /,
) -> Tensor | tuple[Tensor, Tensor] | None: ...
def bn_lif_call(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    threshold: Tensor,
    leak: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    momentum: float | None,
    eps: float,
    reset: str,
    v_reset: float,
    detach_reset: bool,
    surrogate: str,
    surrogate_scale: float | None,
    /,
) -> Tensor | None: ...
def bn_lif_totals(
    totals: Tensor,
    eps: float,
    running_mean: Tensor,
    running_var: Tensor,
    calls: Tensor,
    momentum: float | None,
) -> tuple[Tensor, Tensor] | None: ...
def spike_origin(
    x: Tensor, spikes: frozenset[str], same: frozenset[str], /
) -> tuple[int, int] | None: ...
def spike_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    most: int,
    divisor: int,
    half: Tensor,
    kernels: str,
    geometry: tuple[Any, ...] | None,
    /,
) -> Tensor | None: ...
def spike_average_pool(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    /,
) -> Tensor | None: ...
def take_triton(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    bn_forward: Callable[..., Any],
    bn_backward: Callable[..., Any],
) -> None: ...
