"""The runtime on NumPy alone gives what EventNetwork gives, bit for bit, and says what it lacks."""

import gc
import json
import os
import pickle
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from iirsnn import FusedLIF, atomic_files, convert, runtime
from iirsnn.errors import RunError, UsageError
from iirsnn.event import EventNetwork
from iirsnn.models import ModelConfig, build
from iirsnn.runtime.library import library
from tests.event.graphs import Branches
from tests.event.networks import images, integers, levels
from tests.event.test_files import rewrite

CLASSES = ["a", "Gänse", "鶏"]


def vgg(timesteps=1, pool="average"):
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(64, 3, 16, 16, generator=generator)
    config = ModelConfig("vgg", layers=[48, "A", 100, 70, "A", 33], hidden=[90], pool=pool)
    ann = build(config, 10, (3, 16, 16))
    return convert(ann, calibration, 80.0, timesteps=timesteps).eval(), calibration[:20]


def resnet(timesteps=1):
    generator = torch.Generator().manual_seed(0)
    calibration = torch.randn(64, 3, 16, 16, generator=generator)
    ann = build(ModelConfig("resnet20"), 10, (3, 16, 16))
    return convert(ann, calibration, 80.0, timesteps=timesteps).eval(), calibration[:20]


def graph(timesteps=1):
    return integers(Branches()).layers[0].eval(), images(5, 1, 6, 6)


NETWORKS = {
    "chain": vgg,
    "chain, T = 3, max pools": lambda: vgg(3, "max"),
    "residual blocks": resnet,
    "residual blocks, T = 2": lambda: resnet(2),
    "graph": graph,
}


def saved(path, model, x, precision="fp32", **notes):
    timesteps = getattr(model, "timesteps", 1)
    net = EventNetwork.from_model(
        model, timesteps, precision=precision, image_shape=tuple(x.shape[1:])
    )
    net.notes.update(notes)
    net.save(path)
    return net


@pytest.fixture
def digits(tmp_path):
    """A network of three classes on gray images of 8 x 8, in a file."""
    model, x = (
        integers(
            torch.nn.Conv2d(1, 4, 3, padding=1),
            *(FusedLIF(channels=4), torch.nn.Flatten(), torch.nn.Linear(256, 3)),
            image_shape=(1, 8, 8),
        ),
        images(4, 1, 8, 8),
    )
    path = tmp_path / "net.iirsnn"
    preparation = {"mean": [0.25], "std": [0.5], "fit": "whole"}
    saved(path, model, x, class_names=CLASSES, images=preparation)
    return path


@pytest.mark.parametrize("threads", [2.5, "2", None, True, -1])
def test_threads_that_are_no_count(digits, threads):
    expected = f"threads: expected an integer of at least 0, got {threads!r}"
    with pytest.raises(UsageError, match=re.escape(expected)):
        runtime.load(digits, threads=threads)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_bits_as_event_network(tmp_path, name, precision):
    model, x = NETWORKS[name]()
    net = saved(tmp_path / "net", model, x, precision)
    network = runtime.load(tmp_path / "net", threads=2)
    assert np.array_equal(network(x.numpy()), net(x).numpy())
    for ours, theirs in zip(network.statistics(), net.statistics(), strict=True):
        for key in ("name", "spikes", "neurons", "additions", "multiplications", "weight_bytes"):
            assert getattr(ours, key) == getattr(theirs, key), (ours.name, key)
    assert (network.timesteps, network.image_shape) == (net.timesteps, net.image_shape)
    assert network.class_names is None


RUN = """
import sys
import numpy as np
import iirsnn.runtime
network = iirsnn.runtime.load(sys.argv[1])
np.save(sys.argv[3], network(np.load(sys.argv[2])))
roots = {name.split(".")[0] for name in sys.modules}
assert not roots & {"torch", "safetensors", "PIL", "torchvision"}, roots
"""


