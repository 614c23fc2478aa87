"""BatchNorm and LIF as one step of training that keeps its input alone.

Two modules keep two tensors of that size for backward, the input of the BatchNorm and the current
that it gives. Here the current is computed again from the input and the statistics: by kernels of
one and the same design on a CPU and on a GPU, by torch's ops for what they do not take. Whatever is
not exactly these two modules, hooks included, is called as it is.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional import SCALES, check_options, is_dense, lif, parameter_like
from ..ops.backend import BatchNormBackend, choose_batch_norm, direct
from .hooks import changed_by_hooks
from .neuron import FusedLIF
from .synced_batch_norm import (
    SyncedBatchNorm,
    all_reduce,
    next_momentum,
    update_running_statistics,
)

#: Norms that are fused, and the numbers of dimensions of x [T, B, C, ...] that they take.
_BATCH_NORMS = {
    nn.BatchNorm1d: (3, 4),
    nn.BatchNorm2d: (5,),
    nn.BatchNorm3d: (6,),
    nn.SyncBatchNorm: range(3, 64),
    SyncedBatchNorm: range(3, 64),
}
_NEURONS = (FusedLIF,)


class BatchNormLIF(nn.Module):
    """norm, then neuron, on x [T, B, C, ...]: the same spikes, statistics and gradients.

    The statistics are those of `norm` on the merged T*B axis. In training, where the neuron keeps
    no state and returns spikes alone, half the memory is kept for backward: by one kernel a pass in
    float32 and bfloat16 (on a GPU float16 too), else by torch's ops, for one more pass of
    normalisation and LIF. On a GPU, without gradients, evaluation is one kernel as well.

    That is for exactly torch's nn.BatchNorm1d, 2d or 3d and `FusedLIF`, without hooks; and for
    nn.SyncBatchNorm, whose processes add up their sums between the passes, on a CPU too. Other
    modules (a subclass, nn.GroupNorm, nn.Identity), modules with hooks of any kind, and everything
    else are called one after the other: `norm` on [T*B, C, ...], `neuron` on [T, B, C, ...]. Either
    may be exchanged at any time.

    "The same" is to within rounding: the kernels sum the statistics in double. Their gradients
    repeat bit for bit, whatever the number of threads and the instruction set.

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
        if not self._fusable() or x.numel() == 0:
            return self._composed(x)
        norm: Any = self._modules["norm"]  # self.norm takes a failed look-up first
        return self._trained(x) if norm.training else self._evaluated(x)

    def _fusable(self) -> bool:
        """Whether norm and neuron, called now, would do what is fused, and nothing else."""
        norm: Any = self._modules["norm"]
        neuron: Any = self._modules["neuron"]
        return (
            _is_plain(norm, _BATCH_NORMS)
            and _is_plain(neuron, _NEURONS)
            and not _has_any_global_hook()
            and torch.is_grad_enabled() == norm.training
            and norm.track_running_stats
            and not (neuron.stateful or neuron.return_v or neuron.packed)
        )

    def _composed(self, x: Tensor) -> Any:
        return self.neuron(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))

    def _evaluated(self, x: Tensor) -> Any:
        """By one kernel on a GPU; a CPU keeps the bits of torch's norm."""
        kernels = choose_batch_norm(self.neuron.backend, x)
        if isinstance(kernels, str) or kernels.name == "cpu" or not _keeps_its_like(self.norm, x):
            return self._composed(x)
        norm = self.norm
        x, *parameters, options = self._arguments(x)
        rstd = (norm.running_var.float() + norm.eps).rsqrt()
        return kernels.fire(x, norm.running_mean.float(), rstd, *parameters, *options)

    def _trained(self, x: Tensor) -> Any:
        norm: Any = self._modules["norm"]
        group = _processes(norm)
        fits = x.dim() in _BATCH_NORMS[type(norm)]
        if group is None and fits and not torch.compiler.is_compiling():
            s = self._short_way(x)
            if s is not None:
                return s
        neuron = self.neuron
        kernels = choose_batch_norm(neuron.backend, x)
        if not fits:
            norm._check_input_dim(x[0])
        if not (norm.eps > 0 and _keeps_its_like(norm, x)):
            return self._composed(x)  # torch says what is wrong, or does without
        if x.numel() == x.shape[2] and group is None:
            raise ValueError(
                f"x: expected more than one value per channel in training, got {tuple(x.shape)}"
            )
        if isinstance(kernels, BatchNormBackend):
            return self._fused(x, kernels, group)
        if group is not None:
            return self._composed(x)
        with torch.no_grad():
            mean, var = torch.batch_norm_update_stats(
                x.flatten(0, 1), norm.running_mean, norm.running_var, next_momentum(norm)
            )
            rstd = (var + norm.eps).rsqrt()
        return _Recomputed.apply(
            x, norm.weight, norm.bias, neuron.threshold, neuron.leak, mean, rstd, norm.eps, neuron
        )

    def _short_way(self, x: Tensor) -> Tensor | None:
        """All of a call, where the compiled kernels can take everything as it is; else None.

        On small tensors a call is all that there is to pay for, so this is one call into C++.
        """
        call = direct("bn_lif_call")
        if call is None:
            return None
        norm: Any = self._modules["norm"]
        neuron: Any = self._modules["neuron"]
        affine, statistics, learned = norm._parameters, norm._buffers, neuron._parameters
        threshold, leak = learned.get("threshold"), learned.get("leak")
        scale = neuron.surrogate_scale
        try:
            tensors = (
                affine["weight"],
                affine["bias"],
                neuron._buffers["threshold"] if threshold is None else threshold,
                neuron._buffers["leak"] if leak is None else leak,
                statistics["running_mean"],
                statistics["running_var"],
                statistics["num_batches_tracked"],
            )
        except KeyError:  # something else took the place of one
            return None
        s: Tensor | None = call(
            neuron.backend,
            x,
            *tensors,
            norm.momentum,
            norm.eps,
            neuron.reset,
            neuron.v_reset,
            neuron.detach_reset,
            neuron.surrogate,
            SCALES.get(neuron.surrogate) if scale is None else scale,
        )
        return s

    def _arguments(self, x: Tensor) -> tuple[Any, ...]:
        """x, weight, bias, threshold, leak as the ops take them, and their options."""
        norm, neuron = self.norm, self.neuron
        scale = check_options(
            neuron.reset, neuron.v_reset, neuron.surrogate, neuron.surrogate_scale
        )
        return (
            x if is_dense(x) else x.contiguous(),
            None if norm.weight is None else norm.weight.float(),
            None if norm.bias is None else norm.bias.float(),
            parameter_like("threshold", neuron.threshold, x, torch.float32),
            parameter_like("leak", neuron.leak, x, torch.float32),
            (neuron.reset, neuron.v_reset, neuron.detach_reset, neuron.surrogate, scale),
        )

    def _fused(self, x: Tensor, kernels: BatchNormBackend, group: Any) -> Tensor:
        norm = self.norm
        *tensors, options = self._arguments(x)
        s: Tensor
        if group is not None:
            s = _Synchronised.apply(*tensors, norm, options, kernels, group)
            return s
        if kernels.counted is not None:
            s = kernels.counted(*tensors, norm.eps, options, *_kept(norm))
            if s is not None:
                return s
        s, mean, var, _ = kernels.forward(*tensors, norm.eps, *options)
        count = x.numel() // x.shape[2]
        update_running_statistics(norm, mean, var * (count / (count - 1)))
        return s


