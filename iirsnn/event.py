"""A trained model as an event-driven engine: it adds weights where spikes are, and nothing else.

The engine itself is C++ (csrc/event/). This module turns a model into the engine's layers, keeps
them in a file, and hands images over.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _build, checkpoint
from .convert import folded
from .errors import RunError, UsageError, check_choice
from .models import Network, Readout, ResidualBlock, SharedDropout
from .neuron import FusedLIF
from .spike_layers import SpikeAvgPool2d, SpikeConv2d, SpikeLinear, use_plain_layers

FORMAT = 2  # 2: residual blocks
PRECISIONS = ("fp32", "bf16", "int8")

#: Additions, as a fraction of the operations of the dense network that sees an image once, above
#: which that one is faster: extrapolated from batch 16, fp32, VGG16, where events are still 1.6
#: times faster at 0.44 (benchmarks/bench_event.py; at batch 1 it is higher).
DENSE_WINS = 0.7

_IGNORED = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, SharedDropout)
_SPIKE_LAYERS = (SpikeConv2d, SpikeLinear, SpikeAvgPool2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass
class Window:
    """Where a kernel looks: each a pair (rows, columns); padding is zeros, before and after."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)

    def numbers(self) -> list[int]:
        return [*self.kernel, *self.stride, *self.dilation, *self.before, *self.after]


@dataclass(eq=False, repr=False)
class Layer:
    """A layer of the engine. Tensors are those of the file; what is None is not of its kind.

    Attributes:
        kind: conv or linear (with neurons), readout (a linear without), max_pool, average_pool.
        name: of the module in the model.
        weight: [outputs, channels / groups, *kernel], or [outputs, features] in the order of
            nn.Flatten; float32, bfloat16 or int8.
        scale: [outputs], of int8 weights.
        bias, threshold, leak: float32 [outputs].
        reset, v_reset: of the neurons.
        shortcut: index of the layer whose spikes, or counts of an average pool, also reach these
            neurons: the input of the residual block that ends here.
        shortcut_weight, shortcut_window: of a convolution on that way, of the same scale; None:
            each count adds `shortcut_unit` to the current.
    """

    kind: str
    name: str
    window: Window | None = None
    groups: int = 1
    weight: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    leak: Tensor | None = None
    reset: str = "soft"
    v_reset: float = 0.0
    shortcut: int | None = None
    shortcut_weight: Tensor | None = None
    shortcut_window: Window | None = None
    shortcut_unit: float = 1.0

    TENSORS = ("weight", "scale", "bias", "threshold", "leak", "shortcut_weight")
    WINDOWS = ("window", "shortcut_window")

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __eq__(self, other: object) -> bool:
        """Whether all is the same, tensors bit for bit."""
        if not isinstance(other, Layer):
            return NotImplemented
        mine, theirs = vars(self), vars(other)
        return all(
            _same_tensor(mine[key], theirs[key])
            if key in Layer.TENSORS
            else mine[key] == theirs[key]
            for key in mine
        )

    def __repr__(self) -> str:
        weight = ""
        if self.weight is not None:
            kind = str(self.weight.dtype).removeprefix("torch.")
            weight = f", weight={kind}{list(self.weight.shape)}"
        return f"Layer({self.kind}, {self.name!r}{weight})"


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
        layers = _layers(model)
        for layer in layers[1:]:  # the first one sees the image
            _quantise(layer, precision)
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
        return _from_bytes, (checkpoint.to_bytes(*self._contents()),)

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
        checkpoint.save(Path(path), *self._contents())

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
        return cls._made_of(*checkpoint.load(Path(path)), path)

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
                _check_finite(layer)
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
    return EventNetwork._made_of(*checkpoint.from_bytes(content), "event network")


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def _extension() -> Any:
    reason = _build.load()
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