def in_a_process(network, x, **environment):
    """Its logits, by a process of its own that loads neither torch nor Pillow."""
    here = network.parent
    np.save(here / "x.npy", x.numpy())
    arguments = [sys.executable, "-c", RUN, network, here / "x.npy", here / "logits.npy"]
    subprocess.run(arguments, env=os.environ | environment, check=True)
    return np.load(here / "logits.npy")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_instruction_set_gives_the_same_bits_without_torch(tmp_path, precision):
    model, x = vgg()
    net = saved(tmp_path / "net", model, x, precision)
    for level in levels():
        found = in_a_process(tmp_path / "net", x, IIRSNN_CPU_CAPABILITY=level)
        assert np.array_equal(found, net(x).numpy()), level


def test_a_capability_that_is_not_there(tmp_path, digits):
    arguments = [sys.executable, "-c", RUN, digits, "", ""]
    environment = os.environ | {"IIRSNN_CPU_CAPABILITY": "mmx"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "iirsnn.errors.UsageError: IIRSNN_CPU_CAPABILITY: expected portable"
    )


# ---- Images ----


def test_an_array_and_a_file_are_classified_alike(tmp_path, digits):
    network = runtime.load(digits)
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 1), dtype=np.uint8)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "x.png")
    found, read = network.classify(pixels), network.classify(tmp_path / "x.png")
    assert np.array_equal(found.logits, read.logits)
    assert (found.name, found.probability) == (read.name, read.probability)
    assert found.name == CLASSES[found.index]
    assert found.index == found.logits.argmax()
    softmax = torch.from_numpy(found.logits).softmax(0)
    assert found.probability == pytest.approx(float(softmax[found.index]))


def test_prepare_is_what_training_saw(digits):
    network = runtime.load(digits)
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    read = network._preparation.normalised(pixels.transpose(2, 0, 1))
    assert np.array_equal(network.prepare(pixels), read)


def test_larger_files_are_fitted(tmp_path, digits):
    Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "x.jpg")
    assert runtime.load(digits).classify(tmp_path / "x.jpg").name in CLASSES


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({}, "expected a file that says how its images are normalised"),
        ({"class_names": ["a"]}, "class_names: expected one an output"),
        ({"class_names": "abc"}, "expected a list, got a string"),
        ({"images": {"mean": [0], "std": [0]}}, "std: expected numbers > 0"),
        ({"images": {"mean": [0, 0], "std": [1]}}, "mean: expected one number a channel"),
        ({"images": {"mean": ["a"], "std": [1]}}, "expected a number, got a string"),
    ],
)
def test_notes_that_do_not_say_how(tmp_path, notes, message):
    model, x = integers(torch.nn.Flatten(), torch.nn.Linear(4, 3)), images(1, 1, 2, 2)
    model = integers(
        torch.nn.Flatten(),
        torch.nn.Linear(4, 4),
        FusedLIF(channels=4),
        torch.nn.Linear(4, 3),
        image_shape=(1, 2, 2),
    )
    saved(tmp_path / "net", model, x, **notes)
    with pytest.raises((UsageError, RunError), match=message):
        runtime.load(tmp_path / "net").classify(np.zeros((2, 2, 1), np.uint8))


# ---- What is refused ----


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((1, 1, 8, 9), np.float32), r"expected \[B, 1, 8, 8\], got \[1, 1, 8, 9\]"),
        (np.zeros((1, 8, 8), np.float32), r"expected floating \[B, C, H, W\], got float32"),
        (np.zeros((1, 1, 8, 8), np.int64), "got int64"),
        (np.full((1, 1, 8, 8), np.nan), "expected finite values"),
    ],
)
def test_bad_images(digits, bad, message):
    with pytest.raises(UsageError, match=message):
        runtime.load(digits)(bad)


def test_bad_pixels(digits):
    network = runtime.load(digits)
    with pytest.raises(UsageError, match="expected 8 x 8 x 1, got 8 x 9 x 1"):
        network.classify(np.zeros((8, 9, 1), np.uint8))
    with pytest.raises(UsageError, match=r"expected uint8 \[H, W, C\], got float64"):
        network.classify(np.zeros((8, 8, 1)))


