"""A file read and run on other processors: the same bits on ARM, a refusal where none can be."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from iirsnn import runtime
from tests.event.networks import levels
from tests.native.toolchain import ARM, HOST, kernels
from tests.runtime.test_network import CLASSES, NETWORKS, saved

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{CSRC / 'event'}"]


def program(toolchain, compiler, source, folder):
    """A C program linked with the engine, its objects and all, by a toolchain."""
    toolchain.require()
    c = folder / f"{source.stem}.o"
    subprocess.run([compiler, *FLAGS, "-c", source, "-o", c], check=True)
    objects = kernels(toolchain, engine=True).values()
    linked = folder / source.stem
    subprocess.run([toolchain.compiler, c, *objects, *toolchain.link, "-o", linked], check=True)
    return linked


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    return program(HOST, shutil.which("cc") or "cc", HERE / "network.c", folder)


def bits(toolchain, program, net, x, out, **environment):
    """What the program writes for images."""
    (net.parent / "x").write_bytes(x.numpy().tobytes())
    command = [*([toolchain.runner] if toolchain.runner else []), program]
    arguments = [net, net.parent / "x", str(len(x)), out]
    subprocess.run([*command, *arguments], check=True, env=environment or None)
    return out.read_bytes()


def runtimes(net, x):
    """The same of the library that is installed."""
    network = runtime.load(net, threads=1)
    parts = [network(x.numpy()).tobytes()]
    for index, layer in enumerate(network.statistics()):
        counted = [layer.spikes, layer.additions, layer.multiplications]
        parts.append(np.array(counted, np.int64).tobytes())
        if layer.neurons:
            spikes = network._last.call.spikes(index)
            padding = [(0, 0)] * 4 + [(0, -spikes.shape[-1] % 64)]
            parts.append(np.packbits(np.pad(spikes, padding), -1, "little").tobytes())
    return b"".join(parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_by_c_alone(tmp_path, host, name, precision):
    model, x = NETWORKS[name]()
    saved(tmp_path / "net", model, x, precision)
    expected = runtimes(tmp_path / "net", x)
    for level in levels():
        found = bits(HOST, host, tmp_path / "net", x, tmp_path / "out", IIRSNN_CPU_CAPABILITY=level)
        assert found == expected, level


@pytest.mark.slow  # compiles the engine for another processor
def test_on_arm(tmp_path):
    """The reader, the interface and the loops, by qemu; and the example, which prints the class."""
    compiler = ARM.compiler.replace("g++", "gcc")
    arm = program(ARM, compiler, HERE / "network.c", tmp_path)
    for name in NETWORKS:
        model, x = NETWORKS[name]()
        x = x[:3]
        for precision in ("fp32", "bf16", "int8"):
            saved(tmp_path / "net", model, x, precision)
            found = bits(ARM, arm, tmp_path / "net", x, tmp_path / "out")
            assert found == runtimes(tmp_path / "net", x), (name, precision)

    model, x = NETWORKS["chain"]()
    preparation = {"mean": [0.5] * 3, "std": [0.25] * 3}
    names = [*CLASSES, *map(str, range(7))]
    saved(tmp_path / "net", model, x, "int8", class_names=names, images=preparation)
    pixels = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.ppm")
    classify = program(ARM, compiler, CSRC / "event" / "example" / "classify.c", tmp_path)
    command = [ARM.runner, classify, tmp_path / "net", tmp_path / "x.ppm"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = runtime.load(tmp_path / "net").classify(pixels)
    assert said.startswith(f"class {found.index}: {found.name}, ")

    (tmp_path / "net").write_bytes((tmp_path / "net").read_bytes()[:-4])
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("its content is not what was written\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-m32"], "expected a 64-bit processor"),
        (["-U__SIZEOF_POINTER__", "-D__SIZEOF_POINTER__=4"], "expected a 64-bit processor"),
        (
            ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"],
            "expected a little-endian processor",
        ),
    ],
)
def test_processors_that_are_refused(tmp_path, flags, message):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler (apt-get install g++)")
    (tmp_path / "engine.cpp").write_text('#include "event/shape.h"\n')
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", tmp_path / "engine.cpp"]
    assert subprocess.run(command).returncode == 0
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr
