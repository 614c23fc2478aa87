"""BatchNorm and LIF as one step of training that keeps its input alone.

Two modules keep two tensors of that size for backward, the input of the BatchNorm and the current
that it gives. Here the current is computed again from the input and the statistics: by one kernel
on a CPU (float32 and bfloat16), by torch's ops everywhere else. Whatever is not exactly these two
modules, hooks included, is called as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import check_options, is_dense, lif, parameter_like
from ..ops.backend import is_compiled_cpu
from .neuron import FusedLIF

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNormLIF(nn.Module):
    """norm, then neuron, on x [T, B, C, ...]: the same spikes, statistics and gradients.

    The statistics are those of `norm` on the merged T*B axis. In training, where the neuron keeps
    no state and returns spikes alone, half the memory is kept for backward: by one kernel in
    float32 and bfloat16 on a CPU, else by torch's ops, for one more pass of normalisation and LIF.

    That is for exactly torch's nn.BatchNorm1d, 2d or 3d and `FusedLIF`, without hooks. Other
    modules (a subclass, a synchronised norm, nn.GroupNorm, nn.Identity), modules with hooks of any
    kind, and everything outside training are called one after the other: `norm` on
    [T*B, C, ...], `neuron` on [T, B, C, ...]. Either may be exchanged at any time.

    "The same" is to within rounding: the kernel sums the statistics in double. Its gradients repeat
    bit for bit, whatever the number of threads and the instruction set.

    norm, neuron: modules. Both stay what they are, with their parameters and buffers.
    Raises TypeError for what is no module, ValueError for an input without [T, B, C].
    """

    over_time = True  # takes [T, B, ...] as a whole

    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        for name, module in (("norm", norm), ("neuron", neuron)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected a module, got {type(module).__name__}")
        self.norm: Any = norm
        self.neuron: Any = neuron

    def forward(self, x: Tensor) -> Any:
        if x.dim() < 3:
            raise ValueError(f"x: expected shape [T, B, C, ...], got {tuple(x.shape)}")
        norm, neuron = self.norm, self.neuron
        if x.numel() == 0 or not self._fusable():
            return neuron(norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        norm._check_input_dim(x[0])
        if x.numel() == x.shape[2]:
            raise ValueError(
                f"x: expected more than one value per channel in training, got {tuple(x.shape)}"
            )
        fused = x.dtype in (torch.float32, torch.bfloat16)
        if fused and is_compiled_cpu(neuron.backend, x.device):
            return self._fused(x)
        with torch.no_grad():
            mean, var = torch.batch_norm_update_stats(
                x.flatten(0, 1), norm.running_mean, norm.running_var, next_momentum(norm)
            )
            rstd = (var + norm.eps).rsqrt()
        return _Recomputed.apply(
            x, norm.weight, norm.bias, neuron.threshold, neuron.leak, mean, rstd, norm.eps, neuron
        )

    def _fusable(self) -> bool:
        """Whether norm and neuron, called now, would do what is fused, and nothing else."""
        norm, neuron = self.norm, self.neuron
        return (
            _is_plain(norm, _BATCH_NORMS)
            and _is_plain(neuron, (FusedLIF,))
            and not _has_any_global_hook()
            and torch.is_grad_enabled()
            and norm.training
            and norm.track_running_stats
            and not (neuron.stateful or neuron.return_v or neuron.packed)
        )

    def _fused(self, x: Tensor) -> Tensor:
        norm, neuron = self.norm, self.neuron
        scale = check_options(
            neuron.reset, neuron.v_reset, neuron.surrogate, neuron.surrogate_scale
        )
        s: Tensor
        s, mean, var, _ = torch.ops.iirsnn.bn_lif_forward(
            x if is_dense(x) else x.contiguous(),
            None if norm.weight is None else norm.weight.float(),
            None if norm.bias is None else norm.bias.float(),
            parameter_like("threshold", neuron.threshold, x, torch.float32),
            parameter_like("leak", neuron.leak, x, torch.float32),
            norm.eps,
            neuron.reset,
            neuron.v_reset,
            neuron.detach_reset,
            neuron.surrogate,
            scale,
        )
        count = x.numel() // x.shape[2]
        update_running_statistics(norm, mean, var * (count / (count - 1)))
        return s


def next_momentum(norm: Any) -> float:
    """Of a BatchNorm's call, which is counted: a running mean where the norm has no momentum."""
    norm.num_batches_tracked.add_(1)
    return 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def update_running_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    """Count a call of a BatchNorm that saw this mean and unbiased variance, each [C]."""
    momentum = next_momentum(norm)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), momentum)


def spiking_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of whatever gives spikes: each FusedLIF, or the BatchNormLIF that it is in.

    A hook there leaves a BatchNormLIF its fused path; one on the neuron inside does not.
    """
    named = list(model.named_modules())
    pairs = {m: m.neuron for _, m in named if isinstance(m, BatchNormLIF)}
    for name, module in named:
        spiking = pairs.get(module, module)
        if isinstance(spiking, FusedLIF) and (module in pairs or module not in pairs.values()):
            yield name, module


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether the module is exactly one of these, so that its attributes say all that it does."""
    hooks = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return type(module) in kinds and "forward" not in module.__dict__ and not any(hooks)


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """The current, in the dtype of x; the same bits whenever it is called."""
    shape = (-1, *[1] * (x.dim() - 3))
    gain = rstd if weight is None else rstd * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    return torch.addcmul(shift.view(shape), x, gain.view(shape)).to(x.dtype)


def _spikes(neuron: FusedLIF, current: Tensor, threshold: Tensor, leak: Tensor) -> Tensor:
    spikes: Tensor = lif(
        current,
        threshold,
        leak,
        reset=neuron.reset,
        v_reset=neuron.v_reset,
        detach_reset=neuron.detach_reset,
        surrogate=neuron.surrogate,
        surrogate_scale=neuron.surrogate_scale,
        backend=neuron.backend,
    )
    return spikes


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor,
        leak: Tensor,
        mean: Tensor,
        rstd: Tensor,
        eps: float,
        neuron: FusedLIF,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, threshold, leak, mean, rstd)
        ctx.eps, ctx.neuron = eps, neuron
        return _spikes(neuron, _normalised(x, weight, bias, mean, rstd), threshold, leak)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> Any:
        x, weight, bias, threshold, leak, mean, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        current = _normalised(x, weight, bias, mean, rstd).requires_grad_()
        threshold = threshold.detach().requires_grad_(wanted[3])
        leak = leak.detach().requires_grad_(wanted[4])
        inputs = [t for t in (current, threshold, leak) if t.requires_grad]
        with torch.enable_grad():
            s = _spikes(ctx.neuron, current, threshold, leak)
        grads = list(torch.autograd.grad(s, inputs, grad_s, allow_unused=True))
        grad_current = grads.pop(0)
        grad_threshold = grads.pop(0) if wanted[3] else None
        grad_leak = grads.pop(0) if wanted[4] else None
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *(grad_current.flatten(0, 1), x.flatten(0, 1), weight, None, None, mean, rstd),
            *(True, ctx.eps, [wanted[0], wanted[1], wanted[2]]),
        )
        if grad_x is not None:
            grad_x = grad_x.unflatten(0, x.shape[:2])
        return grad_x, grad_weight, grad_bias, grad_threshold, grad_leak, None, None, None, None
