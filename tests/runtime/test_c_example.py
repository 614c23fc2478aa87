"""The example in C against the library that is installed."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from iirsnn import FusedLIF, runtime
from iirsnn.runtime import library
from tests.event.networks import images, integers
from tests.runtime.test_network import CLASSES, saved

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("cc")


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C compiler (cc)")
    made = tmp_path_factory.mktemp("c") / "classify"
    shared = Path(library.__file__).with_name(library.NAME)
    sources = [ROOT / "csrc/event/example/classify.c", shared]
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    where = [f"-I{ROOT / 'csrc/event'}", f"-Wl,-rpath,{shared.parent}"]
    subprocess.run([COMPILER, *flags, *where, *sources, "-o", made], check=True)
    return made


@pytest.fixture
def digits(tmp_path):
    from torch import nn

    model = integers(
        nn.Conv2d(1, 4, 3, padding=1),
        *(FusedLIF(channels=4), nn.Flatten(), nn.Linear(256, 3)),
        image_shape=(1, 8, 8),
    )
    preparation = {"mean": [0.25], "std": [0.5]}
    saved(tmp_path / "net", model, images(1, 1, 8, 8), class_names=CLASSES, images=preparation)
    return tmp_path / "net"


def run(classify, *arguments):
    return subprocess.run([classify, *arguments], capture_output=True, text=True)


def test_it_prints_the_class_and_the_cost(tmp_path, classify, digits):
    network = runtime.load(digits)
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(256, size=(8, 8, 1), dtype=np.uint8)
        (tmp_path / "x.pgm").write_bytes(b"P5\n# gray\n8 8\n255\n" + pixels.tobytes())
        found = network.classify(pixels)
        spikes = sum(layer.spikes for layer in network.statistics())
        additions = sum(layer.additions for layer in network.statistics())
        done = run(classify, digits, tmp_path / "x.pgm")
        assert done.stdout == (
            f"class {found.index}: {found.name}, {spikes} spikes, {additions} additions\n"
        ), done.stderr


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"P5\n9 8\n255\n" + bytes(72), "pixels: expected 8 x 8 x 1, got 8 x 9 x 1"),
        (b"P6\n8 8\n255\n" + bytes(192), "pixels: expected 8 x 8 x 1, got 8 x 8 x 3"),
        (b"P5\n8 8\n255\n" + bytes(9), "the image is truncated"),
        (b"GIF89a", "expected a binary PGM or PPM image"),
    ],
)
def test_images_that_are_none(tmp_path, classify, digits, image, message):
    (tmp_path / "x.pgm").write_bytes(image)
    done = run(classify, digits, tmp_path / "x.pgm")
    assert (done.returncode, done.stderr) == (1, f"classify: {message}\n")


def test_networks_that_are_none(tmp_path, classify, digits):
    digits.write_bytes(digits.read_bytes()[:-4])
    done = run(classify, digits, tmp_path / "x.pgm")
    assert done.returncode == 1
    assert done.stderr.endswith("its content is not what was written\n")
