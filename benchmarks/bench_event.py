"""EventNetwork against the dense ReLU network of the same topology, and against the same SNN.

    python benchmarks/bench_event.py --help          the whole comparison: a table, and JSON
    pytest benchmarks/bench_event.py --benchmark-only    a short one

Every call gets new images. All contenders take turns, so that a busy moment of the machine hits
each of them; medians. ONNX Runtime, OpenVINO and SpikingJelly take part where they are installed
(pip install onnx onnxruntime openvino spikingjelly); who is missing is printed.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from iirsnn import FusedLIF, Network, Readout, SharedDropout, convert
from iirsnn.conversion import fold_batch_norm
from iirsnn.event import EventNetwork
from iirsnn.measure.provenance import commit, machine
from iirsnn.models import ModelConfig, build
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder

Contender = Callable[[Tensor], object]
Draw = Callable[[int], Tensor]  # batch -> images [batch, C, H, W], new ones in every call
IMAGE = (3, 32, 32)
DENSE_FP32 = ("torch eager", "torch.compile", "ONNX Runtime", "OpenVINO")


# ---- The networks ----


def at_density(name: str, density: float, pool: str) -> tuple[Network, Network]:
    """A ReLU network and an SNN at T = 1 each of whose layers spikes at `density`, random weights.

    Thresholds are the percentile of each layer's current that lets this fraction through.
    """
    generator = torch.Generator().manual_seed(0)
    ann = build(ModelConfig(name, pool=pool, batch_norm=False), 10, IMAGE).eval()
    images = torch.randn(32, *IMAGE, generator=generator)
    return ann, convert(ann, images, 100 * (1 - density), timesteps=1).eval()


def noise(batch: int) -> Tensor:
    return torch.randn(batch, *IMAGE)


def trained(run: Path, stage: int) -> tuple[Network, Network, Draw]:
    """The ReLU network and the SNN of a run, and what draws random test images."""
    folder = RunFolder.read(run)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    ann = pipeline.trained("ann").eval()
    fold_batch_norm(ann)
    test = pipeline.splits.test

    def draw(batch: int) -> Tensor:
        chosen = torch.randint(len(test), (batch,)).tolist()
        return torch.stack([image for image, _ in test.__getitems__(chosen)])

    return ann, pipeline.trained(f"T{stage}").eval(), draw


# ---- The contenders ----


def torch_eager(ann: Network) -> Contender:
    model = copy.deepcopy(ann).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(x: Tensor) -> object:
        return model(x.contiguous(memory_format=torch.channels_last))

    return run


def torch_compile(ann: Network) -> Contender:
    from torch._inductor import config

    dense = copy.deepcopy(ann).to(memory_format=torch.channels_last)
    model = torch.compile(dense, dynamic=False)

    @torch.no_grad()
    def run(x: Tensor) -> object:
        with config.patch(freezing=True):
            return model(x.contiguous(memory_format=torch.channels_last))

    return run


def snn_in_torch(snn: Network) -> Contender:
    @torch.no_grad()
    def run(x: Tensor) -> object:
        return snn(x)

    return run


def spikingjelly(snn: Network) -> Contender:
    """The same network from SpikingJelly's multi-step layers."""
    neuron = importlib.import_module("spikingjelly.activation_based.neuron")
    functional = importlib.import_module("spikingjelly.activation_based.functional")
    layer = importlib.import_module("spikingjelly.activation_based.layer")
    modules: list[nn.Module] = []
    for module in snn.layers:
        if isinstance(module, FusedLIF):
            modules.append(neuron.IFNode(module.threshold.item(), v_reset=None, step_mode="m"))
        elif not isinstance(module, SharedDropout):
            modules.append(layer.SeqToANNContainer(copy.deepcopy(module)))
    last = nn.Linear(snn.layers[-1].in_features, snn.layers[-1].out_features)
    last.load_state_dict(snn.layers[-1].state_dict())
    modules[-1] = layer.SeqToANNContainer(last)
    model = nn.Sequential(*modules).eval()

    @torch.no_grad()
    def run(x: Tensor) -> object:
        functional.reset_net(model)
        return model(x.expand(snn.timesteps, *x.shape)).sum(0)

    return run


