"""What users put into a network: neurons, layers for spikes, wrappers over time."""

from .batch_norm import BatchNormLIF
from .encoding import direct
from .neuron import FusedLIF, neurons
from .over_time import Readout, SharedDropout, TimeSequential
from .spike_layers import (
    SpikeAvgPool2d,
    SpikeConv2d,
    SpikeLinear,
    use_plain_layers,
    use_spike_layers,
)

__all__ = [
    "BatchNormLIF",
    "FusedLIF",
    "Readout",
    "SharedDropout",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "TimeSequential",
    "direct",
    "neurons",
    "use_plain_layers",
    "use_spike_layers",
]
