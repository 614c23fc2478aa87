"""From images to logits over T timesteps: what every model of this package is."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..nn import Readout, SharedDropout, TimeSequential, direct


class Network(nn.Module):
    """A stack of layers that sees the same image at every timestep (direct encoding).

    With ReLU and one timestep it is the ANN; with `FusedLIF` in place of each ReLU the SNN.

    Args:
        layers: modules in order; see `TimeSequential` for what sees time.
        image_shape: (channels, height, width) of an image; None accepts any.

    Attributes:
        timesteps: T of the next forward pass; may be set at any time.
    """

    def __init__(
        self, layers: Sequence[nn.Module], image_shape: tuple[int, int, int] | None = None
    ) -> None:
        super().__init__()
        self.timesteps = 1
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.layers = TimeSequential(*layers)

    @classmethod
    def from_sequential(cls, model: nn.Sequential) -> Network:
        """A plain ANN whose last layer is a Linear, as a Network that shares its parameters.

        Sequentials inside it are unrolled, and each Dropout gets one mask for all timesteps.

        Raises:
            ValueError: the last layer is not a Linear.
        """
        modules = _unrolled(model)
        last = modules.pop() if modules else None
        if not isinstance(last, nn.Linear):
            raise ValueError(f"model: expected a Linear as the last layer, got {last}")
        readout = Readout(last.in_features, last.out_features, last.bias is not None)
        readout.weight, readout.bias = last.weight, last.bias
        return cls([*modules, readout])

    def forward(self, images: Tensor) -> Tensor:
        """images: float [B, C, H, W], the input current of every timestep -> logits [B, classes].

        Raises:
            ValueError: images of another shape than the network was built for.
        """
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images: expected [B, {expected}], got {list(images.shape)}")
        return self.layers(direct(images, self.timesteps))

    def extra_repr(self) -> str:
        return f"timesteps={self.timesteps}"


def _unrolled(model: nn.Sequential) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for module in model:
        if isinstance(module, nn.Sequential):
            modules.extend(_unrolled(module))
        else:
            modules.append(SharedDropout(module.p) if type(module) is nn.Dropout else module)
    return modules


def initialise(module: nn.Module) -> None:
    """Kaiming's normal weights and zero biases for a convolution or linear layer; for `apply`."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
