"""Networks of any layers, geometry and precision: the event engine against PyTorch, by ==.

Weights, thresholds and images are such that every sum is exact, in whatever order it is made.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from iirsnn import FusedLIF, Network, Readout
from iirsnn.event import EventNetwork
from iirsnn.ops.reference import RESETS
from tests.fuzz.settings import fuzzed

CHANNELS = (1, 2, 3, 15, 16, 17, 33, 64, 65, 70, 130)
LARGEST = 127 / 32  # of a filter's weights: int8 then holds multiples of 1/32 exactly


@dataclass(frozen=True)
class Case:
    """image: [C, H, W]. layers: (name, arguments), as `modules` reads them."""

    image: tuple[int, int, int]
    layers: tuple[tuple[str, tuple], ...]
    timesteps: int
    reset: str
    precision: str
    batch: int
    threads: int
    seed: int

    def modules(self) -> list[nn.Module]:
        made: list[nn.Module] = []
        for name, arguments in self.layers:
            if name == "neurons":
                v_reset = 0.25 if self.reset == "hard" else 0.0
                (channels,) = arguments
                made.append(FusedLIF(channels=channels, reset=self.reset, v_reset=v_reset))
            elif name == "conv":
                channels, outputs, options = arguments
                made.append(nn.Conv2d(channels, outputs, **dict(options)))
            else:
                kinds = {
                    "max_pool": nn.MaxPool2d,
                    "average_pool": nn.AvgPool2d,
                    "flatten": nn.Flatten,
                    "linear": nn.Linear,
                    "readout": Readout,
                }
                made.append(kinds[name](*arguments))
        return made

    def network(self) -> Network:
        network = Network(self.modules(), self.image)
        network.timesteps = self.timesteps
        rng = torch.Generator().manual_seed(self.seed)

        def draw(like: torch.Tensor, low: int, high: int, step: float) -> torch.Tensor:
            return torch.randint(low, high + 1, like.shape, generator=rng) * step

        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.data = draw(module.weight, -3, 3, 0.25)
                module.weight.data.view(len(module.weight), -1)[:, 0] = LARGEST
                if module.bias is not None:
                    module.bias.data = draw(module.bias, -2, 2, 0.25)
            elif isinstance(module, FusedLIF):
                module.threshold.data = draw(module.threshold, 1, 20, 0.125)
                module.leak.data = draw(module.leak, 1, 4, 0.25)
        return network.eval()

    def images(self) -> torch.Tensor:
        rng = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(-2, 3, (self.batch, *self.image), generator=rng) * 0.5


def side(size: int, kernel: int, stride: int, dilation: int, padding: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@st.composite
def windows(draw, height, width, dilations=(1, 2, 3), padded=True):
    """kernel, stride, dilation, padding that fit an image, and the size that they make of it."""
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    stride = [draw(st.integers(1, 3)) for _ in range(2)]
    dilation = [draw(st.sampled_from(dilations)) for _ in range(2)]
    padding = [draw(st.integers(0, 3)) if padded else 0 for _ in range(2)]
    for i, size in enumerate((height, width)):
        if size + 2 * padding[i] < dilation[i] * (kernel[i] - 1) + 1:
            kernel[i] = dilation[i] = 1
    numbers = tuple(map(tuple, (kernel, stride, dilation, padding)))
    height, width = (side(size, *(n[i] for n in numbers)) for i, size in enumerate((height, width)))
    return numbers, height, width


@st.composite
def convolutions(draw, channels, height, width):
    numbers, height, width = draw(windows(height, width))
    outputs = draw(st.sampled_from(CHANNELS))
    groups = 1
    if draw(st.integers(0, 3)) == 0:
        groups = draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
        outputs = groups * draw(st.integers(1, max(1, 130 // groups)))
    names = ("kernel_size", "stride", "dilation", "padding", "groups", "bias")
    options = tuple(zip(names, (*numbers, groups, draw(st.booleans())), strict=True))
    return ("conv", (channels, outputs, options)), outputs, height, width


@st.composite
def cases(draw) -> Case:
    image = (draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    channels, height, width = image
    layers = []

    def neurons(count):
        layers.append(("neurons", (draw(st.sampled_from((None, count))),)))

    layer, channels, height, width = draw(convolutions(channels, height, width))
    layers.append(layer)
    neurons(channels)
    spikes, averaged = True, 1
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(("conv", "conv", "max_pool", "average_pool")))
        if kind == "conv":
            layer, channels, height, width = draw(convolutions(channels, height, width))
            layers.append(layer)
            neurons(channels)
            spikes, averaged = True, 1
        elif kind == "max_pool" and spikes:
            (kernel, stride, dilation, _), height, width = draw(
                windows(height, width, padded=False)
            )
            layers.append(("max_pool", (kernel, stride, 0, dilation)))
        elif kind == "average_pool" and averaged < 16:
            kernel = tuple(min(draw(st.sampled_from((1, 2, 4))), n & -n) for n in (height, width))
            stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
            layers.append(("average_pool", (kernel, stride)))
            height, width = (
                side(n, k, s, 1, 0) for n, k, s in zip((height, width), kernel, stride, strict=True)
            )
            spikes, averaged = False, averaged * kernel[0] * kernel[1]
    layers.append(("flatten", ()))
    features = channels * height * width
    if draw(st.booleans()):
        outputs = draw(st.sampled_from((*CHANNELS, 300)))
        layers.append(("linear", (features, outputs)))
        neurons(None)
        features = outputs
    layers.append(("readout", (features, draw(st.integers(1, 40)))))
    return Case(
        image,
        tuple(layers),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(RESETS)),
        draw(st.sampled_from(("fp32", "bf16", "int8"))),
        draw(st.integers(0, 5)),
        draw(st.integers(1, 3)),
        draw(st.integers(0, 2**16)),
    )


def torchs(network: Network, images: torch.Tensor):
    """Logits, and the spikes of every layer with neurons."""
    spikes: list[torch.Tensor] = []
    neurons = [m for m in network.modules() if isinstance(m, FusedLIF)]
    hooks = [m.register_forward_hook(lambda m, i, o: spikes.append(o)) for m in neurons]
    with torch.no_grad():
        logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, spikes


@fuzzed(few=40, share=0.1)
@given(cases())
def test_a_network_gives_what_torch_gives(case):
    network, images = case.network(), case.images()
    torch.set_num_threads(case.threads)
    engine = EventNetwork.from_model(network, case.timesteps, precision=case.precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of networks that are dense
        logits = engine(images)
    expected, spikes = torchs(network, images)
    assert torch.equal(logits, expected)
    for ours, theirs in zip(engine.spikes(), spikes, strict=True):
        assert torch.equal(ours.float().reshape(theirs.shape), theirs)
