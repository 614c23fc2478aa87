"""What users put into a network: neurons, layers for spikes, wrappers over time."""

from .batch_norm import BatchNormLIF
from .encoding import direct
from .neuron import FusedLIF, neurons, reset_state
from .over_time import Readout, SharedDropout, TimeSequential
from .recorder import Recorder, record
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
    "Recorder",
    "SharedDropout",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "TimeSequential",
    "direct",
    "neurons",
    "record",
    "reset_state",
    "use_plain_layers",
    "use_spike_layers",
]
