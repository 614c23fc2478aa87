"""What an engine file holds: a JSON header and tensors.

Formats: 3, a graph of layers, which csrc/event/file reads and checks; 2 and 1, a chain of layers,
some with a shortcut (1: none).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import RunError
from .layer import Input, Layer, Window

FORMAT = 3

_INPUT = {"groups": 1, "unit": 1.0, "first": 0, "channels": 0, "times": 1}  # and their defaults


def write(
    layers: list[Layer],
    timesteps: int,
    precision: str,
    image_shape: tuple[int, int, int] | None,
    notes: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a network."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for index, layer in enumerate(layers):
        entry: dict[str, Any] = {"kind": layer.kind, "name": layer.name, "inputs": []}
        for number, each in enumerate(layer.inputs):
            given = {key: getattr(each, key) for key in _INPUT}
            kept = {key: value for key, value in given.items() if value != _INPUT[key]}
            kept["source"] = each.source
            if each.window is not None:
                kept["window"] = each.window.numbers()
            if each.weight is not None:
                tensors[f"{index}.weight.{number}"] = each.weight
            entry["inputs"].append(kept)
        if layer.window is not None:
            entry["window"] = layer.window.numbers()
        if layer.size is not None:
            entry["size"] = list(layer.size)
        if layer.threshold is not None:
            entry["reset"], entry["v_reset"] = layer.reset, layer.v_reset
        for key in Layer.TENSORS:
            if getattr(layer, key) is not None:
                tensors[f"{index}.{key}"] = getattr(layer, key)
        entries.append(entry)
    header = {
        "event_format": FORMAT,
        "timesteps": timesteps,
        "precision": precision,
        "image_shape": None if image_shape is None else list(image_shape),
        "layers": entries,
        "notes": dict(notes),
    }
    return tensors, header


def upgraded(
    tensors: dict[str, Tensor], header: dict[str, Any], path: object
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Contents of a file in the format of today.

    Raises:
        RunError: of a newer format, of an older one and damaged, or no such network.
    """
    header = {key: value for key, value in header.items() if key != "format"}  # of all checkpoints
    version = header.get("event_format")
    if not isinstance(version, int) or isinstance(version, bool):
        raise RunError(f"{path}: a checkpoint of iirsnn, but no event network")
    if version > FORMAT:
        raise RunError(
            f"{path}: expected event format {FORMAT} or older, got {version}; "
            "a newer iirsnn wrote it"
        )
    with _damaged(path):
        if version < 1:
            raise ValueError(f"event_format: expected 1 to {FORMAT}, got {version}")
        return (tensors, header) if version == FORMAT else _graph_of_chain(tensors, header)


def parse(
    tensors: dict[str, Tensor], header: dict[str, Any], path: object
) -> tuple[list[Layer], int, str, None, dict[str, Any]]:
    """What `write` was given, but for the shape of images. Checks no values: the engine does.

    Raises:
        RunError: a header or tensors that are not those of layers.
    """
    with _damaged(path):
        tensors = dict(tensors)
        layers = [_layer(index, entry, tensors) for index, entry in enumerate(header["layers"])]
        if tensors:
            raise ValueError(f"tensors: expected those of the layers, got {min(tensors)} as well")
        return layers, header["timesteps"], header["precision"], None, dict(header["notes"])


@contextmanager
def _damaged(path: object) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read as an event network ({error})") from error


def _layer(index: int, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Layer:
    inputs = []
    for number, each in enumerate(entry["inputs"]):
        given = {**_INPUT, **each}
        given["window"] = _window(given.get("window"))
        inputs.append(Input(weight=tensors.pop(f"{index}.weight.{number}", None), **given))
    size = entry.get("size")
    return Layer(
        entry["kind"],
        entry["name"],
        inputs,
        _window(entry.get("window")),
        None if size is None else (size[0], size[1]),
        **{key: tensors.pop(f"{index}.{key}", None) for key in Layer.TENSORS},
        reset=entry.get("reset", "soft"),
        v_reset=entry.get("v_reset", 0.0),
    )


def _window(numbers: list[int] | None) -> Window | None:
    if numbers is None:
        return None
    return Window(*((numbers[i], numbers[i + 1]) for i in range(0, 10, 2)))


def _graph_of_chain(
    tensors: dict[str, Tensor], header: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Formats 1 and 2: each layer reads the one before it, and perhaps a shortcut."""
    renamed, entries = dict(tensors), []
    for index, old in enumerate(header["layers"]):
        entry = dict(old)
        kind = entry.pop("kind")
        first = {"source": index, "groups": entry.pop("groups")}
        inputs = [first]
        made = {"kind": kind, "name": entry.pop("name"), "inputs": inputs}
        reset = {key: entry.pop(key) for key in ("reset", "v_reset")}
        shortcut, unit = entry.pop("shortcut", None), entry.pop("shortcut_unit", 1.0)
        windows = {key: entry.pop(key, None) for key in ("window", "shortcut_window")}
        if entry:
            raise ValueError(f"layers.{index}: expected no {min(entry)}")
        window, beside = (value and _numbers(value) for value in windows.values())
        if kind in ("conv", "linear", "readout"):
            if window is not None:
                first["window"] = window
            if kind != "readout":
                made |= {"kind": "neurons", **reset}
            if shortcut is not None:
                inputs.append({"source": shortcut + 1, "unit": unit})
                if beside is not None:
                    inputs[1]["window"] = beside
        elif window is not None:
            made["window"] = window
        for old_key, key in (("weight", "weight.0"), ("shortcut_weight", "weight.1")):
            if f"{index}.{old_key}" in renamed:
                renamed[f"{index}.{key}"] = renamed.pop(f"{index}.{old_key}")
        entries.append(made)
    return renamed, {**header, "event_format": FORMAT, "layers": entries}


def _numbers(window: dict[str, list[int]]) -> list[int]:
    keys = ("kernel", "stride", "dilation", "before", "after")
    return [number for key in keys for number in window[key]]
