"""Writes a network of snnTorch by nirtorch, reads it by `from_nir`, and prints two numbers: spikes
that its last neurons give, and those that ours give at another timestep.

    python nir_of_snntorch.py FILE
"""

import sys

import nir
import snntorch
import snntorch.utils
import torch
from snntorch.export_nir import export_to_nir
from torch import nn

from iirsnn import from_nir, record

TIMESTEPS = 8


def leaky(shape, beta, threshold, **options):
    """A value for each neuron: what NIR's shapes are made of."""
    return snntorch.Leaky(
        beta=beta * torch.ones(shape), threshold=threshold * torch.ones(shape), **options
    )


@torch.no_grad()
def main():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), leaky((4, 6, 6), 0.9, 0.5, init_hidden=True)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 10)),
        leaky((10,), 0.8, 0.3, init_hidden=True, output=True),
    )
    graph = export_to_nir(network, torch.rand(1, 1, 8, 8), ignore_dims=[0])
    nir.write(sys.argv[1], graph)
    ours = from_nir(nir.read(sys.argv[1]), TIMESTEPS, reset="soft_delayed").eval()

    images = 3 * torch.rand(32, 1, 8, 8)
    snntorch.utils.reset(network)
    expected = torch.stack([network(images)[0] for _ in range(TIMESTEPS)])
    with record(ours) as recorder:
        ours(images)
    spikes = list(recorder.spikes.values())[-1]
    print(int(expected.sum()), int((spikes != expected).sum()))


if __name__ == "__main__":
    main()
