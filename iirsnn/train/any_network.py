"""Networks of torchvision, of timm, and of the user's own file as the ANN of a run."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import models
from ..errors import RunError, UsageError, one_line
from ..models import ModelConfig

_SOURCES = ("torchvision/NAME", "timm/NAME", "PATH/FILE.py:FUNCTION")


def is_foreign(name: str) -> bool:
    """Whether a model's name is of `_SOURCES`."""
    return "/" in name or ".py:" in name


def build(config: ModelConfig, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """The ANN that a recipe describes, freshly initialised.

    Args:
        config: the `model` section.
        classes: number of classes.
        image_shape: (C, H, W).

    Raises:
        UsageError: an unknown name, settings it has no use for, or a function that gives no network
            of those classes.
    """
    if not is_foreign(config.name):
        if config.small_images:
            raise UsageError(
                f"model.small_images: expected false, since {config.name} is made for its images"
            )
        return models.build(config, classes, image_shape)
    for key in ("layers", "hidden", "pool", "batch_norm"):
        default = getattr(ModelConfig(), key)
        if getattr(config, key) != default:
            raise UsageError(f"model.{key}: expected {default}, since {config.name} has its own")
    function, arguments = _function(config.name, classes, image_shape)
    try:
        network = function(**arguments)
    except Exception as error:  # another's code
        raise UsageError(f"model.name: {config.name}: {one_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"model.name: {config.name}: expected an nn.Module, got {type(network).__name__}"
        )
    if config.small_images:
        _use_small_stem(network, config.name)
    _take_channels(network, config.name, image_shape[0])
    _check(network, config.name, classes, image_shape)
    return network


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a safetensors file, or in a .pt file, of which no code is run.

    Raises:
        RunError: missing, damaged, or no state_dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"ann.weights: {path}: no such file") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise RunError(f"ann.weights: {path}: cannot be read ({one_line(error)})") from error
    except pickle.UnpicklingError as error:
        raise RunError(
            f"ann.weights: {path}: expected a state_dict, got pickled objects; "
            "save model.state_dict()"
        ) from error
    for key in ("state_dict", "model"):  # what training scripts wrap it in
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise RunError(f"ann.weights: {path}: expected a state_dict, got {type(content).__name__}")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _function(
    name: str, classes: int, image_shape: tuple[int, int, int]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to call for a network, and with what."""
    if ".py:" in name:
        file, _, attribute = name.rpartition(":")
        arguments = {"classes": classes, "image_shape": image_shape}
        return _from_file(Path(file), attribute), arguments
    source, _, model = name.partition("/")
    if source == "torchvision":
        import torchvision

        known = torchvision.models.list_models(torchvision.models)
        if model not in known:
            raise UsageError(f"model.name: expected one of torchvision/{', '.join(known)}")
        builder = torchvision.models.get_model_builder(model)
        settings: dict[str, Any] = {"weights": None, "num_classes": classes}
        for extra, value in (("aux_logits", False), ("init_weights", True)):  # of the inceptions
            if model in ("googlenet", "inception_v3"):
                settings[extra] = value
        return builder, settings
    if source == "timm":
        try:
            import timm
        except ImportError as error:
            raise UsageError(
                f"model.name: {name} needs the package timm, which is not installed: "
                "pip install timm"
            ) from error
        if not timm.is_model(model):
            raise UsageError(f"model.name: expected a model of timm, got {name!r}")
        channels = image_shape[0]
        settings = {"pretrained": False, "num_classes": classes, "in_chans": channels}
        return (lambda **how: timm.create_model(model, **how)), settings
    raise UsageError(f"model.name: expected {' or '.join(_SOURCES)}, got {name!r}")


def _from_file(file: Path, attribute: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(f"iirsnn_model_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise UsageError(f"model.name: expected a file of Python, got {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for pickle, and dataclasses inside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # another's code
        raise UsageError(f"model.name: {file}: {one_line(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UsageError(f"model.name: {file} has no function {attribute!r}")
    wanted = ("classes", "image_shape")
    try:
        inspect.signature(function).bind(**dict.fromkeys(wanted))
    except TypeError as error:
        raise UsageError(
            f"model.name: expected {attribute}({', '.join(wanted)}) in {file}, got "
            f"{attribute}{inspect.signature(function)}"
        ) from error
    return function


def _first_convolution(network: nn.Module, name: str) -> tuple[str, nn.Conv2d]:
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            return path, module
    raise UsageError(f"model.name: expected a network with a Conv2d, got {name}")


def _replace(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)


def _use_small_stem(network: nn.Module, name: str) -> None:
    """A stem for small images: a first convolution of 3x3 and stride 1, and no pool right after.

    Raises:
        UsageError: a network whose first convolution has stride 1 already.
    """
    first, old = _first_convolution(network, name)
    if max(old.stride) == 1:
        raise UsageError(
            f"model.small_images: expected a first convolution with a stride, got {old} in {name}"
        )
    new = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None)
    _replace(network, first, new)
    following = iter(list(network.named_modules()))
    for path, _ in following:
        if path == first:
            break
    for path, module in following:
        if isinstance(module, nn.Conv2d):
            return
        if isinstance(module, nn.MaxPool2d):
            _replace(network, path, nn.Identity())
            return


def _take_channels(network: nn.Module, name: str, channels: int) -> None:
    """Exchange the first convolution where it takes other images, as torchvision's take RGB."""
    first, old = _first_convolution(network, name)
    if old.in_channels == channels:
        return
    kernel, stride, padding = old.kernel_size, old.stride, old.padding
    bias = old.bias is not None
    new = nn.Conv2d(channels, old.out_channels, kernel, stride, padding, bias=bias)  # type: ignore[arg-type]
    _replace(network, first, new)


@torch.no_grad()
def _check(network: nn.Module, name: str, classes: int, image_shape: tuple[int, int, int]) -> None:
    training = network.training
    network.eval()
    try:
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        logits = network(torch.zeros(2, *image_shape, device=device))
    except Exception as error:  # another's code
        size = " x ".join(map(str, image_shape))
        raise UsageError(
            f"model.name: {name} does not take images of {size}: {one_line(error)}"
        ) from error
    finally:
        network.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (2, classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(f"model.name: {name}: expected logits [2, {classes}], got {got}")
