"""Engine files: what they keep, what older ones say, and what is refused."""

import copy
import json
import random
import struct
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch

from iirsnn import atomic_files
from iirsnn.errors import RunError, UsageError
from iirsnn.event.file_format import FORMAT
from iirsnn.event.network import EventNetwork
from tests.event.graphs import Branches
from tests.event.networks import images, integers

OLD = Path(__file__).parent / "files"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_file_gives_the_same_network(small, tmp_path, precision):
    network, x = small
    net = EventNetwork.from_model(network, 2, precision=precision)
    net.notes |= {"classes": ["a", "b", "c"], "sizes": (1, 2), 3: 0.1}
    net.save(tmp_path / "net.iirsnn")
    read = EventNetwork.load(tmp_path / "net.iirsnn")
    assert torch.equal(read(x), net(x))
    assert read.notes == {"classes": ["a", "b", "c"], "sizes": [1, 2], "3": 0.1}
    assert (read.timesteps, read.precision, read.image_shape) == (2, precision, (1, 6, 6))
    assert read.layers == net.layers


def test_int8_files_are_small(small, tmp_path):
    network, _ = small
    sizes = {}
    for precision in ("fp32", "bf16", "int8"):
        path = tmp_path / precision
        EventNetwork.from_model(network, 2, precision=precision).save(path)
        sizes[precision] = path.stat().st_size
    assert sizes["int8"] < sizes["bf16"] < sizes["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("version", [2, 3])
def test_files_of_earlier_versions(tmp_path, version, precision):
    """2: written by the version before graphs; with what it gave for these images."""
    net = EventNetwork.load(OLD / f"format{version}-{precision}.iirsnn")
    known = json.loads((OLD / f"format{version}-{precision}.json").read_text())
    assert net(torch.tensor(known["images"])).tolist() == known["logits"]
    assert [int(spikes.sum()) for spikes in net.spikes()] == known["spikes"]
    assert net.notes == {"classes": ["a", "b", "c"]}
    net.save(tmp_path / "new.iirsnn")
    assert EventNetwork.load(tmp_path / "new.iirsnn") == net


# ---- Damage ----


def rewrite(path, change, sealed=True):
    """Change the JSON header that iirsnn keeps in a safetensors file, and the checksum with it."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["iirsnn"])
    change(ours)
    header["__metadata__"]["iirsnn"] = json.dumps(ours)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    path.write_bytes(atomic_files.sealed(content) if sealed else content)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "not a file": (lambda p: p.unlink(), "no such file"),
    "newer": (lambda p: rewrite(p, lambda h: h.update(event_format=FORMAT + 1)), "newer iirsnn"),
    "no network": (lambda p: rewrite(p, lambda h: h.pop("event_format")), "no event network"),
    "a digit": (lambda p: rewrite(p, lambda h: h.update(timesteps=1), False), "not what was"),
    "a note": (lambda p: rewrite(p, lambda h: h["notes"].update(a=1), False), "not what was"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(small, tmp_path, case):
    path = tmp_path / "net.iirsnn"
    EventNetwork.from_model(small[0], 2).save(path)
    damage, message = DAMAGE[case]
    damage(path)
    with pytest.raises(RunError, match=message):
        EventNetwork.load(path)


def branches():
    network = integers(Branches()).layers[0].eval()
    return network, images(2, 1, 6, 6)


def contents(net):
    """Copies of tensors and header, to be changed."""
    return copy.deepcopy(net._contents())


def saved(path, tensors, header):
    atomic_files.save(path, tensors, header)
    return path


def entry(index, **values):
    return lambda tensors, header: header["layers"][index].update(values)


def given(index, number, **values):
    return lambda tensors, header: header["layers"][index]["inputs"][number].update(values)


def of_header(**values):
    return lambda tensors, header: header.update(values)


def tensor(name, change):
    def apply(tensors, header):
        tensors[name] = change(tensors[name])

    return apply


def window(*numbers):
    return [*numbers, *([1, 1] * 5)[len(numbers) : 6], *[0] * 4][:10]


NAN, HUGE = float("nan"), 1 << 31
WRONG = {
    "version": (of_header(event_format=-1), "event_format: expected 1 to 3, got -1"),
    "version 0": (of_header(event_format=0), "event_format: expected 1 to 3, got 0"),
    "timesteps": (of_header(timesteps=0), "timesteps: expected an integer from 1"),
    "timesteps of many": (of_header(timesteps=HUGE), "timesteps: expected an integer from 1"),
    "timesteps true": (of_header(timesteps=True), "timesteps: expected an integer"),
    "precision": (of_header(precision="fp8"), "precision: expected one of fp32, bf16, int8"),
    "image": (of_header(image_shape=[1, 6]), "image_shape: expected 3 integers"),
    "image of nothing": (of_header(image_shape=[1, 0, 6]), "image_shape: expected an integer"),
    "image too large": (of_header(image_shape=[1, HUGE - 1, HUGE - 1]), "fewer than 2.31 values"),
    "image too small": (of_header(image_shape=[1, 1, 1]), "a kernel that fits the padded input"),
    "another image": (of_header(image_shape=[1, 8, 8]), "expected 160 input features, got 90"),
    "notes": (of_header(notes=[]), "notes: expected an object, got a list"),
    "no layers": (of_header(layers=[]), "layers: expected 1 to 65536, got 0"),
    "layers": (of_header(layers={}), "layers: expected a list"),
    "more": (of_header(colour="red"), "header: expected no colour"),
    "less": (lambda t, h: h.pop("notes"), "header: expected a notes"),
    "colour": (entry(0, colour="red"), "layers.0: expected no colour"),
    "kind": (entry(1, kind="nonsense"), "layers.1.kind: expected one of neurons"),
    "other kind": (entry(1, kind="currents"), "layers.1: expected no threshold of a currents"),
    "kind of pool": (entry(3, kind="adaptive_pool"), "layers.3: expected no window"),
    "early end": (entry(0, kind="readout"), "expected a readout or an output as the last layer"),
    "name": (entry(0, name=7), "layers.0.name: expected a str"),
    "reset": (entry(0, reset="never"), "layers.0.reset: expected one of soft"),
    "v_reset": (entry(0, v_reset=1e39), "layers.0.v_reset: expected a finite number"),
    "no inputs": (entry(0, inputs=[]), "layers.0.inputs: expected 1 to"),
    "pool": (entry(3, window=window(HUGE, 2)), "layers.3.window: expected an integer"),
    "stride": (entry(3, window=window(2, 2, HUGE, 2)), "layers.3.window: expected an integer"),
    "stride 0": (entry(3, window=window(2, 2, 0, 2)), "expected a positive kernel"),
    "wide pool": (entry(3, window=window(9, 2)), "a kernel that fits .* 6 x 6, got 9 x 2"),
    "no window": (lambda t, h: h["layers"][3].pop("window"), "layers.3: expected a window"),
    "later source": (given(1, 0, source=2), "layers.1.inputs.0.source: expected an integer"),
    "no source": (given(1, 0, source=-1), "layers.1.inputs.0.source: expected an integer"),
    "image again": (given(2, 1, source=0), "layers.2.inputs.1: expected weights for the image"),
    "groups": (given(1, 0, groups=5), "expected outputs in 5 groups, got 6"),
    "other groups": (given(1, 0, groups=3), "expected 6 channels, got 3 in 3 groups"),
    "unit": (given(2, 1, unit=-1e39), "unit: expected a finite number"),
    "NaN in the header": (given(2, 1, unit=NAN), "JSON: expected a value"),
    "times": (given(2, 1, times=0), "times: expected an integer from 1"),
    "many times": (given(2, 1, times=65535), "counts: expected at most"),
    "channels": (given(6, 0, channels=7), "expected some of 6 channels"),
    "no channels": (given(6, 0, channels=0), "channels: expected at least 1"),
    "int64 weights": (tensor("1.weight.0", torch.Tensor.long), "expected weights of one type"),
    "fractions": (tensor("4.weight.0", torch.Tensor.half), "expected weights of one type"),
    "NaN": (tensor("1.weight.0", lambda t: t * NAN), "expected finite numbers"),
    "bias": (tensor("1.bias", lambda t: t / 0), "layers.1.bias: expected finite numbers"),
    "short bias": (tensor("1.bias", lambda t: t[:5]), r"expected float32\[5\], got float32\[6\]"),
    "double bias": (tensor("1.bias", torch.Tensor.double), "expected float32"),
    "threshold": (tensor("0.threshold", lambda t: -t), "expected numbers > 0"),
    "flat weights": (tensor("1.weight.0", lambda t: t.flatten(1)), r"expected \[6, channels, 3, 3"),
    "no weights": (lambda t, h: t.pop("0.weight.0"), "expected a weight beside its window"),
    "one more": (lambda t, h: t.update({"0.scale2": t["0.bias"] + 0}), "got 0.scale2 as well"),
    "scale": (lambda t, h: t.update({"0.scale": t["0.bias"] + 1}), "expected no scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path, case):
    """Whole, with a right checksum, but no network."""
    network, _ = branches()
    change, message = WRONG[case]
    tensors, header = contents(EventNetwork.from_model(network, image_shape=(1, 6, 6)))
    change(tensors, header)
    with pytest.raises(RunError, match=message):
        EventNetwork.load(saved(tmp_path / "net.iirsnn", tensors, header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tensor("1.weight.0", lambda t: t.float() + 0.5), "layers.1: expected no scale"),
        (tensor("1.weight.0", lambda t: t.fill_(-128)), "from -127 to 127, got -128"),
        (lambda t, h: t.pop("1.scale"), "layers.1: expected a scale"),
        (tensor("0.weight.0", lambda t: t.to(torch.int8)), "layers.0: expected a scale"),
    ],
    ids=["fractions", "-128", "no scale", "first layer"],
)
def test_wrong_int8_files(tmp_path, change, message):
    network, _ = branches()
    net = EventNetwork.from_model(network, precision="int8", image_shape=(1, 6, 6))
    tensors, header = contents(net)
    change(tensors, header)
    with pytest.raises(RunError, match=message):
        EventNetwork.load(saved(tmp_path / "net.iirsnn", tensors, header))


# ---- Mutations ----


def mutated(content, generator):
    """Bytes with one small fault: of the header oftener than its share of the file."""
    (length,) = struct.unpack("<Q", content[:8])
    limit = 8 + length if generator.random() < 0.7 else len(content)
    at, made = generator.randrange(limit), bytearray(content)
    fault = generator.randrange(6)
    if fault == 0:
        made[at] ^= 1 << generator.randrange(8)
    elif fault == 1:
        made[at] = generator.randrange(256)
    elif fault == 2:
        del made[at : at + generator.randrange(1, 9)]
    elif fault == 3:
        made[at:at] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 9)))
    elif fault == 4:
        digits = [i for i in range(8, limit) if 48 <= made[i] <= 57]
        made[generator.choice(digits)] = 48 + generator.randrange(10)
    else:
        made[at:] = made[at : generator.randrange(at, len(made) + 1)]
    return bytes(made)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_mutated_files(tmp_path, precision):
    """A file with a fault gives the same logits, or one clear error."""
    network, x = branches()
    net = EventNetwork.from_model(network, precision=precision, image_shape=(1, 6, 6))
    path, generator, loaded = tmp_path / "net.iirsnn", random.Random(0), 0
    net.save(path)
    logits, content = net(x), path.read_bytes()
    for _ in range(400):
        path.write_bytes(mutated(content, generator))
        try:
            read = EventNetwork.load(path)
        except RunError:
            continue
        loaded += 1
        assert torch.equal(read(x), logits)
    assert loaded < 40


VALUES = (
    *(-1, 0, 1, 2, 3, 7, 64, 65535, 65536, HUGE - 1, HUGE, 1 << 63, 1 << 64, 10**400),
    *(0.5, -0.0, NAN, float("inf"), 1e39, None, True, "", "soft", "sum", [], [1], {}, "neurons"),
)


def places(value):
    """(container, key) of each value in a header."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from places(child)


@pytest.mark.parametrize("old", [False, True])
def test_mutated_headers(tmp_path, old):
    """Whatever a header says under a right checksum: a network that runs, or one clear error."""
    generator, path = random.Random(1), tmp_path / "net.iirsnn"
    if old:
        tensors, header = atomic_files.load(OLD / "format2-fp32.iirsnn")
        del header["format"]
        x = torch.tensor(json.loads((OLD / "format2-fp32.json").read_text())["images"])
    else:
        network, x = branches()
        tensors, header = contents(EventNetwork.from_model(network, image_shape=(1, 6, 6)))
    ran = 0
    for _ in range(400):
        changed = copy.deepcopy(header)
        container, key = generator.choice(list(places(changed)))
        if generator.random() < 0.1:
            del container[key]
        else:
            container[key] = generator.choice(VALUES)
        if old:
            atomic_files.save(path, tensors, changed)
        else:
            saved(path, tensors, changed)
        try:
            net = EventNetwork.load(path)
        except RunError:
            continue
        ran += 1
        # of another image shape than the images', or of none: it may refuse them
        fits = net.image_shape == tuple(x.shape[1:])
        with nullcontext() if fits else suppress(UsageError):
            net(x)
    assert 0 < ran < 200
