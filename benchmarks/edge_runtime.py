"""A deployed network on a small machine: bytes, the time to the first answer, time per image.

    python benchmarks/edge_runtime.py [--run RUN] [--json FILE]

Without a run the network has the shape of the Fashion-MNIST recipe's, random weights, and layers
that spike at 15 %: its bytes are those of a trained one, its times are near them. Every process is
started anew, with one thread; times per image are taken in turns in one process, every call with
images that none has seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from event_contenders import onnx_file, onnx_runtime, trained

from iirsnn import Network, convert, runtime
from iirsnn.event import EventNetwork
from iirsnn.measure.provenance import commit
from iirsnn.models import ModelConfig, build
from iirsnn.runtime import library

ROOT = Path(__file__).resolve().parent.parent
IMAGE, DENSITY = (1, 28, 28), 0.15
LAYERS = [32, "A", 64, 64, "A", 128, 128, "A"]  # recipes/fashion-mnist.yaml

#: Programs up to their first answer, behind BEGIN. `sys.argv`: the network, and an image as .npy.
FIRST = {
    "runtime": """
import iirsnn.runtime
image = numpy.load(sys.argv[2])
network = iirsnn.runtime.load(sys.argv[1], threads=1)
network(image)
""",
    "EventNetwork": """
import torch
from iirsnn.event import EventNetwork
torch.set_num_threads(1)
network = EventNetwork.load(sys.argv[1])
network(torch.from_numpy(numpy.load(sys.argv[2])))
""",
    "ONNX Runtime": """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
network = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
network.run(None, {"images": numpy.load(sys.argv[2])})
""",
    "Python and NumPy alone": """
numpy.load(sys.argv[2])
""",
}
BEGIN = """
import sys, time
import numpy
begun = time.monotonic()
"""
#: Their end: the time, on the clock that this process reads too; the peak of their memory; and the
#: seconds since Python and NumPy were there.
TELL = """
answered = time.monotonic()
rows = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(answered, 1024 * int(rows["VmHWM"].split()[0]), answered - begun)
"""
#: Bytes that a network takes of its process: by loading; at the most meanwhile, with what is mapped
#: of its file and of the library; and by a first call.
MEMORY = """
import sys
import numpy, iirsnn.runtime
from iirsnn.runtime.library import library

def resident(name):
    rows = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return 1024 * int(rows[name].split()[0])

library()
image = numpy.load(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before, all_before = resident("RssAnon"), resident("VmRSS")
network = iirsnn.runtime.load(sys.argv[1], threads=1)
loaded, most = resident("RssAnon"), resident("VmHWM")
network(image)
print(loaded - before, most - all_before, resident("RssAnon") - loaded)
"""
#: A process without Python's memory to start a program from: prints the program's own peak.
STARTER = r"""
#include <stdio.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
int main(int count, char** arguments) {
  if (count < 2) return 2;
  const pid_t child = fork();
  if (child == 0) execv(arguments[1], arguments + 1);
  struct rusage usage;
  struct timespec now;
  int status;
  if (wait4(child, &status, 0, &usage) < 0 || status != 0) return 1;
  clock_gettime(CLOCK_MONOTONIC, &now);
  printf("%.6f %ld\n", now.tv_sec + 1e-9 * now.tv_nsec, 1024 * usage.ru_maxrss);
  return 0;
}
"""


def networks(run: Path | None) -> tuple[str, Network, Network, Callable[[], torch.Tensor]]:
    """What they are, the dense network, the spiking one, and what draws an image."""
    if run is not None:
        ann, snn, draw = trained(run, 1)
        return f"{run.name}, T = 1", ann, snn, lambda: draw(1)
    torch.manual_seed(0)
    config = ModelConfig("vgg", layers=LAYERS, hidden=[256], batch_norm=False)
    ann = build(config, 10, IMAGE).eval()
    images = torch.randn(64, *IMAGE)
    snn = convert(ann, images, 100 * (1 - DENSITY), timesteps=1).eval()
    name = f"the Fashion-MNIST recipe's shape, random weights, {DENSITY:.0%} spikes, T = 1"
    return name, ann, snn, lambda: torch.randn(1, *IMAGE)


def first_answer(command: list[Any], rounds: int) -> dict[str, float]:
    """Milliseconds from the start of a process to its answer, median and least; its peak bytes.

    behind_numpy_ms: those since Python and NumPy were there, median, of a program in Python.
    """
    taken, peaks, own = [], [], []
    for _ in range(rounds):
        start = time.monotonic()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        answered, peak, *since = done.stdout.splitlines()[-1].split()
        taken.append(1e3 * (float(answered) - start))
        peaks.append(int(peak))
        own += [1e3 * float(seconds) for seconds in since]
    return {
        **({"behind_numpy_ms": statistics.median(own)} if own else {}),
        "first_answer_ms": statistics.median(taken),
        "least_ms": min(taken),
        "peak_bytes": statistics.median(peaks),
    }


def memory(network: Path, image: Path) -> dict[str, int]:
    command = [sys.executable, "-c", MEMORY, network, image]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("load_bytes", "load_peak_bytes", "first_call_bytes")
    return dict(zip(names, map(int, said.split()), strict=True))


def c_example(folder: Path, shape: tuple[int, ...]) -> list[Any]:
    """What runs the example in C, compiled against the installed library; then NET IMAGE."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc)")
    shared = library._file()
    flags = ["-O2", f"-I{ROOT / 'csrc/event'}", f"-Wl,-rpath,{shared.parent}"]
    example, starter = folder / "classify", folder / "starter"
    sources = [ROOT / "csrc/event/example/classify.c", shared]
    subprocess.run([compiler, *flags, *sources, "-o", example], check=True)
    starter.with_suffix(".c").write_text(STARTER)
    subprocess.run([compiler, "-O2", starter.with_suffix(".c"), "-o", starter], check=True)
    channels, height, width = shape
    pixels = np.random.default_rng(0).integers(256, size=(height, width, channels), dtype=np.uint8)
    header = f"P{5 if channels == 1 else 6}\n{width} {height}\n255\n".encode()
    (folder / "image.pnm").write_bytes(header + pixels.tobytes())
    return [starter, example]


