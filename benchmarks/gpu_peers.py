"""Neurons of other libraries for gpu_cases.py.

Not those of contenders.py, which all compute one recurrence with one surrogate, whatever it costs:
these are as a user of the library would make them for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_device import Device
from torch import Tensor, nn


def peers(device: Device, *names: str) -> tuple[dict[str, Callable[[], nn.Module]], dict[str, str]]:
    """{label: f() -> a neuron} of other libraries, and for each that cannot run the reason."""
    found: dict[str, Callable[[], nn.Module]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            made = {"spikingjelly": _spikingjelly, "snntorch": _snntorch}[name](device)
            for neuron in made.values():
                neuron()
            found |= made
        except Exception as error:  # another library's: it costs its rows alone
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing


def _spikingjelly(device: Device) -> dict[str, Callable[[], nn.Module]]:
    """SpikingJelly 2's LIFNode over many steps, by the kernels that it chooses for the device.

    Its own choice is all there is: `node.backend` plays no part any more.
    """
    from spikingjelly.activation_based import functional, neuron, surrogate

    class Neuron(nn.Module):
        over_time = True

        def __init__(self) -> None:
            super().__init__()
            self.node = neuron.LIFNode(
                **{"tau": 2.0, "decay_input": False, "v_reset": None, "detach_reset": True},
                **{"surrogate_function": surrogate.ATan(), "step_mode": "m"},
            ).to(device.name)

        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self.node)
            s: Tensor = self.node(x)
            return s

    chosen = functional.neuron_implementation("lif", torch.device(device.name))
    return {f"spikingjelly ({chosen['implementation']})": Neuron}


def _snntorch(device: Device) -> dict[str, Callable[[], nn.Module]]:
    import snntorch

    class Neuron(nn.Module):
        over_time = True

        def __init__(self) -> None:
            super().__init__()
            self.cell = snntorch.Leaky(beta=0.5, reset_mechanism="subtract").to(device.name)

        def forward(self, x: Tensor) -> Tensor:
            membrane, spikes = self.cell.init_leaky(), []
            for current in x:
                s, membrane = self.cell(current, membrane)
                spikes.append(s)
            return torch.stack(spikes)

    return {"snntorch": Neuron}