def onnx_file(ann: Network, path: Path) -> Path:
    """The ReLU network as an ONNX file with a free batch size."""
    onnx = importlib.import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, weights, value = [], [], "images"

    def node(kind: str, inputs: list[str], **attributes) -> None:
        nonlocal value
        output = f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, [value, *inputs], [output], **attributes))
        value = output

    def parameters(module: nn.Module) -> list[str]:
        names = []
        for key, tensor in module.named_parameters():
            names.append(f"p{len(weights)}.{key}")
            weights.append(numpy_helper.from_array(tensor.detach().contiguous().numpy(), names[-1]))
        return names

    for module in ann.layers:
        if isinstance(module, nn.Conv2d):
            pads = [*module.padding, *module.padding]
            node("Conv", parameters(module), pads=pads, strides=list(module.stride))
        elif isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
            kind = "AveragePool" if isinstance(module, nn.AvgPool2d) else "MaxPool"
            size = [module.kernel_size] * 2
            node(kind, [], kernel_shape=size, strides=size)
        elif isinstance(module, (nn.Linear, Readout)):
            node("Gemm", parameters(module), transB=1)
        elif isinstance(module, (nn.ReLU, nn.Flatten)):
            node("Relu" if isinstance(module, nn.ReLU) else "Flatten", [])
        else:
            assert isinstance(module, SharedDropout), module
    shape = ["batch", *(ann.image_shape or ())]
    graph = helper.make_graph(
        nodes,
        "ann",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, ["batch", None])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def quantised_file(source: Path, target: Path, images: np.ndarray) -> Path:
    """The same in int8: static, per channel, calibrated on the images."""
    quantization = importlib.import_module("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(np.array_split(images, 4))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        activation_type=quantization.QuantType.QUInt8,
    )
    return target


def onnx_runtime(file: Path, threads: int) -> Contender:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})


def openvino(file: Path, threads: int, precision: str, batch: int) -> Contender:
    core = importlib.import_module("openvino").Core()
    model = core.read_model(file)
    model.reshape([batch, *model.input().partial_shape.get_min_shape()[1:]])
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", {**settings, "PERFORMANCE_HINT": "LATENCY"})
    return lambda x: compiled(x.numpy())


def contenders(
    ann: Network, snn: Network, batch: int, threads: int, folder: Path, only: str
) -> tuple[dict[str, Contender], dict[str, EventNetwork], dict[str, str]]:
    """All that can run, the event networks among them by precision, and why others cannot."""
    ann_file, int8_file = folder / "ann.onnx", folder / "int8.onnx"
    shape = tuple(ann.image_shape or ())

    def files() -> None:
        if not ann_file.exists():
            onnx_file(ann, ann_file)
        if not int8_file.exists():
            images = torch.randn(32, *shape, generator=torch.Generator().manual_seed(1))
            quantised_file(ann_file, int8_file, images.numpy())

    nets = {
        precision: EventNetwork.from_model(snn, snn.timesteps, precision=precision)
        for precision in ("fp32", "bf16", "int8")
    }
    makers: dict[str, Callable[[], Contender]] = {
        **{f"events {key}": (lambda net=net: net) for key, net in nets.items()},
        "torch eager": lambda: torch_eager(ann),
        "torch.compile": lambda: torch_compile(ann),
        "ONNX Runtime": lambda: (files(), onnx_runtime(ann_file, threads))[1],
        "ONNX Runtime int8": lambda: (files(), onnx_runtime(int8_file, threads))[1],
        "OpenVINO": lambda: (files(), openvino(ann_file, threads, "f32", batch))[1],
        "OpenVINO bf16": lambda: (files(), openvino(ann_file, threads, "bf16", batch))[1],
        "OpenVINO int8": lambda: (files(), openvino(int8_file, threads, "f32", batch))[1],
        "SNN in torch": lambda: snn_in_torch(snn),
        "SpikingJelly": lambda: spikingjelly(snn),
    }
    made, missing = {}, {}
    for name, maker in makers.items():
        words = only.split(",")  # a whole name stands for itself alone
        if only and name not in words and not any(w in name for w in words if w not in makers):
            continue
        try:
            made[name] = maker()
            made[name](torch.randn(batch, *shape))
        except ImportError as error:
            missing[name] = str(error)
    return made, nets, missing