def in_turns(
    calls: dict[str, Callable[[torch.Tensor], object]],
    draw: Callable[[], torch.Tensor],
    rounds: int,
) -> dict[str, dict[str, float]]:
    """Milliseconds an image. The first of three calls is not counted: it has cold caches."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        images = [draw() for _ in range(3)]
        for name, call in calls.items():
            for index, image in enumerate(images):
                start = time.perf_counter()
                call(image)
                if index:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(taken), "least_ms": min(taken)}
        for name, taken in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="a trained run instead of random weights")
    parser.add_argument("--rounds", type=int, default=300, help="of time per image")
    parser.add_argument("--starts", type=int, default=10, help="of each process")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    what, ann, snn, draw = networks(options.run)
    results: dict[str, Any] = {**record.machine(), "commit": commit(), "network": what}
    results |= {"files": {}, "processes": {}, "per_image": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calls: dict[str, Callable[[torch.Tensor], object]] = {}
        np.save(folder / "x.npy", draw().numpy())
        shape = tuple(draw().shape[1:])
        for precision in ("fp32", "bf16", "int8"):
            net = EventNetwork.from_model(snn, 1, precision=precision)
            net.notes["images"] = {"mean": [0.5] * shape[0], "std": [0.5] * shape[0]}
            file = folder / precision
            net.save(file)
            loaded = runtime.load(file, threads=1)
            loaded(np.load(folder / "x.npy"))
            results["files"][precision] = {
                "file_bytes": file.stat().st_size,
                "weight_bytes": loaded.weight_bytes,
                "call_bytes": loaded.call_bytes(),
                **memory(file, folder / "x.npy"),
            }
            calls[f"runtime {precision}"] = lambda x, n=loaded: n(x.numpy())
            calls[f"EventNetwork {precision}"] = net
        files = {"Python and NumPy alone": folder / "fp32", "runtime": folder / "fp32"}
        files |= {"runtime, int8": folder / "int8", "EventNetwork": folder / "fp32"}
        try:
            files["ONNX Runtime"] = onnx_file(ann, folder / "ann.onnx")
            calls["ONNX Runtime fp32"] = onnx_runtime(files["ONNX Runtime"], 1)
            results["files"]["ONNX"] = {"file_bytes": files["ONNX Runtime"].stat().st_size}
        except ImportError as error:
            files.pop("ONNX Runtime", None)
            print(f"ONNX Runtime takes no part: {error}")
        for name, file in files.items():
            code = BEGIN + FIRST[name.partition(",")[0]] + TELL
            command = [sys.executable, "-c", code, file, folder / "x.npy"]
            results["processes"][name] = first_answer(command, options.starts)
        for precision in ("fp32", "int8"):
            command = [*c_example(folder, shape), folder / precision, folder / "image.pnm"]
            results["processes"][f"example in C, {precision}"] = first_answer(
                command, options.starts
            )
        results["per_image"] = in_turns(calls, draw, options.rounds)
    show(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def show(results: dict[str, Any]) -> None:
    print(f"{results['network']}; {record.origin(results)}, commit {results['commit']}")
    for name, row in results["files"].items():
        parts = ", ".join(f"{key.replace('_', ' ')} {size:,}" for key, size in row.items())
        print(f"  {name:<26} {parts}")
    for name, row in results["processes"].items():
        own = f", {row['behind_numpy_ms']:.1f} behind NumPy" if "behind_numpy_ms" in row else ""
        print(
            f"  {name:<26} first answer {row['first_answer_ms']:8.1f} ms "
            f"(least {row['least_ms']:.1f}{own}), peak {row['peak_bytes'] / 1e6:.1f} MB"
        )
    for name, row in results["per_image"].items():
        print(f"  {name:<26} {row['median_ms']:.3f} ms an image (least {row['least_ms']:.3f})")


if __name__ == "__main__":
    main()