def _processes(norm: Any) -> Any:
    """The group of processes that a norm in training takes its statistics over, or None."""
    if not isinstance(norm, nn.SyncBatchNorm | SyncedBatchNorm) or not dist.is_initialized():
        return None
    group = getattr(norm, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


class _Synchronised(torch.autograd.Function):
    """BatchNorm over the batches of all processes, and LIF: their sums are added between passes."""

    gives_spikes = True  # see origin.py

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        threshold: Tensor,
        leak: Tensor,
        norm: Any,
        options: tuple[Any, ...],
        kernels: BatchNormBackend,
        group: Any,
    ) -> Tensor:
        sums, *_ = kernels.moments(x, norm.eps)
        total = torch.cat([sums, sums.new_full((1, sums.shape[1]), x.numel() // x.shape[2])])
        all_reduce(total, group)
        mean, rstd = _count_totals(norm, total, kernels)
        ctx.save_for_backward(x, mean, rstd, weight, bias, threshold, leak, total[2])
        ctx.options, ctx.kernels, ctx.group = options, kernels, group
        s: Tensor = kernels.fire(x, mean, rstd, weight, bias, threshold, leak, *options)
        return s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_s: Tensor) -> Any:
        *saved, count = ctx.saved_tensors
        _, _, rstd, _, _, threshold, leak = saved
        grad_x, sums, workspace = ctx.kernels.gradient_sums(grad_s, *saved, *ctx.options)
        total = sums[2:].clone()  # of all processes; the parameters have gradients of their own
        all_reduce(total, ctx.group)
        wide = rstd.double()
        grad_mean, slope = (total[0] / count).float(), (total[1] / count * wide * wide).float()
        ctx.kernels.grad_x(grad_x, workspace, grad_mean, slope, grad_s, *saved, *ctx.options)

        def like(total: Tensor, parameter: Tensor) -> Tensor:
            return (total if parameter.numel() > 1 else total.sum(0, True)).float()

        grads = [
            grad_x,
            (sums[3] * wide).float(),
            sums[2].float(),
            like(sums[0], threshold),
            like(sums[1], leak),
        ]
        wanted = ctx.needs_input_grad
        grads = [grad if want else None for grad, want in zip(grads, wanted[:5], strict=True)]
        return *grads, None, None, None, None


def _keeps_its_like(norm: Any, x: Tensor) -> bool:
    """Whether a norm has running statistics, and all of its tensors are for the channels of x."""
    mean, var, calls, _ = _kept(norm)
    if mean is None or var is None or calls is None:
        return False
    tensors = mean, var, norm.weight, norm.bias
    return all(t is None or t.shape == (x.shape[2],) for t in tensors)


def _kept(norm: Any) -> tuple[Any, ...]:
    """What a norm keeps of its calls, and its momentum, which is None for a mean of all."""
    return norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum


def _count_totals(norm: Any, total: Tensor, kernels: BatchNormBackend) -> tuple[Tensor, Tensor]:
    """Count a call of a BatchNorm; total float64 [3, C]: sums of x, of its square, and how many.

    -> mean, rstd float32 [C]. On a GPU one kernel, where the norm keeps what it takes.
    """
    if kernels.totals is not None:
        found = kernels.totals(total, norm.eps, *_kept(norm))
        if found is not None:
            mean, rstd = found
            return mean, rstd
    count = total[2]
    mean = total[0] / count
    var = (total[1] / count - mean * mean).clamp(min=0)
    rstd = (var + norm.eps).rsqrt().float()
    update_running_statistics(norm, mean.float(), (var * (count / (count - 1))).float())
    return mean.float(), rstd


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


def _is_plain(module: nn.Module, kinds: Container[type]) -> bool:
    """Whether the module is exactly one of these, so that its attributes say all that it does."""
    return (
        type(module) in kinds
        and not changed_by_hooks(module)
        and not (module._backward_pre_hooks or module._backward_hooks)
    )


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
    gives_spikes = True  # see origin.py

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
