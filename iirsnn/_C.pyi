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
def take_triton(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    bn_forward: Callable[..., Any],
    bn_backward: Callable[..., Any],
) -> None: ...
