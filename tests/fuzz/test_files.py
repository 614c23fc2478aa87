"""Files that something has changed: each loads as what was written, or raises the one clear error.

Engine files, checkpoints and run recipes have a checksum or a schema, so that a change shows. An
image may be another image after it, of the right shape and finite.
"""

from __future__ import annotations

import io
import math
import signal
import warnings
from functools import cache

import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from iirsnn import FusedLIF, Network, Readout, atomic_files
from iirsnn.errors import IirsnnError
from iirsnn.event import EventNetwork
from tests.fuzz.settings import fuzzed

recipe = pytest.importorskip("iirsnn.train.recipe", reason="recipes need iirsnn[train]")

IMAGE = (1, 6, 6)
HANGS = 60  # seconds after which a reader of a few kB counts as hanging


@pytest.fixture(autouse=True)
def watchdog():
    """A reader that hangs ends as an error: `reads` winds it up for each case."""

    def stop(number, frame):
        raise AssertionError(f"a file was still being read after {HANGS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def reads(read, *arguments):
    """What was read; None after the one clear error, one of ours."""
    signal.alarm(HANGS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what it then refuses
            return read(*arguments)
    except IirsnnError:
        return None
    finally:
        signal.alarm(0)


@st.composite
def mutations(draw):
    """How bytes change: a list of (kind, where, what), `where` a fraction of the length."""
    kinds = st.sampled_from(("flip", "set", "digit", "insert", "delete", "cut", "repeat"))
    change = st.tuples(kinds, st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8))
    return draw(st.lists(change, min_size=1, max_size=3))


def mutated(content: bytes, changes, text: int) -> bytes:
    """content changed; the first `text` bytes, where its header is, are half of the aims."""
    changed = bytearray(content)
    for kind, where, what in changes:
        reach = text if what[0] % 2 else len(changed)
        at = min(int(where * reach), max(len(changed) - 1, 0))
        if not changed:
            changed += what
        elif kind == "flip":
            changed[at] ^= 1 << what[0] % 8
        elif kind == "set":
            changed[at : at + len(what)] = what
        elif kind == "digit":  # the next digit becomes another one
            digits = [
                i for i in range(at, min(at + 400, len(changed))) if chr(changed[i]).isdigit()
            ]
            if digits:
                changed[digits[0]] = ord("0") + what[0] % 10
        elif kind == "insert":
            changed[at:at] = what
        elif kind == "delete":
            del changed[at : at + len(what)]
        elif kind == "cut":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + 64 * len(what)]
    return bytes(changed)


@cache
def network(precision: str) -> EventNetwork:
    """A small engine of every kind of layer that a file holds."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(1, 5, 3, padding=1), FusedLIF(channels=5), nn.AvgPool2d(2)),
        *(nn.Conv2d(5, 6, 3, padding=1, groups=1), FusedLIF(reset="hard", v_reset=0.25)),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, 7), FusedLIF(), Readout(7, 3)),
    ]
    model = Network(layers, IMAGE).eval()
    model.timesteps = 2
    net = EventNetwork.from_model(model, 2, precision=precision)
    net.notes["images"] = {"mean": [0.5], "std": [0.25]}
    return net


@cache
def engine_file(precision: str) -> bytes:
    tensors, header = network(precision)._contents()
    return atomic_files.to_bytes(tensors, header)


@fuzzed(few=80, share=0.06)
@given(st.sampled_from(("fp32", "bf16", "int8")), mutations())
def test_engine_files(tmp_path_factory, precision, changes):
    content = engine_file(precision)
    path = tmp_path_factory.getbasetemp() / "changed.iirsnn"
    path.write_bytes(mutated(content, changes, 8 + int.from_bytes(content[:8], "little")))
    found = reads(EventNetwork.load, path)
    assert found is None or found == network(precision)


@cache
def checkpoint() -> tuple[bytes, dict, dict]:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(3, 4, generator=rng),
        "step": torch.tensor(7),
        "empty": torch.zeros(0),
        "half": torch.randn(5, generator=rng).bfloat16(),
    }
    header = {"stage": "T2", "epoch": 3, "step": 1200, "history": [0.5, 0.25]}
    return atomic_files.to_bytes(tensors, header), tensors, header


@fuzzed(few=80, share=0.03)
@given(mutations())
def test_checkpoints(tmp_path_factory, changes):
    content, tensors, header = checkpoint()
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    path.write_bytes(mutated(content, changes, 8 + int.from_bytes(content[:8], "little")))
    found = reads(atomic_files.load, path)
    if found is not None:
        assert found[0].keys() == tensors.keys()
        assert all(torch.equal(found[0][name], tensors[name]) for name in tensors)
        assert {key: found[1].get(key) for key in header} == header


KEYS = sorted(recipe.flatten(recipe.Recipe()))
ODD = (None, True, -1, 0, 1, 2**63, 2**80, 0.5, -0.5, 1e308, math.inf, math.nan, "", "x", "${seed}")
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.sampled_from(ODD), max_size=3),
    st.dictionaries(st.sampled_from(("T1", "name", "x")), st.sampled_from(ODD), max_size=2),
)


@fuzzed(few=25, share=0.03)
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3))
def test_recipes_of_odd_values(settings):
    """Either a recipe, which is what its own YAML reads as, or one line."""
    tree: dict = {}
    for key, value in settings:
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                return
        inner[name] = value
    found = reads(lambda: recipe.parse(yaml.safe_dump(tree), source="fuzzed"))
    if found is not None:
        again = recipe.parse(recipe.dump(found), source="dumped")
        assert repr(again) == repr(found)


@cache
def recipe_text() -> bytes:
    return recipe.read("recipe", "fashion-mnist-plus").encode()


@fuzzed(few=15, share=0.01)
@given(mutations())
def test_recipes_of_changed_text(changes):
    text = mutated(recipe_text(), changes, 400).decode("utf-8", errors="replace")
    reads(lambda: recipe.parse(text, source="changed"))


@cache
def image_file(kind: str, mode: str) -> bytes:
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 6), generator=rng, dtype=torch.uint8).numpy()
    written = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(written, kind)
    return written.getvalue()


KINDS = [(k, m) for k in ("PNG", "BMP", "GIF", "TIFF", "PPM") for m in ("L", "RGB")]
KINDS += [("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")]


@fuzzed(few=60, share=0.02)
@given(st.sampled_from(KINDS), mutations())
@example(("PNG", "L"), [])
def test_images(tmp_path_factory, kind, changes):
    from iirsnn.train.deployment import read_image

    path = tmp_path_factory.getbasetemp() / f"changed.{kind[0].lower()}"
    path.write_bytes(mutated(image_file(*kind), changes, 60))

    found = reads(read_image, path, network("fp32"))
    assert changes or found is not None
    if found is not None:
        assert found.shape == (1, *IMAGE)
        assert bool(found.isfinite().all())
