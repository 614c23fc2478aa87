"""A trained model as an event-driven engine: it adds weights where spikes are, and nothing else.

The engine itself is that of `iirsnn.runtime` (csrc/event/). This module makes its file of a model's
layers and hands images over.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import atomic_files
from ..errors import RunError, UsageError, check_choice, check_timesteps
from ..models import Network
from ..models.graph import GraphNetwork
from ..nn import SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_plain_layers
from ..runtime.engine import Call, Engine
from ..runtime.library import NoNetwork
from .file_format import parse, upgraded, write
from .layer import Layer
from .model_reader import layers_of
from .quantise import PRECISIONS, quantise

#: Additions, as a fraction of the operations of the dense network that sees an image once, above
#: which that one is faster: extrapolated from batch 16, fp32, VGG16, where events are still 1.6
#: times faster at 0.44 (benchmarks/bench_event.py; at batch 1 it is higher).
DENSE_WINS = 0.7

_SPIKE_LAYERS = (SpikeConv2d, SpikeLinear, SpikeAvgPool2d)


@dataclass
class LayerStatistics:
    """What one layer did in the last call, summed over its images and timesteps.

    Attributes:
        name: of the module.
        spikes: that it gave (0 without neurons).
        neurons: of one image.
        additions: weights added, one for each event and output it reaches, the additions that
            double and sum up the digits of average-pooled counts, and those of skips, sums and
            pools of real values.
        multiplications: multiply-accumulates, of layers that see the image or other real values.
        dense_operations: multiply-accumulates of a dense network's same layer, once an image.
        weight_bytes: of the weights that the additions read.
        spike_bytes: of the bits read and written.
        value_bytes: of the real values read and written, but for the image's.
        milliseconds: wall-clock time.
    """

    name: str
    spikes: int
    neurons: int
    additions: int
    multiplications: int
    dense_operations: int
    weight_bytes: int
    spike_bytes: int
    value_bytes: int
    milliseconds: float


@dataclass(eq=False, repr=False)
class EventNetwork:
    """A spiking network that runs by events; made by `from_model` or `load`.

    Any number of threads may call one at once, with batches of any size: they share its weights.
    `statistics`, `spikes` and `density` tell of the calling thread's own last call.
    Copies and pickles are made through the bytes of its file. Two are equal (==) when their files
    would be.

    Attributes:
        layers: in order.
        timesteps: T.
        precision: of the weights that spikes meet: fp32, bf16 or int8 (one scale an output).
        image_shape: (channels, height, width); None until the first images where the model did not
            say.
        notes: JSON values kept in the file, e.g. how images are normalised.
    """

    layers: list[Layer]
    timesteps: int
    precision: str = "fp32"
    image_shape: tuple[int, int, int] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._engine: Engine | None = None
        self._building = threading.Lock()
        self._last = threading.local()  # call: of a thread
        self._judged = False
        if self.image_shape is not None:
            self._build(self.image_shape)

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: nn.Module,
        timesteps: int = 1,
        *,
        precision: str = "fp32",
        image_shape: tuple[int, int, int] | None = None,
    ) -> EventNetwork:
        """The engine of a model, as the model computes in eval mode.

        Args:
            model: a Network, a GraphNetwork (what `convert` makes), an nn.Sequential, or any
                module that torch.fx can trace, of the operations in docs/inference.md; left
                unchanged.
            timesteps: T that the model was trained at.
            precision: fp32, bf16 or int8, of all weights that spikes alone meet; those that meet
                the image or other real values stay fp32.
            image_shape: (channels, height, width); None: the model's, or that of the first images,
                which a chain of layers can wait for and a graph cannot.

        Raises:
            UsageError: a module or function the engine does not have, by its name; a wrong T,
                precision or shape; weights that are not finite.
        """
        check_choice("precision", precision, PRECISIONS)
        check_timesteps(timesteps)
        if isinstance(model, (Network, GraphNetwork)):
            if model.timesteps != timesteps:
                raise UsageError(
                    f"timesteps: expected the T of the model, {model.timesteps}, got {timesteps}"
                )
            image_shape = image_shape or model.image_shape  # type: ignore[assignment]
        if any(isinstance(module, _SPIKE_LAYERS) for module in model.modules()):
            model = use_plain_layers(copy.deepcopy(model))
        layers = layers_of(model, image_shape, timesteps)
        quantise(layers, precision)
        return cls(layers, timesteps, precision, image_shape)

    def __call__(self, images: Tensor) -> Tensor:
        """images: float [B, C, H, W], the input current at every timestep -> logits [B, classes].

        Raises:
            UsageError: images of another shape, or that are not finite.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
            got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise UsageError(f"images: expected a float tensor [B, C, H, W], got {got}")
        if self.image_shape is None:
            with self._building:
                if self.image_shape is None:
                    channels, height, width = images.shape[1:]
                    self._build((channels, height, width))
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape or ()))
            raise UsageError(f"images: expected [B, {expected}], got {list(images.shape)}")
        images = images.detach().to("cpu", torch.float32).contiguous()
        assert self._engine is not None
        # beside the images, whatever torch's default device is
        logits = images.new_empty(len(images), self._engine.facts.classes)
        self._last.call = None  # its memory is for this call
        self._last.call = self._engine.run(
            images.data_ptr(), len(images), logits.data_ptr(), torch.get_num_threads()
        )
        if not self._judged and len(images):
            self._judged = True
            self._warn_if_dense()
        return logits

    __hash__ = None  # type: ignore[assignment]  # its layers can change

    def __eq__(self, other: object) -> bool:
        """Whether their files would be the same."""
        if not isinstance(other, EventNetwork):
            return NotImplemented
        return all(
            getattr(self, f.name) == getattr(other, f.name) for f in dataclasses.fields(self)
        )

    def __repr__(self) -> str:
        shape = None if self.image_shape is None else list(self.image_shape)
        head = f"EventNetwork(T={self.timesteps}, {self.precision}, image_shape={shape}"
        return "\n".join([head, *(f"  {layer}" for layer in self.layers)]) + ")"

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (atomic_files.to_bytes(*self._contents()),)

    def statistics(self) -> list[LayerStatistics]:
        """What each layer did in this thread's last call.

        Raises:
            RunError: this thread has made no call yet.
        """
        call, found = self._last_call("statistics"), []
        for layer, did in zip(self.layers, call.layers(), strict=True):
            weights = sum(weight.numel() for weight in layer.weights)
            dense = call.images * did["height"] * did["width"] * weights
            counted = {each.name: did[each.name] for each in _COUNTED}
            found.append(LayerStatistics(name=layer.name, dense_operations=dense, **counted))
        return found

    def _last_call(self, what: str) -> Call:
        call: Call | None = getattr(self._last, "call", None)
        if call is None:
            raise RunError(f"{what}: expected a call of the network by this thread first")
        return call

    def spikes(self) -> list[Tensor]:
        """Spikes of this thread's last call: of each layer with neurons, bool [T, B, C, H, W].

        Raises:
            RunError: this thread has made no call yet.
        """
        call = self._last_call("spikes")
        return [
            torch.from_numpy(call.spikes(index)).bool().permute(1, 0, 4, 2, 3)
            for index, layer in enumerate(self.layers)
            if layer.kind == "neurons"
        ]

    def density(self) -> float:
        """Additions of this thread's last call over the operations of a dense network.

        Only layers that see spikes count, dense ones once an image. Above about `DENSE_WINS` the
        dense network is faster.
        """
        layers = [s for s in self.statistics() if s.dense_operations and not s.multiplications]
        dense = sum(layer.dense_operations for layer in layers)
        return sum(layer.additions for layer in layers) / dense if dense else 0.0

    def save(self, path: str | Path) -> None:
        """Write the network to a file: safetensors with a JSON header.

        Raises:
            RunError: it cannot be written.
        """
        atomic_files.save(Path(path), *self._contents())

    def _contents(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return write(self.layers, self.timesteps, self.precision, self.image_shape, self.notes)

    @classmethod
    def load(cls, path: str | Path) -> EventNetwork:
        """The network in a file that `save` wrote.

        Raises:
            RunError: missing, truncated, damaged, of a newer format, or no such network.
        """
        try:
            tensors, header = atomic_files.load(Path(path), "network")
        except RunError:
            raise
        except (
            RuntimeError,
            AttributeError,
            OverflowError,
        ) as error:  # types torch has no name for
            raise RunError(f"{path}: cannot be read as an event network ({error})") from error
        return cls._made_of(tensors, header, path)

    @classmethod
    def _made_of(
        cls, tensors: dict[str, Tensor], header: dict[str, Any], path: str | Path
    ) -> EventNetwork:
        tensors, header = upgraded(tensors, header, path)
        shape, engine = header.get("image_shape"), None
        if shape is not None:
            try:
                engine = _engine_of(tensors, header)
            except NoNetwork as error:
                raise NoNetwork(error.reason, str(path)) from None
        net = cls(*parse(tensors, header, path))
        if engine is not None:
            facts = engine.facts
            net.image_shape = (facts.channels, facts.height, facts.width)
            net._engine = engine
        return net

    def _build(self, image_shape: tuple[int, int, int]) -> None:
        contents = write(self.layers, self.timesteps, self.precision, image_shape, {})
        try:
            self._engine = _engine_of(*contents)
        except NoNetwork as error:
            named = re.sub(r"^layers\.(\d+)", lambda at: self.layers[int(at[1])].name, error.reason)
            raise UsageError(named) from None
        self.image_shape = image_shape

    def _warn_if_dense(self) -> None:
        density = self.density()
        if density > DENSE_WINS:
            warnings.warn(
                f"this network makes {density:.2f} additions for each operation of a dense one: "
                f"above about {DENSE_WINS} the dense network is faster",
                RuntimeWarning,
                stacklevel=3,
            )


_COUNTED = [
    each
    for each in dataclasses.fields(LayerStatistics)
    if each.name not in ("name", "dense_operations")
]


def _engine_of(tensors: dict[str, Tensor], header: dict[str, Any]) -> Engine:
    """The engine of a file's contents, whose notes it does not need. Raises NoNetwork."""
    if isinstance(header.get("notes"), dict):
        header = {**header, "notes": {}}
    return Engine(atomic_files.to_bytes(tensors, header))


def _from_bytes(content: bytes) -> EventNetwork:
    """The network whose file would hold these bytes."""
    return EventNetwork._made_of(*atomic_files.from_bytes(content), "event network")
