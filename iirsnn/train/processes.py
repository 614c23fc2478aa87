"""Many processes as one: what they share, add up and decide together.

Each process works on its share of every batch. Between backward and step one all-reduce averages
all gradients in a fixed order. (DistributedDataParallel re-forms its buckets after the first step
of a process: a resumed run would add in another order, and with three processes or more end in
other bits.) What is decided together goes through gloo, on GPUs too: it must not wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..nn.synced_batch_norm import SyncedBatchNorm, all_reduce, losses

T = TypeVar("T")


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
            with losses():
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
        with losses():
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
        with losses():
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised]

    def gather(self, value: T) -> list[T]:
        """The value of every process, in all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with losses():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        all_reduce(flat)
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
            with losses():
                dist.broadcast(contiguous, src=0)
            tensor.copy_(contiguous)
        if next(network.parameters()).is_cuda:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            return
        for module in network.modules():
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                module.__class__ = SyncedBatchNorm  # parameters, buffers and hooks stay