def _leaves(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that compute, in order, with their names."""
    if isinstance(module, Network):
        yield from _leaves(module.layers, "layers")
    elif isinstance(module, nn.Sequential):
        for key, child in module.named_children():
            yield from _leaves(child, f"{name}.{key}" if name else key)
    else:
        yield name or "model", module


def _unsupported(name: str, module: nn.Module, why: str) -> UsageError:
    return UsageError(f"{name} ({type(module).__name__}): {why}")


def _layers(model: nn.Module) -> list[Layer]:
    """The engine's layers of a model in eval mode, float32."""
    reader = _Reader()
    last = reader.read(_leaves(model))
    if last is None or isinstance(last[1], nn.Conv2d):
        raise UsageError("model: expected a Linear as its last layer, without neurons")
    return [*reader.layers, replace(_synapses(*last, reader.divisor), kind="readout")]


class _Reader:
    """Collects the engine's layers module by module.

    Attributes:
        layers: so far.
        flat: a Flatten was there.
        divisor: what the average pools since the last neurons left to be divided by.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.flat = False
        self.divisor = 1

    def read(self, modules: Iterable[tuple[str, nn.Module]]) -> tuple[str, nn.Module] | None:
        """Adds the layers of the modules; a last Conv2d or Linear without neurons is returned."""
        pending: tuple[str, nn.Module] | None = None  # a Conv2d or Linear; its neurons come next
        for name, module in modules:
            kind = type(module)
            if kind in _IGNORED:
                continue
            if pending is not None and kind not in (*_BATCH_NORMS, FusedLIF):
                after = f"{name} ({kind.__name__})"
                raise _unsupported(
                    *pending, f"expected a BatchNorm or FusedLIF after it, got {after}"
                )
            if kind is nn.Flatten:
                if module.start_dim != 1 or module.end_dim not in (-1, 3):
                    raise _unsupported(name, module, "expected start_dim=1 and end_dim=-1")
                self.flat = True
            elif kind in (nn.Conv2d, nn.Linear, Readout):
                if self.flat == (kind is nn.Conv2d):
                    wanted = "no" if self.flat else "a"
                    raise _unsupported(name, module, f"expected {wanted} Flatten before")
                pending = (name, module)
            elif kind in _BATCH_NORMS:
                if pending is None:
                    raise _unsupported(name, module, "expected a Conv2d or Linear before it")
                pending = (pending[0], _fold(pending[1], name, module))
            elif kind is FusedLIF:
                if pending is None:
                    raise _unsupported(name, module, "expected a Conv2d or Linear before it")
                self._add(_neurons(_synapses(*pending, self.divisor), name, module))
                pending = None
            elif kind in (nn.AvgPool2d, nn.MaxPool2d):
                self._check_spikes(name, module)
                if kind is nn.MaxPool2d:
                    self.layers.append(Layer("max_pool", name, _max_window(name, module)))
                else:
                    window = _average_window(name, module)
                    self.divisor *= math.prod(window.kernel)
                    self.layers.append(Layer("average_pool", name, window))
            elif kind is ResidualBlock:
                self._check_spikes(name, module)
                self._add_block(name, module)
            else:
                raise _unsupported(name, module, "the event engine has no such module")
        return pending

    def _check_spikes(self, name: str, module: nn.Module) -> None:
        if not self.layers or self.flat:
            wanted = "no Flatten" if self.flat else "a FusedLIF"
            raise _unsupported(name, module, f"expected {wanted} before it")

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)
        self.divisor = 1

    def _add_block(self, name: str, block: nn.Module) -> None:
        assert isinstance(block, ResidualBlock)
        entry, divisor = len(self.layers) - 1, self.divisor
        last = self.read(_leaves(block.main, f"{name}.main"))
        short = _Reader()
        way = short.read(_leaves(block.shortcut, f"{name}.shortcut"))
        if last is None or short.layers or not isinstance(block.neuron, FusedLIF):
            raise _unsupported(
                name, block, "expected conv, FusedLIF, conv; no neurons beside; a FusedLIF after"
            )
        layer = _synapses(*last, self.divisor)
        layer.shortcut, layer.shortcut_unit = entry, 1 / divisor
        if way is not None:
            beside = _synapses(*way, divisor)
            if beside.groups != 1:
                raise _unsupported(*way, f"expected groups=1, got {beside.groups}")
            assert layer.bias is not None
            assert beside.bias is not None
            layer.bias = layer.bias + beside.bias
            layer.shortcut_weight, layer.shortcut_window = beside.weight, beside.window
        self._add(_neurons(layer, f"{name}.neuron", block.neuron))


def _fold(layer: nn.Module, name: str, norm: nn.Module) -> nn.Module:
    try:
        both = folded(layer, norm)
    except ValueError as error:
        raise _unsupported(name, norm, str(error)) from error
    if both is None:
        raise _unsupported(name, norm, f"cannot follow {type(layer).__name__}")
    return both


def _synapses(name: str, module: nn.Module, divisor: int) -> Layer:
    """A Conv2d or Linear; `divisor`: what the average pools before it left to be divided by."""
    assert isinstance(module, (nn.Conv2d, nn.Linear))
    weight = (module.weight.detach().double() / divisor).float().cpu()
    bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach().float().cpu()
    layer = Layer("linear", name, weight=weight.contiguous(), bias=bias.clone())
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            raise _unsupported(
                name, module, f"expected padding with zeros, got {module.padding_mode}"
            )
        kernel, dilation = _pair(module.kernel_size), _pair(module.dilation)
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before = (total[0] // 2, total[1] // 2)
            after = (total[0] - before[0], total[1] - before[1])
        else:
            before = after = (0, 0) if module.padding == "valid" else _pair(module.padding)
        layer.window = Window(kernel, _pair(module.stride), dilation, before, after)
        layer.kind, layer.groups = "conv", module.groups
    _check_finite(layer)
    return layer


def _neurons(layer: Layer, name: str, module: nn.Module) -> Layer:
    assert isinstance(module, FusedLIF)
    assert layer.bias is not None
    for option in ("stateful", "packed", "return_v"):
        if getattr(module, option):
            raise _unsupported(name, module, f"expected {option}=False")
    outputs = len(layer.bias)
    for key in ("threshold", "leak"):
        value = getattr(module, key).detach().float().cpu().reshape(-1)
        if value.numel() not in (1, outputs):
            raise _unsupported(
                name, module, f"{key}: expected 1 element or {outputs}, got {value.numel()}"
            )
        setattr(layer, key, value.expand(outputs).clone())
    layer.reset, layer.v_reset = module.reset, float(module.v_reset)
    _check_finite(layer)
    return layer


def _max_window(name: str, module: nn.Module) -> Window:
    assert isinstance(module, nn.MaxPool2d)
    for option in ("ceil_mode", "return_indices"):
        if getattr(module, option):
            raise _unsupported(name, module, f"expected {option}=False")
    return _pool_window(module, _pair(module.dilation))


def _average_window(name: str, module: nn.Module) -> Window:
    assert isinstance(module, nn.AvgPool2d)
    kernel = _pair(module.kernel_size)
    if module.divisor_override not in (None, math.prod(kernel)):
        raise _unsupported(name, module, "expected no divisor_override")
    if _pair(module.padding) != (0, 0) and not module.count_include_pad:
        raise _unsupported(name, module, "expected count_include_pad=True")
    if module.ceil_mode:
        raise _unsupported(name, module, "expected ceil_mode=False")
    return _pool_window(module, (1, 1))


def _pool_window(module: Any, dilation: tuple[int, int]) -> Window:
    kernel, padding = _pair(module.kernel_size), _pair(module.padding)
    return Window(kernel, _pair(module.stride), dilation, padding, padding)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _quantise(layer: Layer, precision: str) -> None:
    """Its weights as they are kept; those of a shortcut share the scale of their output."""
    if layer.weight is None or precision == "fp32":
        return
    if precision == "bf16":
        layer.weight = layer.weight.to(torch.bfloat16)
        if layer.shortcut_weight is not None:
            layer.shortcut_weight = layer.shortcut_weight.to(torch.bfloat16)
        return
    most = layer.weight.flatten(1).abs().amax(1)
    if layer.shortcut_weight is not None:
        most = torch.maximum(most, layer.shortcut_weight.flatten(1).abs().amax(1))
    scale = torch.where(most > 0, most / 127, torch.ones_like(most))

    def rounded(weight: Tensor) -> Tensor:
        shape = (-1, *[1] * (weight.dim() - 1))
        return (weight / scale.view(shape)).round().clamp(-127, 127).to(torch.int8)

    layer.weight, layer.scale = rounded(layer.weight), scale
    if layer.shortcut_weight is not None:
        layer.shortcut_weight = rounded(layer.shortcut_weight)


def _check_finite(layer: Layer) -> None:
    for key in Layer.TENSORS:
        tensor = getattr(layer, key)
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise UsageError(f"{layer.name}: expected a finite {key}, got inf or NaN")
    if layer.threshold is not None and not bool((layer.threshold > 0).all()):
        raise UsageError(f"{layer.name}: expected thresholds > 0")
