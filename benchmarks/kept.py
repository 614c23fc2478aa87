"""What autograd keeps of a VGG16 forward pass: python benchmarks/kept.py [--device meta]

Bytes a neuron and timestep, and as multiples of SpikingJelly's, for the network in one dtype. On
"meta" there are no values and nothing takes time: what is kept there is what a GPU keeps, of whose
spike layers the same lines of Python run. On "cpu" spike layers compute by events or not, as they
choose, and keep as much.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from networks import batch_of, networks, neurons
from traffic import Kept

CONTENDERS = (
    *("SpikingJelly", "snnTorch", "iirsnn", "iirsnn, spike layers"),
    "iirsnn, spike layers, BatchNormLIF",
)


def kept(
    timesteps: int,
    batch: int,
    dtype: torch.dtype,
    device: str,
    contenders: tuple[str, ...] = CONTENDERS,
) -> dict[str, float]:
    """{contender: bytes a neuron and timestep}."""
    images, elements = batch_of(batch)[0].to(device, dtype), neurons("vgg16") * timesteps * batch
    found = {}
    for contender, network in networks("vgg16", timesteps, None, contenders)[0].items():
        network = network.to(device, dtype).train()
        with Kept([*network.parameters(), *network.buffers(), images]) as counted:
            scores = network(images)
        del scores
        found[contender] = counted.bytes / elements
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="meta", choices=("meta", "cpu"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    arguments = parser.parse_args()
    print("| T | network | bytes a neuron and timestep | times SpikingJelly's |\n|--:|---|--:|--:|")
    for timesteps in (1, 5):
        dtype = getattr(torch, arguments.dtype)
        found = kept(timesteps, arguments.batch, dtype, arguments.device)
        base = found.get("SpikingJelly", float("nan"))
        for name, size in found.items():
            print(f"| {timesteps} | {name} | {size:.2f} | {size / base:.2f} |")


if __name__ == "__main__":
    main()
