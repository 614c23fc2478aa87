"""The cases of gpu_check.py, each run in a process of its own: python gpu_cases.py CASE DEVICE.

Several cases, a list, are run once and not timed: that leaves behind what they compile.

A case prints its rows as one line of JSON, the last of its output. On the device "cpu", at a size
of a few thousand numbers, the cases are rehearsed: what they print there is no result.

Every time of a kernel stands beside that of the same bytes by x.clone() (forward) or
torch.add(x, g) (backward), which no kernel can beat. All that is compared is timed in turns, so
that a clock that changes hits all of it. "cold" empties the caches before each call. What is timed
is the device's work (gpu_device.py); what the host needs is in the cases "call" and in the
networks' times.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_device import Call, Device
from gpu_peers import peers

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: Maps of VGG16 on 32x32 images, [C, H, W], where its neurons are.
MAPS = {
    f"{channels}x{size}x{size}": (channels, size, size)
    for channels, size in ((64, 32), (128, 16), (512, 4), (256, 8), (512, 2))
}
BATCH = 128


@dataclass(frozen=True)
class Case:
    """seconds: after which its process is ended. peers: whether other libraries take part."""

    kind: str
    seconds: int = 60
    what: str = ""
    timesteps: int = 1
    dtype: str = "fp32"
    layout: str = "contiguous"
    channels: bool = False
    map: str = "64x32x32"
    peers: bool = False

    @property
    def of_host(self) -> bool:
        """Whether what is timed is the host too, which has to be left alone then."""
        return self.kind in ("call", "network")

    @property
    def name(self) -> str:
        if self.kind == "test":
            return f"test {self.what}"
        parts = [self.kind, self.what, f"T={self.timesteps}", self.dtype, self.layout]
        if self.kind in ("lif", "bn_lif"):
            parts += ["per channel" if self.channels else "scalar", self.map]
        if self.peers:
            parts.append("peers")
        return " ".join(part for part in parts if part)


def cases() -> list[Case]:
    """What is worth most first: a borrowed device may be gone at any time."""
    tests = ["cuda lif", "triton lif", "cuda batch_norm", "triton batch_norm"]
    last = "channels_last"
    first = [
        Case(kind, timesteps=t, dtype=d, layout=layout)
        for kind in ("lif", "bn_lif")
        for t, d, layout in ((1, "fp32", last), (5, "bf16", last), (5, "fp32", "contiguous"))
    ]
    first += [Case("call", timesteps=t) for t in (1, 5)]
    peers = [replace(case, seconds=120, peers=True) for case in first if case.kind == "lif"]
    networks = [Case("test", 120, "networks")]
    networks += [
        Case("network", 90, what, timesteps, "bf16", last)
        for what in ("vgg16", "vgg16 graph", "vgg16 bits", "resnet18", "resnet18 graph")
        for timesteps in (1, 5)
    ]
    others = [
        Case("network", 90, f"vgg16 {other}", timesteps, "bf16", last)
        for other in ("two modules", "spikingjelly", "snntorch")
        for timesteps in (1, 5)
    ]
    compiled = [
        Case("compiled", 120, what, 1, dtype, layout)
        for what in ("lif", "batch_norm lif")
        for dtype, layout in (("bf16", last), ("fp32", "contiguous"))
    ]
    telling = {("bf16", last, False), ("fp32", "contiguous", True)}
    rest = [
        Case(kind, timesteps=t, dtype=d, layout=layout, channels=channels, map=shape)
        for shape in MAPS
        for kind in ("lif", "bn_lif")
        for t in (1, 5)
        for d in DTYPES
        for layout in ("contiguous", last)
        for channels in (False, True)
    ]
    rest.sort(key=lambda case: (case.dtype, case.layout, case.channels) not in telling)
    ordered = [
        Case("limit"),
        *(Case("test", 120, what) for what in tests),
        *first,
        *networks,
        *peers,
        *others,
        *compiled,
    ]
    ordered += [case for case in rest if case not in first]
    ordered += [Case("test", 240, "everything"), Case("network", 90, "vgg16", 5, "fp32", last)]
    return ordered


# ---- What is timed


def laid(x: Tensor, layout: str) -> Tensor:
    """x [T, B, C, H, W], each image of it in the layout."""
    if layout == "contiguous":
        return x
    return x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2])


def inputs(case: Case, device: Device) -> tuple[Tensor, Tensor]:
    """x and a gradient of its size."""
    batch = BATCH if device.real else 2
    shape = MAPS[case.map] if device.real else (8, 4, 4)
    x = torch.randn(case.timesteps, batch, *shape, device=device.name, dtype=DTYPES[case.dtype])
    x = laid(x.mul_(0.8).add_(0.4), case.layout)
    return x, torch.randn_like(x)


def backends(device: Device) -> dict[str, str]:
    """{backend: why it cannot run, or ""} of the kernels for the device."""
    from iirsnn.ops.backend import why_not

    names = ("cuda", "triton") if device.real else ("cpu",)
    return {name: why_not(name, device.name) or "" for name in names}


def parameter(case: Case, x: Tensor, value: float) -> Tensor:
    size = x.shape[2] if case.channels else 1
    return torch.full((size,), value, device=x.device).requires_grad_()


def lif_contenders(case: Case, x: Tensor, device: Device) -> tuple[dict[str, Any], dict[str, str]]:
    """{name: (f() -> s, its leaves)}, and for each that cannot run the reason."""
    from iirsnn.functional import lif
    from iirsnn.ops import reference

    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    threshold, leak = parameter(case, x, 1.0), parameter(case, x, 0.5)
    leaf = x.detach().requires_grad_()
    for name, reason in backends(device).items():
        if reason:
            missing[name] = reason
            continue
        found[name] = (
            lambda name=name: lif(leaf, threshold, leak, backend=name),
            (leaf, threshold, leak),
        )
        found[f"{name}, fixed"] = (
            lambda name=name: lif(leaf, threshold.detach(), leak.detach(), backend=name),
            (leaf,),
        )
    if not case.peers:
        return found, missing
    reference._check_values = lambda threshold, leak: None  # it waits for the device
    how = ("soft", 0.0, True, "triangle", 0.3, False)

    def eager(x: Tensor, threshold: Tensor, leak: Tensor) -> Tensor:
        return reference.lif_forward(x, threshold, leak, None, *how)[0]

    if device.real:
        config = torch._functorch.config
        compiled = config.patch(donated_buffer=False)(torch.compile(eager, dynamic=False))
        found["torch.compile"] = (lambda: compiled(leaf, threshold, leak), (leaf, threshold, leak))
    made, without = peers(device, "spikingjelly", "snntorch")
    neurons = {label: neuron() for label, neuron in made.items()}
    found |= {label: (lambda f=f: f(leaf), (leaf,)) for label, f in neurons.items()}
    return found, missing | without


def passes(
    case: Case, device: Device, contenders: dict[str, Any], x: Tensor, g: Tensor, elements: Row
) -> list[Row]:
    """Forward and backward of every contender beside the limit for `elements` moved."""
    limits = {"forward": ("clone", x.clone, 2), "backward": ("add", lambda: torch.add(x, g), 3)}
    rows = []
    for what, (limit, limit_call, limit_moves) in limits.items():
        calls: dict[str, Call] = {limit: limit_call}
        failed: dict[str, str] = {}
        for name, (run, leaves) in contenders.items():
            try:
                if what == "forward":
                    calls[name] = torch.no_grad()(run)
                else:
                    s = run()
                    calls[name] = lambda s=s, leaves=leaves: torch.autograd.grad(
                        s, leaves, g, retain_graph=True, allow_unused=True
                    )
                calls[name]()
            except Exception as error:  # another library's: it costs its row alone
                calls.pop(name, None)
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        for cold in (True, False):
            times = device.compare(calls, cold)
            for name, ms in times.items():
                same_bytes = times[limit] * elements[what] / limit_moves
                row = {"what": what, "implementation": name, "ms": ms, "cache": "cold"}
                row |= {"cache": "cold" if cold else "warm", "ratio": ms / same_bytes}
                if name == limit:
                    row["ratio"] = 1.0
                rows.append(row | {"bytes_per_second": _speed(x, limit_moves, ms, name == limit)})
        rows += [{"what": what, "implementation": n, "failed": why} for n, why in failed.items()]
    return rows


def _speed(x: Tensor, moves: int, ms: float, known: bool) -> float | None:
    return moves * x.nbytes / ms * 1e3 if known else None


def run_lif(case: Case, device: Device) -> list[Row]:
    x, g = inputs(case, device)
    contenders, missing = lif_contenders(case, x, device)
    rows = passes(case, device, contenders, x, g, {"forward": 2, "backward": 3})
    return rows + [{"implementation": name, "missing": why} for name, why in missing.items()]


def run_bn_lif(case: Case, device: Device) -> list[Row]:
    """In training: 3 elements forward, 5 backward."""
    from bench_call import TwoModules

    from iirsnn import BatchNormLIF, FusedLIF

    x, g = inputs(case, device)
    channels = x.shape[2]
    contenders: dict[str, Any] = {}
    leaf = x.detach().requires_grad_()
    for name, reason in backends(device).items():
        if reason:
            continue
        options = {"channels": channels} if case.channels else {}
        for label, kind in (("fused", BatchNormLIF), ("two modules", TwoModules)):
            neuron = FusedLIF(1.0, 0.5, backend=name, **options)
            module = kind(nn.BatchNorm2d(channels), neuron).to(device.name)
            run = torch.enable_grad()(lambda module=module: module(leaf))
            contenders[f"{name}, {label}"] = (run, (leaf, *module.parameters()))
    return passes(case, device, contenders, x, g, {"forward": 3, "backward": 5})


def run_compiled(case: Case, device: Device) -> list[Row]:
    """Inside torch.compile: "auto" (plain operators where T = 1) beside the kernels as ops."""
    from bench_call import TwoModules

    from iirsnn import BatchNormLIF, FusedLIF

    torch._functorch.config.donated_buffer = False  # so that backward can be repeated
    x, g = inputs(case, device)
    leaf, channels, normed = x.detach().requires_grad_(), x.shape[2], "batch_norm" in case.what
    contenders: dict[str, Any] = {}

    def add(name: str, module: nn.Module, compiled: bool) -> None:
        module = module.to(device.name)
        call = torch.compile(module, dynamic=False) if compiled else module
        run = torch.enable_grad()(lambda: call(leaf))
        contenders[name] = (run, (leaf, *module.parameters()))

    for name in ("auto", *(name for name, reason in backends(device).items() if not reason)):
        neuron = FusedLIF(1.0, 0.5, backend=name)
        if normed:
            add(f"{name}, compiled", TwoModules(nn.BatchNorm2d(channels), neuron), True)
            add(f"{name}, fused", BatchNormLIF(nn.BatchNorm2d(channels), neuron), False)
        else:
            add(f"{name}, compiled", neuron, True)
            add(name, neuron, False)
    moved = {"forward": 3, "backward": 5} if normed else {"forward": 2, "backward": 3}
    return passes(case, device, contenders, x, g, moved)


def run_call(case: Case, device: Device) -> list[Row]:
    """Forward and backward on 64 numbers: the wall clock of what the host does, in turns."""
    from bench_call import NEURONS, step

    from iirsnn import FusedLIF

    x = torch.randn(case.timesteps, NEURONS, device=device.name).add_(0.5).requires_grad_()
    calls: dict[str, Call] = {"torch.relu": step(torch.relu, x, torch.ones_like(x))}
    for name, reason in backends(device).items():
        if reason:
            continue
        for label, learned in (("learned", True), ("fixed", False)):
            neuron = FusedLIF(1.0, 0.9, backend=name, learn_threshold=learned, learn_leak=learned)
            run = step(neuron.to(device.name), x, torch.ones_like(x))
            calls[f"{name}, {label}"] = run
    made, missing = peers(device, "spikingjelly")
    for name, neuron in made.items():
        calls[name] = step(neuron(), x, torch.ones_like(x))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(device.rounds + 2):  # the first ones warm up
        for name, call in calls.items():
            device.synchronise()
            start = time.perf_counter()
            for _ in range(50):
                call()
            device.synchronise()
            if round_ >= 2:
                times[name].append((time.perf_counter() - start) / 50)
    microseconds = {name: 1e6 * statistics.median(t) for name, t in times.items()}
    relu = microseconds["torch.relu"]
    rows: list[Row] = [
        {"what": "forward and backward", "implementation": name, "us": us, "ratio": us / relu}
        for name, us in microseconds.items()
    ]
    return rows + [{"implementation": name, "missing": why} for name, why in missing.items()]


def run_limit(case: Case, device: Device) -> list[Row]:
    """What copies and additions of many sizes reach."""
    rows = []
    for elements in (2**20, 2**24, 2**27) if device.real else (2**10,):
        x = torch.randn(elements, device=device.name)
        times = device.compare({"clone": x.clone, "add": lambda x=x: torch.add(x, x)})
        for (name, ms), moves in zip(times.items(), (2, 3), strict=True):
            speed = moves * x.nbytes / ms * 1e3
            rows.append({"what": name, "elements": elements, "ms": ms, "bytes_per_second": speed})
    return rows


def run_network(case: Case, device: Device) -> list[Row]:
    """A training step (SGD) and inference: time, memory, launches.

    memory_ms: what the bytes that all of its ops ask for take at the speed of x.clone(). Less than
        that only a cache gives; products may take longer, and how long is not predicted.
    "graph": the step is a CUDA graph. "bits": layers behind neurons keep bits of their input. "two
    modules": torch's BatchNorm and FusedLIF for BatchNormLIF, which other libraries' neurons have
    before them as well.
    """
    from traffic import Traffic

    torch.manual_seed(0)
    images = torch.rand(64 if device.real else 2, 3, 32, 32)
    labels = torch.randint(10, (len(images),), device=device.name)
    implementation, network = _network(case, device, images)
    if isinstance(network, str):
        return [{"implementation": implementation, "missing": network}]
    network = network.to(device.name).train()
    memory = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    network = network.to(memory_format=memory)
    images = images.to(device.name).to(memory_format=memory)
    optimiser = torch.optim.SGD(network.parameters(), 1e-3, foreach=True)

    def loss() -> Tensor:
        enabled = case.dtype == "bf16"
        with torch.autocast(device.name, torch.bfloat16, enabled=enabled):
            scores = network(images)
        return nn.functional.cross_entropy(scores.float(), labels)

    def step() -> None:
        optimiser.zero_grad(set_to_none=False)
        loss().backward()
        optimiser.step()

    @torch.no_grad()
    def infer() -> Tensor:
        return loss()

    copied = torch.empty(2**26 if device.real else 2**10, device=device.name)
    bytes_a_ms = 2 * copied.nbytes / device.compare({"clone": copied.clone})["clone"]

    def row(what: str, call: Call, timed: Call) -> Row:
        with Traffic() as moved:
            call()
        return {
            **{"what": what, "implementation": implementation},
            "ms": device.compare({what: timed}, cold=False, ahead=False)[what],
            "memory_ms": moved.bytes / bytes_a_ms,
            "peak_bytes": device.peak_bytes(timed),
            "launches": device.launches(timed),
        }

    try:
        step()
    except Exception as error:
        if implementation == "iirsnn":
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return [{"implementation": implementation, "failed": why}]
    captured = case.what.endswith("graph") and device.real
    rows = [row("step", step, _captured(step) if captured else step)]
    network.eval()
    return [*rows, row("inference", infer, infer)]


def _network(case: Case, device: Device, images: Tensor) -> tuple[str, nn.Module | str]:
    """Whose it is, and the network, or why there is none."""
    from networks import with_batch_norm_lif, with_neurons

    from iirsnn import convert, use_spike_layers
    from iirsnn.conversion.ann_to_snn import NeuronConfig
    from iirsnn.models.resnet import PLANS, resnet
    from iirsnn.models.vgg import LAYERS, vgg

    model, _, variant = case.what.partition(" ")
    if variant in ("spikingjelly", "snntorch"):
        made, missing = peers(device, variant)
        if not made:
            return variant, missing[variant]
        label, neuron = next(iter(made.items()))
        return label, with_neurons("vgg16", neuron, case.timesteps)
    if model == "vgg16":
        layers = LAYERS["vgg16"] if device.real else (8, "A", 8, "A")
        ann: nn.Module = vgg(layers, 10, images.shape[1:], batch_norm=True)
    else:
        ann = resnet(PLANS["resnet18"], 10, images.shape[1:], batch_norm=True)
    config = NeuronConfig(keep_batch_norm=True)
    network = convert(ann.eval(), images, timesteps=case.timesteps, neuron=config)
    if model == "vgg16" and variant != "two modules":
        network = with_batch_norm_lif(network)
    return "iirsnn", use_spike_layers(network, "dense") if variant == "bits" else network


def _captured(step: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run_test(case: Case, device: Device) -> list[Row]:
    """The tests of tests/gpu, in parts: a kernel that breaks the device costs its part alone."""
    words = [] if case.what == "everything" else ["-k", " and ".join(case.what.split())]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/gpu", *words]
    if not device.real:
        command.append("--collect-only")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line]
    result = lines[-1] if lines else run.stderr[-200:]
    return [{"what": case.what, "passed": run.returncode == 0, "result": result}]


RUN: dict[str, Callable[[Case, Device], list[Row]]] = {
    "limit": run_limit,
    "lif": run_lif,
    "bn_lif": run_bn_lif,
    "compiled": run_compiled,
    "call": run_call,
    "network": run_network,
    "test": run_test,
}


def main() -> None:
    import iirsnn.kernels  # noqa: F401 (all that is slow to import)

    told, name = json.loads(sys.argv[1]), sys.argv[2]
    if isinstance(told, list):
        device = Device(name)
        device.rounds = 1
        for case in told:
            _leave_compiled(Case(**case), device)
        return
    sys.stdin.readline()  # the device belongs to the case before until then
    case, device = Case(**told), Device(name)
    rows = RUN[case.kind](case, device)
    print(json.dumps([{**asdict(case), **row} for row in rows]), flush=True)


def _leave_compiled(case: Case, device: Device) -> None:
    try:
        RUN[case.kind](case, device)
    except Exception as error:  # it fails again, and is told, where it is timed
        print(f"{case.name}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)


if __name__ == "__main__":
    main()
