"""BatchNorm and LIF as one step of training that keeps its input alone.

Two modules keep two tensors of that size for backward, the input of the BatchNorm and the current
that it gives. Here the current is computed again from the input and the statistics: by one kernel
on a CPU (float32 and bfloat16), by torch's ops everywhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..functional import check_options, is_dense, lif, parameter_like
from ..ops.backend import is_compiled_cpu
from .neuron import FusedLIF


class BatchNormLIF(nn.Module):
    """norm, then neuron, on x [T, B, C, ...]: the same spikes, statistics and gradients.

    The statistics are those of `norm` on the merged T*B axis. In training, where the neuron keeps
    no state and returns spikes alone, half the memory is kept for backward: by one kernel in
    float32 and bfloat16 on a CPU, else by torch's ops, for one more pass of normalisation and LIF.
    Everywhere else it is `norm` and `neuron`, one after the other.

    "The same" is to within rounding: the kernel sums the statistics in double. Its gradients repeat
    bit for bit, whatever the number of threads and the instruction set.

    norm: nn.BatchNorm1d, 2d or 3d. neuron: a FusedLIF. Both stay what they are, with their
    parameters and buffers.
    Raises TypeError for other modules, ValueError for an input without [T, B, C].
    """

    over_time = True  # takes [T, B, ...] as a whole

    def __init__(self, norm: _BatchNorm, neuron: FusedLIF) -> None:
        super().__init__()
        if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
            raise TypeError(f"norm: expected nn.BatchNorm1d, 2d or 3d, got {type(norm).__name__}")
        if not isinstance(neuron, FusedLIF):
            raise TypeError(f"neuron: expected a FusedLIF, got {type(neuron).__name__}")
        self.norm, self.neuron = norm, neuron

    def forward(self, x: Tensor) -> Any:
        if x.dim() < 3:
            raise ValueError(f"x: expected shape [T, B, C, ...], got {tuple(x.shape)}")
        norm, neuron = self.norm, self.neuron
        kept = torch.is_grad_enabled() and norm.training and norm.track_running_stats
        if not kept or x.numel() == 0 or neuron.stateful or neuron.return_v or neuron.packed:
            return neuron(norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
        if x.numel() == x.shape[2]:
            raise ValueError(
                f"x: expected more than one value per channel in training, got {tuple(x.shape)}"
            )
        fused = x.dtype in (torch.float32, torch.bfloat16)
        if fused and is_compiled_cpu(neuron.backend, x.device):
            return self._fused(x)
        with torch.no_grad():
            mean, var = torch.batch_norm_update_stats(
                x.flatten(0, 1), norm.running_mean, norm.running_var, self._momentum()
            )
            rstd = (var + norm.eps).rsqrt()
        return _Recomputed.apply(
            x, norm.weight, norm.bias, neuron.threshold, neuron.leak, mean, rstd, norm.eps, neuron
        )

    def _fused(self, x: Tensor) -> Tensor:
        norm, neuron = self.norm, self.neuron
        scale = check_options(
            neuron.reset, neuron.v_reset, neuron.surrogate, neuron.surrogate_scale
        )
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
        momentum = self._momentum()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
            unbiased = var * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
        return s

    def _momentum(self) -> float:
        """Of this call, which is counted: a running mean where the norm has no momentum."""
        assert self.norm.num_batches_tracked is not None
        self.norm.num_batches_tracked.add_(1)
        if self.norm.momentum is None:
            return 1.0 / float(self.norm.num_batches_tracked)
        return self.norm.momentum


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> Tensor:
    """The current, in the dtype of x; the same bits whenever it is called."""
    shape = (-1, *[1] * (x.dim() - 3))
    gain = rstd if weight is None else rstd * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    return torch.addcmul(shift.view(shape), x, gain.view(shape)).to(x.dtype)


def _spikes(neuron: FusedLIF, current: Tensor, threshold: Tensor, leak: Tensor) -> Tensor:
    return lif(
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


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, threshold, leak, mean, rstd, eps, neuron):
        ctx.save_for_backward(x, weight, bias, threshold, leak, mean, rstd)
        ctx.eps, ctx.neuron = eps, neuron
        return _spikes(neuron, _normalised(x, weight, bias, mean, rstd), threshold, leak)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_s):
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
