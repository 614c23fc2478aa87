"""Spiking networks shrunk in time to one timestep: fused LIF kernels and IIR-SNN training.

Public names are loaded when they are asked for, so `import iirsnn` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import conversion, event, functional, models, nn, ops, runtime
    from .conversion import (
        NeuronConfig,
        convert,
        from_nir,
        replace_neurons,
        to_nir,
        to_onnx,
    )
    from .models import GraphNetwork, Network
    from .nn import (
        BatchNormLIF,
        FusedLIF,
        Readout,
        SharedDropout,
        SpikeAvgPool2d,
        SpikeConv2d,
        SpikeLinear,
        TimeSequential,
        record,
        reset_state,
        use_spike_layers,
    )
    from .ops import PackedSpikes
    from .ops.environment import env_report

_ROOM_OF = {
    "BatchNormLIF": "nn",
    "FusedLIF": "nn",
    "GraphNetwork": "models",
    "Network": "models",
    "NeuronConfig": "conversion",
    "PackedSpikes": "ops",
    "Readout": "nn",
    "SharedDropout": "nn",
    "SpikeAvgPool2d": "nn",
    "SpikeConv2d": "nn",
    "SpikeLinear": "nn",
    "TimeSequential": "nn",
    "convert": "conversion",
    "env_report": "ops.environment",
    "from_nir": "conversion",
    "record": "nn",
    "replace_neurons": "conversion",
    "reset_state": "nn",
    "to_nir": "conversion",
    "to_onnx": "conversion",
    "use_spike_layers": "nn",
}
_ROOMS = ("conversion", "event", "functional", "models", "nn", "ops", "runtime")

__all__ = [
    "BatchNormLIF",
    "FusedLIF",
    "GraphNetwork",
    "Network",
    "NeuronConfig",
    "PackedSpikes",
    "Readout",
    "SharedDropout",
    "SpikeAvgPool2d",
    "SpikeConv2d",
    "SpikeLinear",
    "TimeSequential",
    "conversion",
    "convert",
    "env_report",
    "event",
    "from_nir",
    "functional",
    "models",
    "nn",
    "ops",
    "record",
    "replace_neurons",
    "reset_state",
    "runtime",
    "to_nir",
    "to_onnx",
    "use_spike_layers",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
