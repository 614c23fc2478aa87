"""A small network with one of each layer, and its training step."""

import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF, Network, Readout, TimeSequential, use_spike_layers


def network():
    """[B, 3, 16, 16] -> [B, 10]: BatchNormLIF, a neuron with a state, one with learned channels."""
    layers = TimeSequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        BatchNormLIF(nn.BatchNorm2d(8), FusedLIF()),
        nn.Conv2d(8, 8, 3, padding=1),
        FusedLIF(stateful=True),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1),
        FusedLIF(channels=8, surrogate="atan"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 20),
        FusedLIF(learn_threshold=False, learn_leak=False),
        Readout(20, 10),
    )
    model = Network(layers)
    model.timesteps = 3
    return use_spike_layers(model)


def training_step(model, images, labels):
    """A call that trains the model once: zeroed gradients, forward, loss, backward, optimiser."""
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)

    def step():
        optimiser.zero_grad(set_to_none=False)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step