def test_any_layout_and_no_images(digits):
    network = runtime.load(digits)
    x = images(4, 1, 8, 8).numpy()
    expected = network(x)
    assert np.array_equal(network(x.astype(np.float64)), expected)
    assert np.array_equal(network(np.asfortranarray(x)), expected)
    assert network(x[:0]).shape == (0, 3)


def test_statistics_before_a_call(digits):
    with pytest.raises(RunError, match="expected a call of the network by this thread first"):
        runtime.load(digits).statistics()


def test_it_cannot_be_pickled(digits):
    with pytest.raises(TypeError, match="load its file in each process"):
        pickle.dumps(runtime.load(digits))


FILES = {
    "missing": (lambda p: p.unlink(), "no such file"),
    "empty": (lambda p: p.write_bytes(b""), "expected a file that is not empty"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-9]), "its content is not what"),
    "foreign": (lambda p: p.write_bytes(b"PK\x03\x04" * 20), "expected a checksum, got none"),
    "a digit": (lambda p: rewrite(p, lambda h: h.update(timesteps=2), False), "not what was"),
    "newer": (lambda p: rewrite(p, lambda h: h.update(event_format=99)), "a newer iirsnn"),
    "older": (lambda p: rewrite(p, lambda h: h.update(event_format=2)), "saves it anew"),
    "a checkpoint": (lambda p: rewrite(p, lambda h: h.pop("event_format")), "no event network"),
    "no shape": (lambda p: rewrite(p, lambda h: h.update(image_shape=None)), "was not known when"),
    "no layers": (lambda p: rewrite(p, lambda h: h.update(layers=[])), "expected 1 to 65536"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_none(digits, case):
    damage, message = FILES[case]
    damage(digits)
    with pytest.raises(RunError, match=message):
        runtime.load(digits)


NUMBERS = (0, 1, -1, 2, 3, 7, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 62, -(1 << 40), 0.5, "a", None)


def mutated(value, draw):
    """The JSON value with one of its parts changed."""
    if isinstance(value, dict) and value:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value:
        at = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value[:at] + value[at + 1 :]
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice(NUMBERS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["chain, T = 3, max pools", "graph"])
def test_both_readers_take_the_same_files(tmp_path, name, seed):
    """Headers with a right checksum that say anything: the same logits, or neither reads them."""
    model, x = NETWORKS[name]()
    path = tmp_path / "net"
    saved(path, model, x)
    content, draw, read = path.read_bytes(), random.Random(seed), 0
    for _ in range(60):
        path.write_bytes(content)
        rewrite(path, lambda h: h.update(mutated({**h, "notes": {}}, draw)))
        try:
            expected = EventNetwork.load(path)
        except RunError:
            with pytest.raises(RunError):
                runtime.load(path)
            continue
        if expected.image_shape is None:  # EventNetwork learns it from the first images
            continue
        network = runtime.load(path)
        read += 1
        if network.image_shape == tuple(x.shape[1:]):
            assert np.array_equal(network(x.numpy()), expected(x).numpy())
    assert read, "the case says nothing"


# ---- Threads and processes ----


def test_threads_share_a_network(tmp_path):
    model, x = vgg()
    net = saved(tmp_path / "net", model, x)
    network, expected = runtime.load(tmp_path / "net", threads=2), net(x).numpy()

    def call(size):
        found = network(x[:size].numpy())
        return found, sum(layer.spikes for layer in network.statistics())

    with ThreadPoolExecutor(4) as pool:
        sizes = [1, 20, 3, 7] * 10
        for size, (found, spikes) in zip(sizes, pool.map(call, sizes), strict=True):
            assert np.array_equal(found, expected[:size])
            net(x[:size])
            assert spikes == sum(layer.spikes for layer in net.statistics())


def test_a_fork_goes_on(tmp_path):
    model, x = vgg()
    saved(tmp_path / "net", model, x)
    network = runtime.load(tmp_path / "net", threads=2)
    expected = network(x.numpy())
    child = os.fork()
    if child == 0:  # no return to pytest
        os._exit(0 if np.array_equal(network(x.numpy()), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_network_may_go_while_its_statistics_stay(digits):
    network = runtime.load(digits)
    network(images(4, 1, 8, 8).numpy())
    call = network._last.call
    network._last.call = None
    del network
    gc.collect()
    assert call.layers()[0]["kind"] == "neurons"
    assert set(np.unique(call.spikes(0))) == {0, 1}


def test_unloading_while_it_runs(tmp_path):
    """A thread that calls a network keeps it."""
    model, x = vgg()
    expected = saved(tmp_path / "net", model, x)(x).numpy()
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(runtime.load(tmp_path / "net"), x.numpy()) for _ in range(8)]
        gc.collect()
        assert all(np.array_equal(call.result(), expected) for call in calls)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self")
def test_loading_takes_little_more_than_the_weights(tmp_path):
    """24 MB of them: neither a layer nor the file is in memory beside its copy."""
    model = integers(
        *(torch.nn.Flatten(), torch.nn.Linear(768, 2048), FusedLIF(channels=2048)),
        *(torch.nn.Linear(2048, 2048), FusedLIF(channels=2048), torch.nn.Linear(2048, 10)),
        image_shape=(3, 16, 16),
    )
    saved(tmp_path / "net", model, images(1, 3, 16, 16))
    code = (
        "import sys, iirsnn.runtime\n"
        "from iirsnn.runtime.library import library\n"
        "def kilobytes(name):\n"
        "    rows = (line.split() for line in open('/proc/self/status'))\n"
        "    return next(int(row[1]) for row in rows if row[0] == name + ':')\n"
        "library()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak starts here
        "before = kilobytes('VmRSS')\n"
        "network = iirsnn.runtime.load(sys.argv[1])\n"
        "print(1024 * (kilobytes('VmHWM') - before), network.weight_bytes)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "net"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    assert weights > 20e6
    assert peak < weights + 10e6  # pages of the library and of the file, some of them of 2 MB


def test_no_memory_is_an_error(tmp_path, digits):
    """Of an image larger than memory: refused before anything is written."""
    code = (
        "import resource, sys, numpy, iirsnn.runtime\n"
        "network = iirsnn.runtime.load(sys.argv[1], threads=1)\n"
        "x = numpy.zeros((100_000, 1, 8, 8), numpy.float32)\n"
        "now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (now + (8 << 20), now + (8 << 20)))\n"
        "try:\n    network(x)\nexcept MemoryError:\n    print('caught')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, digits], capture_output=True, text=True)
    assert done.stdout == "caught\n", done.stderr


def test_versions_are_one():
    import importlib.metadata

    assert library().iirsnn_version().decode() == importlib.metadata.version("iirsnn")


def test_what_is_written_is_read_by_both(tmp_path):
    """Bytes of a file in memory are a network too."""
    model, x = vgg()
    net = saved(tmp_path / "net", model, x)
    content = (tmp_path / "net").read_bytes()
    assert content == atomic_files.sealed(content)
    assert np.array_equal(runtime.Network(content)(x.numpy()), net(x).numpy())
    assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_a_tensor_of_more_bytes_than_its_shape_is_refused(tmp_path):
    model, x = vgg()
    saved(tmp_path / "net", model, x)
    content = (tmp_path / "net").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    last = max((entry for entry in header.values() if "dtype" in entry), key=_end)
    last["data_offsets"][1] += 4
    text = json.dumps(header, separators=(",", ":")).encode()
    longer = len(text).to_bytes(8, "little") + text + content[8 + size :] + bytes(4)
    with pytest.raises(RunError, match=r"expected \d+ bytes, got \d+"):
        runtime.Network(atomic_files.sealed(longer))


def _end(entry):
    return entry["data_offsets"][1]
