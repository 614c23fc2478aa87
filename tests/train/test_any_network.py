"""Networks of torchvision, timm and a file: built, trained to T = 1, deployed, or refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from iirsnn.errors import RunError, UsageError
from iirsnn.models import ModelConfig
from iirsnn.train import recipe
from iirsnn.train.any_network import build, read_weights
from iirsnn.train.run_folder import RunFolder
from tests.conftest import assert_one_line

NETWORK = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.two = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.two(F.relu(self.norm(self.one(x)))))


def small(classes, image_shape):
    channels, *_ = image_shape
    stem = [nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)]
    return nn.Sequential(*stem, Block(8), nn.MaxPool2d(2), *head)


def wrong(classes, image_shape):
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, classes + 1))


def odd(classes):
    return nn.Identity()


def failing(classes, image_shape):
    raise KeyError("no such thing")


number = 3
"""

SETTINGS = [
    *["model.name=net.py:small", "timesteps=[2,1]", "ann.epochs=4", "snn.epochs=1"],
    *["stages.T1.epochs=1", "ann.learning_rate=0.05", "snn.learning_rate=0.01"],
    *["model.layers=[]", "model.hidden=[4096,4096]", "data.batch_size=128"],
    *["runtime.threads=1", "runtime.device=cpu", "conversion.images=64"],
]


def train(iirsnn, *settings, out):
    every = [a for setting in (*SETTINGS, *settings) for a in ("--set", setting)]
    return iirsnn("train", "digits", *every, "--out", out)


def test_a_network_of_ones_own_is_trained_deployed_and_used(iirsnn, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    result = train(iirsnn, out="run")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["ann"]["test_accuracy"] > 0.2
    assert [stage["timesteps"] for stage in report["stages"]] == [2, 1]
    for stage in report["stages"]:
        assert 0 < stage["energy_uj"] < report["ann_energy_uj"]
        assert len(stage["spike_rates"]) == 3
    assert "256 of 256 training images" in iirsnn("deploy", "run", "-o", "net.iirsnn").out
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    assert iirsnn("predict", "net.iirsnn", "x.png").code == 0
    assert iirsnn("energy", "run").code == 0
    assert iirsnn("evaluate", "run").code == 0

    # from the weights of that ANN, which are not trained again
    weights = tmp_path / "run" / "stages" / "ann" / "best.safetensors"
    result = train(iirsnn, f"ann.weights={weights}", out="again")
    assert result.code == 0, result.err
    first, again = (RunFolder.read(tmp_path / name) for name in ("run", "again"))
    for key in ("test_accuracy", "validation_accuracy", "multiplications"):
        assert again.result("ann")[key] == first.result("ann")[key]
    assert {record["stage"] for record in again.metrics()} == {"T2", "T1"}
    assert again.result("T1")["test_accuracy"] == first.result("T1")["test_accuracy"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("torchvision/resnet18", (3, 32, 32)),
        ("torchvision/resnet18", (1, 28, 28)),
        ("torchvision/mobilenet_v2", (3, 32, 32)),
        ("torchvision/squeezenet1_1", (3, 32, 32)),
        ("timm/resnet18", (1, 32, 32)),
    ],
)
def test_stems_for_small_images(name, shape):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="pip install timm to test its networks")
    network = build(ModelConfig(name, small_images=True), 7, shape)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
    first = layers[0]
    assert (first.in_channels, first.kernel_size, first.stride) == (shape[0], (3, 3), (1, 1))
    assert isinstance(layers[1], nn.Conv2d)
    large = build(ModelConfig(name), 7, (shape[0], 64, 64))
    assert next(m for m in large.modules() if isinstance(m, nn.Conv2d)).stride == (2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "torchvision/resnet"}, "model.name: expected one of torchvision/alexnet, "),
        ({"name": "timm/resnet_of_mine"}, "expected a model of timm, got 'timm/resnet_of_mine'"),
        ({"name": "keras/resnet"}, "expected torchvision/NAME or timm/NAME or PATH/FILE.py:FUNC"),
        ({"name": "none.py:small"}, "expected a file of Python, got none.py"),
        ({"name": "net.py:none"}, "net.py has no function 'none'"),
        ({"name": "net.py:number"}, "net.py has no function 'number'"),
        ({"name": "net.py:odd"}, r"expected odd\(classes, image_shape\) in net.py, got odd\(clas"),
        ({"name": "net.py:failing"}, "net.py:failing: 'no such thing'"),
        ({"name": "net.py:wrong"}, r"net.py:wrong: expected logits \[2, 10\], got \[2, 11\]"),
        ({"name": "broken.py:f"}, "model.name: broken.py: "),
        ({"name": "torchvision/vgg11", "small_images": True}, "expected a first convolution with"),
        ({"name": "net.py:small", "pool": "max"}, "model.pool: expected average, since"),
        ({"name": "net.py:small", "layers": [8]}, r"model.layers: expected \[\], since"),
        ({"name": "vgg6", "small_images": True}, "model.small_images: expected false, since vgg6"),
    ],
)
def test_what_is_no_network_is_one_line(settings, message, tmp_path, monkeypatch):
    if settings["name"].startswith("timm"):
        pytest.importorskip("timm", reason="pip install timm to test its networks")
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "broken.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as error:
        build(ModelConfig(**settings), 10, (1, 8, 8))
    assert "\n" not in str(error.value)


def test_settings_that_do_not_go_with_each_other():
    with pytest.raises(UsageError, match=r"weights: expected none but for ann, got 'x\.pt'"):
        recipe.load("digits", ["snn.weights=x.pt"])
    with pytest.raises(UsageError, match="energy_weight: expected 0 for timm/resnet18"):
        recipe.load("digits", ["model.name=timm/resnet18", "snn.energy_weight=1"])


def test_weights_are_read_from_what_training_scripts_write(tmp_path):
    state = nn.Linear(3, 2).state_dict()
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pt")
    torch.save({"model": state, "epoch": 3}, tmp_path / "d.pth")
    for file in sorted(tmp_path.iterdir()):
        found = read_weights(file)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


class Evil:
    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_are_none_are_one_line(tmp_path, capsys):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(3, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("empty.safetensors", "text.pt", "pickle.pt", "module.pt", "list.pt", "none.pt"):
        with pytest.raises(RunError, match=rf"ann\.weights: .*{name}: ") as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    assert "code was run" not in capsys.readouterr().out


def test_weights_of_another_network_are_one_line(iirsnn, tmp_path):
    (tmp_path / "net.py").write_text(NETWORK)
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    result = train(iirsnn, "ann.weights=w.pt", out="run")
    assert_one_line(result, 1, "ann.weights: w.pt: checkpoint: of another network")
    missing = train(iirsnn, "ann.weights=none.pt", out="missing")
    assert_one_line(missing, 1, "error: ann.weights: none.pt: no such file")
