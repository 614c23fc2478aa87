"""What BatchNormLIF is compared with: the two modules, one after the other."""

from torch import nn


class Composed(nn.Module):
    def __init__(self, norm, neuron):
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x):
        return self.neuron(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
