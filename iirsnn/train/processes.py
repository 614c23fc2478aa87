"""Many processes as one: what they share, add up and decide together.

Each process works on its share of every batch. Between backward and step one all-reduce averages
all gradients in a fixed order. (DistributedDataParallel re-forms its buckets after the first step
of a process: a resumed run would add in another order, and with three processes or more end in
other bits.) What is decided together goes through gloo, on GPUs too: it must not wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RunError
from ..nn.batch_norm import update_running_statistics

T = TypeVar("T")


class Lost(RunError):
    """Another process of this run is gone, so this one cannot go on either."""


class Processes:
    """The processes that train one run, as torchrun started them.

    Args:
        device: of this process; it waits for the others. None for this process alone.

    Attributes:
        rank: of this process, from 0; process 0 alone locks, writes and prints.
        count: of all processes.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.count, self._first_of_node = 0, 1, True
        if device is not None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group(dist.get_default_backend_for_device(device))
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self._first_of_node = int(os.environ["LOCAL_RANK"]) == 0
            with _losses():
                self._group: Any = dist.new_group(backend="gloo")

    @property
    def main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    @property
    def share(self) -> tuple[int, int]:
        """(rank, count), as `iirsnn.train.data` takes it."""
        return self.rank, self.count

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns in process 0, in all of them; it must not need the others."""
        if self.count == 1:
            return work()
        box = [work() if self.main else None]
        with _losses():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def first_opens(self, open_: Callable[[], T], follow: Callable[[], T]) -> T:
        """What `open_` returns in process 0, and `follow` in the others once that is done."""
        result = open_() if self.main else None
        self.gather(None)
        return follow() if result is None else result

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` in the first process of each machine, then in the others: it downloads once."""
        result = work() if self._first_of_node else None
        self.gather(None)
        return work() if result is None else result

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        with _losses():
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with _losses():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        with _losses():
            dist.all_reduce(flat)
        means = (flat / self.count).split([gradient.numel() for gradient in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def synchronise(self, network: nn.Module) -> None:
        """Give the network of every process the state it has in process 0.

        Its BatchNorms, if any, take their statistics over all processes from now on.
        """
        if self.count == 1:
            return
        for tensor in network.state_dict().values():
            contiguous = tensor.contiguous()
            with _losses():
                dist.broadcast(contiguous, src=0)
            tensor.copy_(contiguous)
        if next(network.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return
        for module in network.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.__class__ = SyncedBatchNorm  # parameters, buffers and hooks stay


class SyncedBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all processes, on any device; torch's own needs a GPU.

    Equals one process's BatchNorm over the whole batch, up to rounding.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any [B, C, ...]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        others = [0, *range(2, x.dim())]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        elements = x.new_tensor([x.numel() / x.shape[1]])
        total = _AllReduce.apply(torch.cat([x.sum(others), elements]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            unbiased = variance.detach() * count / (count - 1)
            update_running_statistics(self, mean.detach(), unbiased)
        scale = (variance + self.eps).rsqrt()
        if not self.affine:
            return (centred * scale.view(shape)).to(input.dtype)
        scale = scale * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(input.dtype)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for each process uses the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with _losses():
            total = x.clone()
            dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with _losses():
            total = grad.contiguous().clone()
            dist.all_reduce(total)
        return total


@contextmanager
def _losses() -> Iterator[None]:
    """A collective operation fails when another process is gone."""
    try:
        yield
    except RuntimeError as error:  # of gloo, NCCL or the store
        raise Lost("another process of this run ended before its time") from error
