"""VGG networks of 32x32 images, the same weights and the same spikes for every contender."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from contenders import CONTENDERS, LIMIT, Limit, available, iirsnn_lif, reference
from sameness import Sameness
from torch import Tensor, nn

from iirsnn import BatchNormLIF, FusedLIF, Network, Readout, TimeSequential, use_spike_layers
from iirsnn.functional import lif
from iirsnn.models.vgg import LAYERS, vgg

IMAGE = (3, 32, 32)
CLASSES = 10


class BatchFirst(nn.Module):
    """The layers of a Network over [B, T, ...], for neurons that want that."""

    def __init__(self, layers: nn.Sequential, timesteps: int) -> None:
        super().__init__()
        self.layers = layers
        self.timesteps = timesteps

    def forward(self, images: Tensor) -> Tensor:
        x = images.unsqueeze(1).expand(-1, self.timesteps, *images.shape[1:])
        for module in self.layers:
            if isinstance(module, Readout):
                x = module(x.transpose(0, 1))
            elif getattr(module, "over_time", False):
                x = module(x)
            elif x.stride(1) == 0 and self.timesteps > 1:  # the image: the same at every timestep
                x = module(x[:, 0])
                x = x.unsqueeze(1).expand(-1, self.timesteps, *x.shape[1:])
            else:
                x = module(x.flatten(0, 1)).unflatten(0, (-1, self.timesteps))
        return x


def with_neurons(name: str, neuron: Callable[[], nn.Module], timesteps: int) -> Network:
    """A VGG with BatchNorm, whose ReLUs are replaced by what `neuron` makes."""
    torch.manual_seed(0)
    network = vgg(LAYERS[name], CLASSES, IMAGE, batch_norm=True)
    network.timesteps = timesteps
    for i, module in enumerate(network.layers):
        if isinstance(module, nn.ReLU):
            network.layers[i] = neuron()
    return network


def force_density(network: Network, images: Tensor, density: float) -> None:
    """Sets the bias of each BatchNorm so that this fraction of its neurons spikes, a timestep."""
    layers = list(network.layers)

    def bias_of(norm: nn.Module):
        def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            (x,) = args
            low, high = -8.0, 8.0
            for _ in range(14):
                middle = (low + high) / 2
                dense = float(lif(x + middle, module.threshold, module.leak).mean()) > density
                low, high = (low, middle) if dense else (middle, high)
            norm.bias.fill_(middle)
            return (x + middle,)

        return hook

    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    handles = [
        layer.register_forward_pre_hook(bias_of(before))
        for before, layer in itertools.pairwise(layers)
        if isinstance(layer, FusedLIF) and isinstance(before, norms)
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()


def densities(network: nn.Module, images: Tensor) -> list[float]:
    """Fraction of each layer's neurons that spike, a timestep."""
    found: list[float] = []
    handles = [
        module.register_forward_hook(lambda m, args, s: found.append(float(s.detach().mean())))
        for module in network.layers
        if isinstance(module, FusedLIF)
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    return found


def neurons(name: str) -> int:
    """Spiking neurons of the network."""
    counts: list[int] = []
    network = with_neurons(name, iirsnn_lif, 1)
    for module in network.layers:
        if isinstance(module, FusedLIF):
            module.register_forward_hook(lambda m, args, s: counts.append(s[0, 0].numel()))
    with torch.no_grad():
        network(torch.zeros(2, *IMAGE))
    return sum(counts)


def _whole(name: str, timesteps: int) -> nn.Module:
    importlib.import_module("torch._functorch.config").donated_buffer = False
    return torch.compile(with_neurons(name, reference, timesteps), dynamic=False)


def with_batch_norm_lif(network: Network) -> Network:
    """The network with each BatchNorm and the neuron after it as one BatchNormLIF."""
    modules: list[nn.Module] = []
    for module in network.layers:
        if isinstance(module, FusedLIF):
            module = BatchNormLIF(modules.pop(), module)
        modules.append(module)
    network.layers = TimeSequential(*modules)
    return network


#: What becomes of iirsnn's network once it has its weights.
FINISH: dict[str, Callable[[Network], nn.Module]] = {
    "iirsnn, spike layers": use_spike_layers,
    "iirsnn, spike layers, BatchNormLIF": lambda n: use_spike_layers(with_batch_norm_lif(n)),
}


def _learned() -> nn.Module:
    return iirsnn_lif(learn_threshold=True, learn_leak=True)


def makers() -> tuple[dict[str, Callable[[str, int], nn.Module]], dict[str, str]]:
    """{contender: (network's name, T) -> module}, and why a contender is missing."""
    found, missing = available()

    def maker(contender):
        def make(name: str, timesteps: int) -> nn.Module:
            network = with_neurons(name, contender.neuron, timesteps)
            return BatchFirst(network.layers, timesteps) if contender.batch_first else network

        return make

    made = {LIMIT: lambda name, timesteps: with_neurons(name, Limit, timesteps)}
    for contender in found:
        made[contender.name] = maker(contender)
        if contender.name == "iirsnn":
            made["iirsnn, learned threshold and leak"] = lambda name, timesteps: with_neurons(
                name, _learned, timesteps
            )
            made |= {extra: maker(contender) for extra in FINISH}
        if contender.name == "torch.compile":
            made["torch.compile, whole network"] = _whole
    return made, missing


def networks(
    name: str,
    timesteps: int,
    density: float | None,
    only: tuple[str, ...] = (),
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Every contender's network, all of them with the same weights, in training mode.

    density: forced on every layer at 16 images; None leaves BatchNorm as it is made.
    layout: of the weights, before spike layers turn theirs into channels_last.
    Norse multiplies its input by 1 - leak: there BatchNorm's weight and bias are larger instead
    (by `input_scale`).
    """
    made, missing = makers()
    weights = with_neurons(name, iirsnn_lif, timesteps)
    if density is not None:
        generator = torch.Generator().manual_seed(2)
        force_density(weights, torch.randn(16, *IMAGE, generator=generator), density)
    shared = {key: value for key, value in weights.named_parameters()}
    shared |= {key: value for key, value in weights.named_buffers() if "threshold" not in key}
    found = {}
    for contender, make in made.items():
        if only and contender not in only:
            continue
        network = make(name, timesteps)
        inner = getattr(network, "_orig_mod", network)
        own = dict(inner.named_parameters()) | dict(inner.named_buffers())
        # statistics of BatchNorm stay shared; weights may change their layout, so they are copies
        mine = {
            key: value.detach().clone() if isinstance(value, nn.Parameter) else value
            for key, value in shared.items()
            if key in own
        }
        inner.load_state_dict(mine, strict=False, assign=True)
        scale = input_scale(contender)
        if scale != 1:
            for module in inner.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.weight = nn.Parameter(module.weight.detach() * scale)
                    module.bias = nn.Parameter(module.bias.detach() * scale)
        network.to(memory_format=layout)
        found[contender] = FINISH[contender](network) if contender in FINISH else network
    return found, missing


def input_scale(name: str) -> float:
    """What a contender's neurons want their input multiplied by."""
    return next((c.input_scale for c in CONTENDERS if c.name == name), 1.0)


def same_layers(sameness: Sameness, name: str, network: nn.Module) -> float:
    """The largest difference of a contender's layers, see `Sameness.check`."""
    batch_first = isinstance(network, BatchFirst)
    return sameness.check(name, network, input_scale(name), batch_first)


class Step:
    """One training step: forward, loss, backward, SGD. Called, it gives the loss.

    At a learning rate of 0, which costs as much and leaves the weights to all contenders alike.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.0)

    def forward(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        return F.cross_entropy(self.network(self.images), self.labels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()

    def __call__(self) -> Tensor:
        loss = self.forward()
        self.backward(loss)
        return loss.detach()


def batch_of(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, *IMAGE, generator=generator)
    return images, torch.randint(CLASSES, (size,), generator=generator)


def training_step(
    name: str, contender: str, timesteps: int, batch: int, density: float
) -> Callable[[], Tensor]:
    """A training step of one contender alone (for a process of its own)."""
    found, missing = networks(name, timesteps, density, only=(contender,))
    if contender not in found:
        raise ValueError(f"contender: expected one of {list(found)}, got {contender}: {missing}")
    return Step(found[contender], *batch_of(batch))
