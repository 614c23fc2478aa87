"""Whether an engine file says what it may: all of it, before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .layer import KINDS, Input, Layer, Window, give_values

MOST_VALUES = 1 << 31  # of a layer, an image and timestep
MOST_OVER_TIME = 1 << 34
MOST_LAYERS = 1 << 16
MOST_OF_WINDOW = 1 << 16
MOST_TIMESTEPS = (1 << 16) - 2
MOST_COUNT = (1 << 16) - 1

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_RESETS = ("soft", "hard", "none", "soft_delayed")
_POOLS = ("max_pool", "average_pool")
_SUMS = ("neurons", "currents", "readout")  # kinds with a bias, whose inputs may have weights


class Wrong(Exception):
    """What was expected, and what came."""


def check_header(header: Mapping[str, Any]) -> None:
    """Types and ranges of everything in the header. Raises Wrong."""
    _keys(
        "header",
        header,
        {"event_format", "timesteps", "precision", "image_shape", "layers", "notes"},
    )
    _integer("timesteps", header["timesteps"], 1, MOST_TIMESTEPS)
    _choice("precision", header["precision"], _DTYPES)
    if header["image_shape"] is not None:
        _integers("image_shape", header["image_shape"], 3, 1, MOST_VALUES - 1)
    _kind("notes", header["notes"], dict)
    layers = _kind("layers", header["layers"], list)
    if not 0 < len(layers) <= MOST_LAYERS:
        raise Wrong(f"layers: expected 1 to {MOST_LAYERS}, got {len(layers)}")
    for index, entry in enumerate(layers):
        where = f"layers.{index}"
        _kind(where, entry, dict)
        optional = {"window", "size", "reset", "v_reset"}
        _keys(where, entry, {"kind", "name", "inputs"}, optional)
        _choice(f"{where}.kind", entry["kind"], KINDS)
        _kind(f"{where}.name", entry["name"], str)
        if "window" in entry:
            _window(f"{where}.window", entry["window"])
        if "size" in entry:
            _integers(f"{where}.size", entry["size"], 2, 1, MOST_OF_WINDOW)
        _choice(f"{where}.reset", entry.get("reset", "soft"), _RESETS)
        _number(f"{where}.v_reset", entry.get("v_reset", 0.0))
        inputs = _kind(f"{where}.inputs", entry["inputs"], list)
        if not 0 < len(inputs) <= MOST_LAYERS:
            raise Wrong(f"{where}.inputs: expected 1 to {MOST_LAYERS}, got {len(inputs)}")
        for number, each in enumerate(inputs):
            _input(f"{where}.inputs.{number}", each, index)


def check_layers(
    layers: list[Layer], precision: str, timesteps: int, image_shape: list[int] | None
) -> None:
    """That tensors fit the layers, and the layers each other. Raises Wrong."""
    values = give_values(layers)
    shapes: list[tuple[int, int, int] | None] = [
        None if image_shape is None else (image_shape[0], image_shape[1], image_shape[2])
    ]
    for index, layer in enumerate(layers):
        where = f"layers.{index}"
        last = index == len(layers) - 1
        if (layer.kind in ("readout", "output")) != last:
            raise Wrong(
                f"{where}: expected a readout or an output as the last layer, and only there"
            )
        _fields(where, layer)
        if layer.kind in _SUMS:
            _tensors(where, layer, precision, any(values[each.source] for each in layer.inputs))
        shape = _shape(where, layer, [shapes[each.source] for each in layer.inputs])
        if shape is not None and (
            math.prod(shape) >= MOST_VALUES or math.prod(shape) * timesteps >= MOST_OVER_TIME
        ):
            raise Wrong(f"{where}: expected fewer than 2^31 values, got {shape}")
        shapes.append(shape)


def _input(where: str, each: Any, index: int) -> None:
    _kind(where, each, dict)
    _keys(where, each, {"source"}, {"window", "groups", "unit", "first", "channels", "times"})
    _integer(f"{where}.source", each["source"], 0, index)
    _integer(f"{where}.groups", each.get("groups", 1), 1, MOST_VALUES)
    _number(f"{where}.unit", each.get("unit", 1.0))
    _integer(f"{where}.first", each.get("first", 0), 0, MOST_VALUES)
    _integer(f"{where}.channels", each.get("channels", 0), 0, MOST_VALUES)
    _integer(f"{where}.times", each.get("times", 1), 1, MOST_COUNT)
    if "window" in each:
        _window(f"{where}.window", each["window"])


def _fields(where: str, layer: Layer) -> None:
    """What is there is what its kind has."""
    if layer.kind not in (*_SUMS, "channels", "sum") and len(layer.inputs) != 1:
        raise Wrong(f"{where}: expected one input of a {layer.kind}, got {len(layer.inputs)}")
    wanted = {
        "window": layer.kind in _POOLS,
        "size": layer.kind == "adaptive_pool",
        "bias": layer.kind in _SUMS,
        "threshold": layer.kind == "neurons",
        "leak": layer.kind == "neurons",
        "scale": any(weight.dtype == torch.int8 for weight in layer.weights),
    }
    for key, there in wanted.items():
        if there != (getattr(layer, key) is not None):
            raise Wrong(f"{where}: expected {'a' if there else 'no'} {key} of a {layer.kind}")
    for number, each in enumerate(layer.inputs):
        place = f"{where}.inputs.{number}"
        if each.weight is not None and layer.kind not in _SUMS:
            raise Wrong(f"{place}: expected no weight of a {layer.kind}")
        if each.weight is None and each.window is not None:
            raise Wrong(f"{place}: expected a weight beside its window")
        if layer.kind == "channels" and each.channels < 1:
            raise Wrong(f"{place}.channels: expected at least 1, got {each.channels}")
        if each.source == 0 and each.weight is None:
            raise Wrong(f"{place}: expected weights for the image")


def _tensors(where: str, layer: Layer, precision: str, values: bool) -> None:
    assert layer.bias is not None
    outputs = len(layer.bias) if layer.bias.dim() == 1 else 0
    if not 0 < outputs < MOST_VALUES:
        raise Wrong(f"{where}.bias: expected [outputs], got {list(layer.bias.shape)}")
    for key in Layer.TENSORS:
        tensor = getattr(layer, key)
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or list(tensor.shape) != [outputs]:
            got = f"{str(tensor.dtype)[6:]}{list(tensor.shape)}"
            raise Wrong(f"{where}.{key}: expected float32[{outputs}], got {got}")
        _finite(f"{where}.{key}", tensor)
    if layer.threshold is not None and not bool((layer.threshold > 0).all()):
        raise Wrong(f"{where}.threshold: expected numbers > 0")
    kinds = {weight.dtype for weight in layer.weights}
    allowed = {torch.float32} if values else {torch.float32, _DTYPES[precision]}
    if len(kinds) > 1 or not kinds <= allowed:
        got = ", ".join(sorted(str(kind)[6:] for kind in kinds))
        raise Wrong(f"{where}: expected weights of one type that {precision} has, got {got}")
    for number, each in enumerate(layer.inputs):
        if each.weight is not None:
            _weight(f"{where}.weight.{number}", each, each.weight, outputs)


def _weight(where: str, each: Input, weight: Tensor, outputs: int) -> None:
    shape = list(weight.shape)
    kernel = [] if each.window is None else list(each.window.kernel)
    if (
        len(shape) != 2 + len(kernel)
        or shape[0] != outputs
        or shape[2:] != kernel
        or not all(shape)
    ):
        expected = ", ".join(map(str, [outputs, "channels", *kernel]))
        raise Wrong(f"{where}: expected [{expected}], got {shape}")
    if outputs % each.groups:
        raise Wrong(f"{where}: expected outputs in {each.groups} groups, got {outputs}")
    if weight.dtype == torch.int8 and bool((weight == -128).any()):
        raise Wrong(f"{where}: expected integers from -127 to 127, got -128")
    _finite(where, weight)


def _shape(
    where: str, layer: Layer, given: list[tuple[int, int, int] | None]
) -> tuple[int, int, int] | None:
    """What the layer gives, of inputs whose shapes are known; None where they are not."""
    found = []
    for number, (each, shape) in enumerate(zip(layer.inputs, given, strict=True)):
        place = f"{where}.inputs.{number}"
        if shape is None:
            return None
        if each.weight is not None:
            found.append(_convolved(place, each, each.weight, shape))
        elif layer.kind == "channels":
            if each.first + each.channels > shape[0]:
                raise Wrong(f"{place}: expected some of {shape[0]} channels")
            found.append((each.channels, *shape[1:]))
        elif layer.window is not None:
            found.append(_windowed(place, layer.window, shape, shape[0]))
        elif layer.size is not None:
            found.append((shape[0], *layer.size))
        else:
            found.append(shape)
    if layer.kind == "channels":
        if len({shape[1:] for shape in found}) > 1:
            raise Wrong(f"{where}: expected inputs of the same rows and columns, got {found}")
        return (sum(shape[0] for shape in found), *found[0][1:])
    if len(set(found)) > 1:
        raise Wrong(f"{where}: expected inputs of one shape, got {found}")
    if layer.bias is not None and found[0][0] != len(layer.bias):
        raise Wrong(f"{where}: expected {len(layer.bias)} channels, got {found[0][0]}")
    return found[0]


def _convolved(
    where: str, each: Input, weight: Tensor, shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    if each.window is None:
        if weight.shape[1] != math.prod(shape):
            raise Wrong(f"{where}: expected {math.prod(shape)} features, got {weight.shape[1]}")
        return (len(weight), 1, 1)
    if weight.shape[1] * each.groups != shape[0]:
        raise Wrong(
            f"{where}: expected {shape[0]} channels, got {weight.shape[1]} in {each.groups} groups"
        )
    return _windowed(where, each.window, shape, len(weight))


def _windowed(
    where: str, window: Window, shape: tuple[int, int, int], channels: int
) -> tuple[int, int, int]:
    sizes = []
    for axis, size in enumerate(shape[1:]):
        padded = size + window.before[axis] + window.after[axis]
        reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1
        if padded < reach:
            raise Wrong(f"{where}: expected a window that fits {padded}, got {reach}")
        sizes.append((padded - reach) // window.stride[axis] + 1)
    return (channels, sizes[0], sizes[1])


def _keys(where: str, found: Mapping[str, Any], needed: set[str], more: Iterable[str] = ()) -> None:
    missing, extra = needed - set(found), set(found) - needed - set(more)
    if missing or extra:
        what = f"a {min(missing)}" if missing else f"no {min(extra)}"
        raise Wrong(f"{where}: expected {what}")


def _kind(where: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise Wrong(f"{where}: expected a {kind.__name__}, got {value!r:.60}")
    return value


def _choice(where: str, value: Any, choices: Iterable[str]) -> None:
    if value not in (known := list(choices)):
        raise Wrong(f"{where}: expected one of {', '.join(known)}, got {value!r:.60}")


def _integer(where: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise Wrong(f"{where}: expected an integer from {low} to {high}, got {value!r:.60}")


def _integers(where: str, value: Any, count: int, low: int, high: int) -> None:
    if type(value) is not list or len(value) != count:
        raise Wrong(f"{where}: expected {count} integers, got {value!r:.60}")
    for each in value:
        _integer(where, each, low, high)


def _number(where: str, value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= 3e38:
        raise Wrong(f"{where}: expected a finite number, got {value!r:.60}")


def _window(where: str, value: Any) -> None:
    _integers(where, value, 10, 0, MOST_OF_WINDOW)
    if min(value[:6]) < 1:
        raise Wrong(f"{where}: expected a positive kernel, stride and dilation, got {value}")


def _finite(where: str, tensor: Tensor) -> None:
    if not bool(tensor.isfinite().all()):
        raise Wrong(f"{where}: expected finite numbers, got inf or NaN")