# ---- The measurement ----


def measure(
    functions: dict[str, Contender],
    nets: dict[str, EventNetwork],
    batch: int,
    draw: Draw,
    rounds: int,
    calls: int = 1,
) -> dict[str, dict]:
    """Milliseconds of each, median and least, over new images in turns; fp32 events by layer.

    Of several calls a turn the first is not counted: its weights have to come back into the cache
    that the others' took, as they would not where one network runs alone.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    layers: list[list[dict]] = []
    for _ in range(rounds):
        turn = [draw(batch) for _ in range(calls)]
        for name, function in functions.items():
            for call, images in enumerate(turn):
                start = time.perf_counter()
                result = function(images)
                if call or calls == 1:
                    times[name].append(1e3 * (time.perf_counter() - start))
                del result
        if "events fp32" in functions:
            layers.append([asdict(layer) for layer in nets["fp32"].statistics()])
    found: dict[str, dict] = {
        name: {"median_ms": statistics.median(taken), "least_ms": min(taken)}
        for name, taken in times.items()
    }
    if layers:
        rows = []
        for each in zip(*layers, strict=True):
            row = dict(each[-1], kind=nets["fp32"].layers[len(rows)].kind)
            row["milliseconds"] = statistics.median(layer["milliseconds"] for layer in each)
            row["additions"] = statistics.mean(layer["additions"] for layer in each)
            rows.append(row)
        found["events fp32"]["layers"] = rows
        found["events fp32"]["density"] = nets["fp32"].density()
    return found


def clock_ghz() -> float:
    """The clock that the processor really runs at: additions that wait for each other, one a cycle.

    Not what the system states, which may be far below it; NaN without a C compiler.
    """
    code = """
    #include <stdio.h>
    #include <time.h>
    static double now(void) {
      struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + 1e-9 * t.tv_nsec;
    }
    int main(void) {
      double best = 1e9;
      for (int turn = 0; turn < 5; ++turn) {
        unsigned long x = 1, i; double start = now();
        for (i = 0; i < 10000000; ++i)
          __asm__ volatile("add $1, %0; add $1, %0; add $1, %0; add $1, %0" : "+r"(x));
        if (now() - start < best) best = now() - start;
      }
      printf("%f", 4e7 / best / 1e9);
    }"""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "clock.c", Path(folder) / "clock"
        source.write_text(code)
        try:
            subprocess.run(["cc", "-O1", "-o", program, source], check=True, capture_output=True)
            return float(subprocess.run([program], check=True, capture_output=True).stdout)
        except (OSError, subprocess.CalledProcessError):
            return float("nan")


def show(found: dict[str, dict], title: str, ghz: float) -> None:
    print(f"\n{title}")
    ours = found.get("events fp32", {}).get("median_ms")
    for name, taken in found.items():
        ratio = f"{taken['median_ms'] / ours:6.2f} x events fp32" if ours else ""
        print(
            f"  {name:<18} {taken['median_ms']:9.3f} ms (least {taken['least_ms']:9.3f})  {ratio}"
        )
    if "layers" in found.get("events fp32", {}):
        rows = [row for row in found["events fp32"]["layers"] if row["kind"] == "conv"]
        least = sum(row["additions"] for row in rows) / 16 / ghz / 1e6
        taken = sum(row["milliseconds"] for row in rows if row["additions"])
        if least:
            print(
                f"  convolutions: {taken:.3f} ms, {taken / least:.2f} x one 512-bit addition a "
                f"cycle at {ghz:.2f} GHz"
            )


def crossing(points: list[tuple[float, float]]) -> str:
    """Where times faster than dense, over density, falls below 1."""
    points = sorted(points)
    for (d0, r0), (d1, r1) in pairwise(points):
        if r0 >= 1 > r1:
            return f"dense wins above a density of {d0 + (r0 - 1) / (r0 - r1) * (d1 - d0):.2f}"
    last, ratio = points[-1]
    return f"{ratio:.1f} times faster than dense at the highest density measured, {last:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vgg16", help="of random weights, on 32 x 32 images")
    parser.add_argument("--pool", default="average", choices=("average", "max"))
    parser.add_argument("--densities", type=float, nargs="*", default=[5, 10, 15, 20, 30])
    parser.add_argument("--run", type=Path, help="a trained run instead: its own spike rates")
    parser.add_argument("--stage", type=int, default=1, help="T of the run's stage")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=3, help="a turn; the first is not counted")
    parser.add_argument("--ghz", type=float, default=clock_ghz(), help="of the processor")
    parser.add_argument(
        "--only", default="", help="names to run, or words of them, separated by commas"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    results: dict = {
        "machine": machine(),
        "commit": commit(),
        "torch": torch.__version__,
        "ghz": options.ghz,
        "calls": options.calls,
        "cases": [],
    }
    cases = [None] if options.run else [percent / 100 for percent in options.densities]
    wins: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for density in cases:
        if options.run:
            ann, snn, draw = trained(options.run, options.stage)
        else:
            ann, snn = at_density(options.model, density, options.pool)
            draw = noise
        with tempfile.TemporaryDirectory() as folder:
            for threads in dict.fromkeys(options.threads):
                torch.set_num_threads(threads)
                for batch in options.batches:
                    made, nets, missing = contenders(
                        ann, snn, batch, threads, Path(folder), options.only
                    )
                    found = measure(made, nets, batch, draw, options.rounds, options.calls)
                    what = f"{options.run} T = {options.stage}"
                    if density is not None:
                        what = f"{options.model}, {options.pool} pool, density {density:.0%}"
                    show(found, f"{what}, batch {batch}, {threads} threads", options.ghz)
                    dense = [found[n]["median_ms"] for n in DENSE_FP32 if n in found]
                    if dense and "events fp32" in found and density is not None:
                        ratio = min(dense) / found["events fp32"]["median_ms"]
                        wins.setdefault((batch, threads), []).append((density, ratio))
                    for name, why in missing.items():
                        print(f"  {name:<18} not measured: {why}")
                    results["cases"].append(
                        {"network": what, "density": density, "batch": batch, "threads": threads,
                         "results": found}
                    )  # fmt: skip
    for (batch, threads), points in wins.items():
        if len(points) > 1:
            print(f"\nbatch {batch}, {threads} threads, fp32: {crossing(points)}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")


@pytest.mark.parametrize("batch", [1, 16])
def test_vgg16(benchmark, batch):
    """VGG16, T = 1, 15 % of the neurons spike; the ratio is to torch's ReLU network."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ann, snn = at_density("vgg16", 0.15, "average")
        net = EventNetwork.from_model(snn)
        benchmark.pedantic(net, setup=lambda: ((noise(batch),), {}), rounds=20)
        found = measure({"events": net, "torch eager": torch_eager(ann)}, {}, batch, noise, 7)
        ratio = found["torch eager"]["median_ms"] / found["events"]["median_ms"]
        benchmark.extra_info["times faster than torch eager"] = round(ratio, 2)
        print(f"\ntimes faster than torch eager: {ratio:.2f} {found}")
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
