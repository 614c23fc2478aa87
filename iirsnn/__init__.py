"""Spiking networks shrunk in time to one timestep: fused LIF kernels and IIR-SNN training."""

from . import functional
from .batch_norm import BatchNormLIF
from .convert import convert
from .env import env_report
from .models import Network, Readout, SharedDropout, TimeSequential
from .neuron import FusedLIF
from .packed import PackedSpikes
from .spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_spike_layers

__all__ = [
    "BatchNormLIF",
    "FusedLIF",
    "Network",
    "PackedSpikes",
    "Readout",
    "SharedDropout",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "TimeSequential",
    "convert",
    "env_report",
    "functional",
    "use_spike_layers",
]
