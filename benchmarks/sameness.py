"""Whether a network is iirsnn's, layer by layer from the same inputs and the same gradients.

Spiking networks are chaotic: a rounding error moves one current across a threshold, and from there
a deep network goes another way, so whole networks cannot be compared. One layer can: its output and
gradients differ by rounding alone, and a neuron's by the few currents within rounding of a
threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iirsnn import BatchNormLIF, FusedLIF

#: Relative difference of a layer's output and gradients: sums of thousands of float32.
ROUNDING = 1e-4
#: Values of a neuron's output and gradients that may be others: a fraction of them, and a few more.
FLIPS, FEW = 1e-4, 4
#: From here on a value is another one: relative to itself and to the tensor's root mean square.
ANOTHER = 1e-3


@dataclass(frozen=True)
class Results:
    """Of a layer run alone: its output, its input's gradient and its parameters' gradients."""

    output: Tensor
    input: Tensor
    parameters: dict[str, Tensor]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def others(found: Tensor, expected: Tensor) -> float:
    """Fraction of the values that are others."""
    size = expected.abs() + expected.square().mean().sqrt()
    return float(((found - expected).abs() <= ANOTHER * size).logical_not_().float().mean())


def run(module: nn.Module, x: Tensor, grad: Tensor) -> Results:
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = module(leaf)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output, [leaf, *parameters.values()], grad, allow_unused=True)
    return Results(output.detach(), grads[0], dict(zip(parameters, grads[1:], strict=True)))


class Pair(nn.Module):
    """A BatchNorm and a neuron on [T, B, ...], as a BatchNormLIF takes it."""

    def __init__(self, norm: nn.Module, neuron: nn.Module) -> None:
        super().__init__()
        self.norm, self.neuron = norm, neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class Sameness:
    """Every layer of a network as a yardstick for the networks of other contenders.

    network: a Network of FusedLIF whose neurons are those of `with_neurons`; its layers stay in the
        mode (training or not) that they are in.
    images: [B, C, H, W]; a few are enough.
    """

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        self.layers = list(network.layers)
        self.timesteps, self.batch = network.timesteps, images.shape[0]
        self.inputs: list[Tensor] = []
        self.grads: list[Tensor] = []
        generator = torch.Generator().manual_seed(4)

        def keep(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.inputs.append(args[0].detach())
            self.grads.append(torch.randn(output.shape, generator=generator))

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        with torch.no_grad():
            network(images)
        for hook in hooks:
            hook.remove()

    def check(
        self, name: str, network: nn.Module, scale: float = 1.0, batch_first: bool = False
    ) -> float:
        """The largest difference of a layer; raises AssertionError where one is another layer.

        scale: what the contender's neurons want their input multiplied by, see `networks`.
        batch_first: its neurons take [B, T, ...].
        """
        largest = 0.0
        for layer, module, found, expected in self._pairs(network, scale, batch_first):
            spiking = isinstance(module, (FusedLIF, Pair))
            for what, ours, theirs in (
                ("output", expected.output, found.output),
                ("input's gradient", expected.input, found.input),
                *(
                    (f"gradient of {key}", grad, found.parameters[key])
                    for key, grad in expected.parameters.items()
                ),
            ):
                by_value = spiking and not what.startswith("gradient")
                difference = (others if by_value else relative)(theirs, ours)
                bound = FLIPS + FEW / ours.numel() if by_value else ROUNDING
                bound = 10 * bound if spiking and not by_value else bound  # sums over flips
                if not difference <= bound:
                    raise AssertionError(
                        f"{name}: another network: layer {layer}, {type(module).__name__}: its "
                        f"{what} differs by {difference:.2g}, at most {bound:.2g} are rounding"
                    )
                largest = max(largest, difference)
        return largest

    def _pairs(
        self, network: nn.Module, scale: float, batch_first: bool
    ) -> Iterator[tuple[int, nn.Module, Results, Results]]:
        """(index, this network's layer, the other's results, this one's) of each layer."""
        at = 0
        for module in getattr(network, "_orig_mod", network).layers:
            layer, x, grad = self.layers[at], self.inputs[at], self.grads[at]
            at += 1
            if isinstance(module, BatchNormLIF):
                pair, grad = Pair(layer, self.layers[at]), self.grads[at]
                at += 1
                x = self._over_time(x)
                yield at - 2, pair, run(module, x, grad), run(pair, x, grad)
                continue
            expected = run(layer, x, grad)
            if isinstance(layer, FusedLIF):
                x = self._turned(x * scale, batch_first)
                found = run(module, x, self._turned(grad, batch_first))
                output, back = (self._turned(t, batch_first) for t in (found.output, found.input))
                yield at - 1, layer, Results(output, back * scale, {}), expected
                continue
            factor = scale if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) else 1.0
            found = run(module, x, grad / factor)
            parameters = {key: grad * factor for key, grad in found.parameters.items()}
            yield at - 1, layer, Results(found.output / factor, found.input, parameters), expected

    def _over_time(self, x: Tensor) -> Tensor:
        if x.shape[0] == self.timesteps * self.batch:
            return x.unflatten(0, (self.timesteps, self.batch))
        return x.expand(self.timesteps, *x.shape)

    @staticmethod
    def _turned(x: Tensor, batch_first: bool) -> Tensor:
        return x.transpose(0, 1) if batch_first else x
