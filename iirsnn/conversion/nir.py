"""NIR, the Neuromorphic Intermediate Representation: networks from and for other libraries.

NIR's neurons are differential equations; libraries step them in two ways, and a NIR graph does not
say which. `decay="euler"` (snnTorch): leak = 1 - dt / tau, gain = r dt / tau. `"exponential"`
(sinabs, with dt = 1): leak = exp(-dt / tau), gain = r (1 - leak). Nor does it say how a neuron is
reset: snnTorch's default is `reset="soft_delayed"`. Needs the package nir.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from ..errors import check_choice, check_timesteps
from ..models.graph import Affine, GraphNetwork
from ..nn import FusedLIF
from .plain_graph import GraphBuilder, Step, as_graph, steps

DECAYS = ("euler", "exponential")
RESETS = ("soft", "soft_delayed", "hard")

#: NIR has no more than these.
_KNOWN = (
    "Conv1d, Conv2d, Linear, AvgPool2d, AdaptiveAvgPool2d, Flatten, add, and neurons of soft reset"
)


def to_nir(snn: nn.Module, image_shape: tuple[int, ...] | None = None, *, dt: float = 1e-4) -> Any:
    """A network as a nir.NIRGraph: leak 1 as IF, 0 < leak < 1 as LIF (Euler), 0 as Threshold.

    Args:
        snn: a Network or GraphNetwork; BatchNorm is folded in.
        image_shape: [C, H, W] of an image; None for the network's.
        dt: seconds of a timestep, the unit of tau.

    Raises:
        TypeError: another module.
        ValueError: a node or neuron that NIR lacks, by its name.
    """
    import nir

    network = as_graph(snn)
    shape = image_shape or network.image_shape
    nodes: dict[str, Any] = {"input": nir.Input(input_type=_shape(shape or ()))}
    edges: list[tuple[str, str]] = []
    sources: dict[str, list[str]] = {"images": ["input"]}
    last = None
    for last in steps(network, image_shape):
        into = [source for name in last.inputs for source in sources[name]]
        if len(set(into)) < len(into):
            raise _lacks(last, "a value added to itself")
        if last.kind == "add":
            sources[last.name] = into
            continue
        name = last.name.replace(".", "_")
        nodes[name] = _node(last, dt)
        edges += [(source, name) for source in into]
        sources[last.name] = [name]
    assert last is not None
    nodes["output"] = nir.Output(output_type=_shape(last.shape))
    edges += [(source, "output") for source in sources[last.name]]
    return nir.NIRGraph(nodes, edges)


def from_nir(
    graph: Any,
    timesteps: int = 1,
    *,
    dt: float = 1e-4,
    decay: str = "euler",
    reset: str = "soft",
) -> GraphNetwork:
    """A nir.NIRGraph as a network: what an image is to it, NIR's input is at every timestep.

    Edges that meet are added. A neuron's gain, where it is not 1, divides its threshold: the same
    spikes. Thresholds and leaks that differ inside a channel are refused. Logits are the mean over
    time of NIR's output; a Network, whose logits are the sum, comes back with 1/T of them.

    Args:
        graph: without cycles, of one input and one output.
        timesteps: T of the network.
        dt: seconds of a timestep, the unit of tau.
        decay: euler or exponential, see the module.
        reset: of every neuron with a leak: soft, soft_delayed, or hard (to 0).

    Raises:
        TypeError: another graph.
        ValueError: T < 1; a node that no layer of ours equals, by its name; a cycle; an unknown
            decay or reset.
    """
    import nir

    if not isinstance(graph, nir.NIRGraph):
        kind = type(graph).__name__
        raise TypeError(f"graph: expected a nir.NIRGraph, as nir.read gives, got {kind}")
    check_timesteps(timesteps)
    check_choice("decay", decay, DECAYS)
    check_choice("reset", reset, RESETS)
    into: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        into[target].append(source)
    builder = GraphBuilder()
    known: dict[str, fx.Node] = {}
    shape: tuple[int, ...] | None = None
    last = None
    for name in _ordered(into):
        node = graph.nodes[name]
        if isinstance(node, nir.Input):
            known[name] = builder.images
            given = node.input_type["input"]
            shape = None if given is None else tuple(int(n) for n in given)
            continue
        if not into[name]:
            raise ValueError(f"{name} ({type(node).__name__}): expected an input, got none")
        x = known[into[name][0]]
        for other in into[name][1:]:
            x = builder.add(x, known[other])
        if isinstance(node, nir.Output):
            last = x
            continue
        known[name] = builder.call(_module(name, node, dt, decay, reset), x, name.replace(".", "_"))
    if last is None:
        raise ValueError("graph: expected an Output, got none")
    return builder.network(last, timesteps, shape)


# ---- To NIR ----


def _lacks(step: Step, what: str) -> ValueError:
    return ValueError(f"{step.name}: NIR has {_KNOWN}; got {what}")


def _node(step: Step, dt: float) -> Any:
    import nir

    module: Any = step.module
    kind = type(module).__name__ if module is not None else step.kind
    if isinstance(module, FusedLIF):
        return _neuron(step, module, dt)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode == "zeros":
        return _convolution(step, module)
    if isinstance(module, Affine) and len(step.shape) == 3:
        channels = len(module.weight)
        conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        conv.weight = nn.Parameter(module.weight.detach().view(-1, 1, 1, 1))
        conv.bias = module.bias
        return _convolution(step, conv)
    if isinstance(module, Affine) and len(step.shape) == 1:
        return _affine(torch.diag(module.weight), module.bias)
    if isinstance(module, nn.Linear):
        return _affine(module.weight, module.bias)
    if isinstance(module, nn.Flatten) and module.start_dim == 1:
        end = module.end_dim if module.end_dim < 0 else module.end_dim - 1
        return nir.Flatten(_shape(step.input_shape, "input"), start_dim=0, end_dim=end)
    if isinstance(module, nn.AvgPool2d):
        padded = any(_pair(module.padding)) and not module.count_include_pad
        if not padded and not module.ceil_mode and module.divisor_override is None:
            sizes = (module.kernel_size, module.stride, module.padding)
            return nir.AvgPool2d(*(np.array(_pair(size)) for size in sizes))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        given, wanted = step.input_shape[-2:], step.shape[-2:]
        if not any(g % w for g, w in zip(given, wanted, strict=True)):
            kernel = np.array([g // w for g, w in zip(given, wanted, strict=True)])
            return nir.AvgPool2d(kernel, kernel, np.array([0, 0]))
    raise _lacks(step, kind)


def _neuron(step: Step, neuron: FusedLIF, dt: float) -> Any:
    import nir

    shape = step.shape
    threshold = _over(neuron.threshold, shape)
    leak = _over(neuron.leak, shape)
    ones = np.ones(shape, np.float32)
    if not leak.any():
        return nir.Threshold(threshold)
    if neuron.reset != "soft":
        raise _lacks(step, f"reset={neuron.reset}")
    if (leak == 1).all():
        return nir.IF(r=ones, v_threshold=threshold)
    if not ((leak > 0) & (leak < 1)).all():
        raise _lacks(step, f"leak from {leak.min():g} to {leak.max():g}, expected one in [0, 1]")
    tau = (dt / (1 - leak.astype(np.float64))).astype(np.float32)
    return nir.LIF(tau=tau, r=tau / np.float32(dt), v_leak=0 * ones, v_threshold=threshold)


def _convolution(step: Step, conv: Any) -> Any:
    import nir

    shape = step.input_shape[1:]
    bias = np.zeros(len(conv.weight), np.float32) if conv.bias is None else _array(conv.bias)
    weight = _array(_without_groups(conv.weight, conv.groups))
    options = (conv.stride, conv.padding, conv.dilation, 1, bias)
    if isinstance(conv, nn.Conv1d):
        one = [o[0] if isinstance(o, tuple) else o for o in options[:3]]
        return nir.Conv1d(shape[0], weight, *one, *options[3:])
    return nir.Conv2d(tuple(shape), weight, *options)


def _without_groups(weight: Tensor, groups: int) -> Tensor:
    """Weights that are 0 between groups: nir takes the channels of one group for the input's."""
    outputs, channels, *kernel = weight.shape
    dense = weight.new_zeros(outputs, groups, channels, *kernel)
    parts = zip(dense.chunk(groups), weight.detach().chunk(groups), strict=True)
    for group, (part, own) in enumerate(parts):
        part[:, group] = own
    return dense.flatten(1, 2)


