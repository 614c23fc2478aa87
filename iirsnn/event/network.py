"""A trained model as an event-driven engine: it adds weights where spikes are, and nothing else.

The engine itself is C++ (csrc/event/). This module builds it of a model's layers, keeps them in a
file, and hands images over.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import threading
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import atomic_files
from ..errors import RunError, UsageError, check_choice
from ..models import Network
from ..nn import SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_plain_layers
from ..ops import build
from .layer import Layer, Window, check_finite
from .model_reader import layers_of
from .quantise import PRECISIONS, quantise

FORMAT = 2  # 2: residual blocks

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
        spikes: that it gave (0 for a pool and the readout).
        neurons: of one image.
        additions: weights added, one for each event and output it reaches, and the additions that
            double and sum up the digits of average-pooled counts.
        multiplications: multiply-accumulates; of the layer that sees the image alone.
        dense_operations: multiply-accumulates of a dense network's same layer, once an image.
        weight_bytes: of the weights that the additions read.
        spike_bytes: of the bits read and written.
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
        self._engine: Any = None
        self._dense: list[int] = []
        self._building = threading.Lock()
        self._last = threading.local()  # call: the EventCall of a thread's last call; images: its
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
            model: a Network, or an nn.Sequential of Conv2d, Linear, BatchNorm, AvgPool2d,
                MaxPool2d, Flatten, Dropout, FusedLIF and ResidualBlock that ends in a Linear; left
                unchanged.
            timesteps: T that the model was trained at.
            precision: fp32, bf16 or int8, of all weights but those that see the image.
            image_shape: (channels, height, width); None: the Network's, or that of the first
                images.

        Raises:
            UsageError: a module the engine does not have, by its name; a wrong T, precision or
                shape; weights that are not finite.
        """
        check_choice("precision", precision, PRECISIONS)
        if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
            raise UsageError(f"timesteps: expected an integer of at least 1, got {timesteps!r}")
        if isinstance(model, Network):
            if model.timesteps != timesteps:
                raise UsageError(
                    f"timesteps: expected the T of the model, {model.timesteps}, got {timesteps}"
                )
            image_shape = image_shape or model.image_shape  # type: ignore[assignment]
        if any(isinstance(module, _SPIKE_LAYERS) for module in model.modules()):
            model = use_plain_layers(copy.deepcopy(model))
        layers = layers_of(model)
        for layer in layers[1:]:  # the first one sees the image
            quantise(layer, precision)
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
        if not math.isfinite(float(images.sum())) and not bool(images.isfinite().all()):
            raise UsageError("images: expected finite values, got inf or NaN")
        self._last.call = None  # its memory is for this call
        logits, call = self._engine.run(images.numpy(), torch.get_num_threads())
        self._last.call, self._last.images = call, len(images)
        if not self._judged and len(images):
            self._judged = True
            self._warn_if_dense()
        return torch.from_numpy(logits)

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
        call, images = self._last_call("statistics")
        return [
            LayerStatistics(layer.name, dense_operations=dense * images, **counted)
            for layer, dense, counted in zip(self.layers, self._dense, call.report(), strict=True)
        ]

    def _last_call(self, what: str) -> tuple[Any, int]:
        if getattr(self._last, "call", None) is None:
            raise RunError(f"{what}: expected a call of the network by this thread first")
        return self._last.call, self._last.images

    def spikes(self) -> list[Tensor]:
        """Spikes of this thread's last call: of each layer with neurons, bool [T, B, C, H, W].

        Raises:
            RunError: this thread has made no call yet.
        """
        call, images = self._last_call("spikes")
        found = []
        for index, layer in enumerate(self.layers):
            if layer.threshold is None:
                continue
            # little-endian words: byte k of a word holds channels 8k to 8k + 7
            words = self._engine.bits(call, index + 1)
            bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
            spikes = torch.from_numpy(bits[..., : len(layer.threshold)]).bool()
            found.append(spikes.unflatten(0, (images, self.timesteps)).permute(1, 0, 4, 2, 3))
        return found

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
        tensors, layers = {}, []
        for index, layer in enumerate(self.layers):
            entry = {
                key: value
                for key, value in vars(layer).items()
                if key not in (*Layer.TENSORS, *Layer.WINDOWS)
            }
            for key in Layer.WINDOWS:
                if getattr(layer, key) is not None:
                    entry[key] = vars(getattr(layer, key))
            for key in Layer.TENSORS:
                if getattr(layer, key) is not None:
                    tensors[f"{index}.{key}"] = getattr(layer, key)
            layers.append(entry)
        header = {
            "event_format": FORMAT,
            "timesteps": self.timesteps,
            "precision": self.precision,
            "image_shape": self.image_shape,
            "layers": layers,
            "notes": self.notes,
        }
        return tensors, header

    @classmethod
    def load(cls, path: str | Path) -> EventNetwork:
        """The network in a file that `save` wrote.

        Raises:
            RunError: missing, truncated, damaged, of a newer format, or no such network.
        """
        return cls._made_of(*atomic_files.load(Path(path)), path)

    @classmethod
    def _made_of(
        cls, tensors: dict[str, Tensor], header: dict[str, Any], path: str | Path
    ) -> EventNetwork:
        version = header.get("event_format")
        if not isinstance(version, int):
            raise RunError(f"{path}: a checkpoint of iirsnn, but no event network")
        if version > FORMAT:
            raise RunError(
                f"{path}: expected event format {FORMAT} or older, got {version}; "
                "a newer iirsnn wrote it"
            )
        try:
            layers = []
            for index, entry in enumerate(header["layers"]):
                entry = dict(entry)
                for key in Layer.WINDOWS:
                    if key in entry:
                        entry[key] = Window(**{k: tuple(v) for k, v in entry[key].items()})
                for key in Layer.TENSORS:
                    entry[key] = tensors.get(f"{index}.{key}")
                layer = Layer(**entry)
                check_finite(layer)
                layers.append(layer)
            shape = header["image_shape"]
            return cls(
                layers,
                header["timesteps"],
                header["precision"],
                None if shape is None else tuple(shape),
                header["notes"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunError(f"{path}: damaged event network ({error})") from error

    def _build(self, image_shape: tuple[int, int, int]) -> None:
        engine = _extension().EventEngine(*image_shape, self.timesteps)
        source, dense = 0, []
        for layer in self.layers:
            shape = engine.shape(source)
            try:
                if layer.kind in ("max_pool", "average_pool"):
                    assert layer.window is not None
                    add = (
                        engine.add_max_pool if layer.kind == "max_pool" else engine.add_average_pool
                    )
                    source = add(source, layer.window.numbers())
                    dense.append(0)
                    continue
                weight, window = _on(shape, layer)
                precision = self.precision if source else "fp32"
                synapses = [(source, weight.float().numpy(), layer.groups, window.numbers())]
                skips, operations = [], weight.numel()
                bias, scale = _vector(layer.bias), _vector(layer.scale)
                if layer.kind == "readout":
                    engine.add_readout(*synapses, precision, bias, scale)
                    dense.append(operations)
                    continue
                if layer.shortcut_weight is not None:
                    assert layer.shortcut is not None
                    assert layer.shortcut_window is not None
                    short, numbers = layer.shortcut_weight, layer.shortcut_window.numbers()
                    synapses.append((layer.shortcut + 1, short.float().numpy(), 1, numbers))
                    operations += short.numel()
                elif layer.shortcut is not None:
                    skips.append((layer.shortcut + 1, layer.shortcut_unit))
                source = engine.add_neurons(
                    synapses,
                    skips,
                    precision,
                    bias,
                    scale,
                    _vector(layer.threshold),
                    _vector(layer.leak),
                    layer.reset,
                    layer.v_reset,
                )
                dense.append(operations * math.prod(engine.shape(source)[1:]))
            except ValueError as error:
                raise UsageError(
                    f"{layer.name}: cannot follow {' x '.join(map(str, shape))} ({error})"
                ) from error
        self._engine, self._dense, self.image_shape = engine, dense, image_shape

    def _warn_if_dense(self) -> None:
        density = self.density()
        if density > DENSE_WINS:
            warnings.warn(
                f"this network makes {density:.2f} additions for each operation of a dense one: "
                f"above about {DENSE_WINS} the dense network is faster",
                RuntimeWarning,
                stacklevel=3,
            )


def _from_bytes(content: bytes) -> EventNetwork:
    """The network whose file would hold these bytes."""
    return EventNetwork._made_of(*atomic_files.from_bytes(content), "event network")


def _extension() -> Any:
    reason = build.load()
    if reason is not None:
        raise RunError(f"the event engine needs the compiled extension: {reason}")
    return importlib.import_module("iirsnn._C")


def _vector(tensor: Tensor | None) -> Any:
    return (torch.zeros(0) if tensor is None else tensor).numpy()


def _on(shape: tuple[int, int, int], layer: Layer) -> tuple[Tensor, Window]:
    """A layer's weight [outputs, channels, *kernel] over a source of that shape, and its window."""
    assert layer.weight is not None
    if layer.window is not None:
        return layer.weight, layer.window
    features = layer.weight.shape[1]
    if features != math.prod(shape):
        raise UsageError(f"expected {math.prod(shape)} input features, got {features}")
    return layer.weight.unflatten(1, shape), Window((shape[1], shape[2]))
