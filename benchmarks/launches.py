"""Ops that a training step of VGG16 asks a GPU for: python benchmarks/launches.py

Counted on "meta", where nothing has values and nothing takes time, and of whose networks the same
lines run as on a GPU; float32. An op of torch that computes is one, a convolution too, for which
cuDNN may launch several kernels; views and empty memory are none. iirsnn's ops are given by name.
Nobody who watches ops sees the kernels write a BatchNorm's running statistics: here they take four
of torch's ops a layer, on a GPU none.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent))

from kept import CONTENDERS
from networks import batch_of, networks

aten = torch.ops.aten
FREE = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten.detach, aten._unsafe_view, aten._reshape_alias, aten.lift_fresh),
}


class Ops(TorchDispatchMode):
    """Counts the ops that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.torch, self.ours = 0, Counter[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("iirsnn::")
        if name != func._schema.name:
            self.ours[name] += 1
        elif func.overloadpacket not in FREE and not func.is_view and func.namespace == "aten":
            self.torch += 1
        return func(*args, **(kwargs or {}))


def count(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Ops:
    """Of forward, loss, backward and a step of SGD."""
    optimiser = torch.optim.SGD(network.parameters(), 1e-3, foreach=True)
    with Ops() as ops:
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images).float(), labels).backward()
        optimiser.step()
    return ops


def main() -> None:
    print("| T | network | torch's ops | iirsnn's ops |\n|--:|---|--:|---|")
    for timesteps in (1, 5):
        images, labels = (each.to("meta") for each in batch_of(8))
        for name, network in networks("vgg16", timesteps, None, CONTENDERS)[0].items():
            ops = count(network.to("meta").train(), images, labels)
            ours = ", ".join(f"{n} {each}" for each, n in sorted(ops.ours.items()))
            print(f"| {timesteps} | {name} | {ops.torch} | {ours} |")


if __name__ == "__main__":
    main()