def _affine(weight: Tensor, bias: Tensor | None) -> Any:
    import nir

    if bias is None:
        return nir.Linear(_array(weight))
    return nir.Affine(_array(weight), _array(bias))


def _over(parameter: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A value for each neuron of the layer [C, ...]."""
    by_channel = _array(parameter).reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(by_channel, shape).copy()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy().copy()


def _shape(shape: tuple[int, ...], key: str | None = None) -> Any:
    array = np.array(shape)
    return array if key is None else {key: array}


def _pair(value: Any) -> tuple[int, int]:
    pair = np.broadcast_to(np.asarray(value), 2)
    return int(pair[0]), int(pair[1])


# ---- From NIR ----


def _ordered(into: dict[str, list[str]]) -> list[str]:
    """Nodes so that each comes after those that lead into it.

    Raises:
        ValueError: a cycle.
    """
    ordered: dict[str, None] = {}
    while len(ordered) < len(into):
        left = {name: before for name, before in into.items() if name not in ordered}
        ready = [name for name, before in left.items() if ordered.keys() >= {*before}]
        if not ready:
            raise ValueError(f"graph: expected no cycle, got one through {', '.join(left)}")
        ordered |= dict.fromkeys(ready)
    return list(ordered)


def _module(name: str, node: Any, dt: float, decay: str, reset: str) -> nn.Module:
    import nir

    if isinstance(node, (nir.IF, nir.LIF, nir.Threshold)):
        return _fused(name, node, dt, decay, reset)
    if isinstance(node, (nir.Linear, nir.Affine)):
        bias = getattr(node, "bias", None)
        linear = nn.Linear(node.weight.shape[1], node.weight.shape[0], bias is not None)
        return _filled(linear, node.weight, bias)
    if isinstance(node, (nir.Conv1d, nir.Conv2d)):
        kind: Any = nn.Conv2d if isinstance(node, nir.Conv2d) else nn.Conv1d
        channels = node.weight.shape[1] * node.groups
        sizes = [_plain(o) for o in (node.stride, node.padding, node.dilation)]
        conv = kind(channels, node.weight.shape[0], node.weight.shape[2:], *sizes, node.groups)
        return _filled(conv, node.weight, node.bias)
    if isinstance(node, nir.AvgPool2d):
        sizes = [_pair(o) for o in (node.kernel_size, node.stride, node.padding)]
        return nn.AvgPool2d(sizes[0], sizes[1], sizes[2])
    if isinstance(node, nir.SumPool2d):
        kernel = _pair(node.kernel_size)
        return nn.AvgPool2d(kernel, _pair(node.stride), _pair(node.padding), divisor_override=1)
    if isinstance(node, nir.Flatten):
        start, end = (d + 1 if d >= 0 else d for d in (node.start_dim, node.end_dim))
        return nn.Flatten(start, end)
    if isinstance(node, nir.Scale):
        return Affine(torch.from_numpy(_by_channel(name, "scale", node.scale)))
    kind = type(node).__name__
    raise ValueError(f"{name}: expected a node that a layer of ours equals, got {kind}")


def _fused(name: str, node: Any, dt: float, decay: str, reset: str) -> FusedLIF:
    import nir

    if isinstance(node, nir.Threshold):
        threshold, leak, gain = _numpy(node.threshold), np.zeros(1), np.ones(1)
    elif isinstance(node, nir.IF):
        threshold, leak, gain = _numpy(node.v_threshold), np.ones(1), _numpy(node.r)
    else:
        if np.any(_numpy(node.v_leak)):
            raise ValueError(f"{name} (LIF): expected v_leak = 0")
        tau, threshold = _numpy(node.tau).astype(np.float64), _numpy(node.v_threshold)
        leak = 1 - dt / tau if decay == "euler" else np.exp(-dt / tau)
        gain = _numpy(node.r) * (1 - leak)
        gain = np.where(np.abs(gain - 1) < 2.0**-22, 1, gain)  # what rounding made of r and tau
    if np.any(_numpy(getattr(node, "v_reset", 0))):
        raise ValueError(f"{name}: expected v_reset = 0")
    if not (gain > 0).all() or not (threshold > 0).all():
        raise ValueError(f"{name}: expected a threshold and a gain > 0")
    leak, threshold = (
        _by_channel(name, what, np.float32(value))
        for what, value in (("leak", leak), ("threshold", threshold / gain))
    )
    channels = max(len(leak), len(threshold))
    lif = FusedLIF(channels=channels if channels > 1 else None, reset=reset)
    with torch.no_grad():
        lif.leak.copy_(torch.from_numpy(leak))
        lif.threshold.copy_(torch.from_numpy(threshold))
    return lif


def _by_channel(name: str, what: str, value: Any) -> np.ndarray:
    """float32 [1] or [C] of a value for each neuron [C, ...]."""
    array = _numpy(value).astype(np.float32)
    flat = array.reshape(array.shape[0], -1) if array.ndim else array.reshape(1, 1)
    if not (flat == flat[:, :1]).all():
        raise ValueError(f"{name}: expected one {what} a channel, got {array.shape} of them")
    values = flat[:, 0]
    return values[:1].copy() if (values == values[0]).all() else values.copy()


def _numpy(value: Any) -> np.ndarray:
    """An array, of whatever a library put into the graph."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _filled(layer: Any, weight: Any, bias: Any) -> nn.Module:
    layer.weight = nn.Parameter(torch.from_numpy(_numpy(weight).astype(np.float32)))
    if bias is not None:
        layer.bias = nn.Parameter(torch.from_numpy(_numpy(bias).astype(np.float32)))
    return layer


def _plain(option: Any) -> Any:
    if isinstance(option, (str, int)):
        return option
    return tuple(int(each) for each in np.atleast_1d(option))
