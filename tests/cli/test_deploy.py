"""deploy, predict and energy: what they print and write, and one line for every bad input."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from iirsnn import convert
from iirsnn.conversion import NeuronConfig, fold_batch_norm
from iirsnn.event import EventNetwork
from iirsnn.measure.evaluation import count_operations
from iirsnn.models.resnet import Plan, resnet
from iirsnn.report import engine_energy
from iirsnn.report.engine_energy import beside
from iirsnn.train import data, recipe
from iirsnn.train.run_folder import RunFolder
from tests.conftest import assert_one_line
from tests.event.networks import levels


@pytest.fixture
def deployed(iirsnn, finished, tmp_path):
    result = iirsnn("deploy", finished, "-o", "net.iirsnn")
    assert result.code == 0
    assert "Written: net.iirsnn" in result.out
    assert "predicts as the PyTorch model on 256 of 256 training images" in result.out
    return tmp_path / "net.iirsnn"


def digits(finished, count):
    """Test images as PNG files would hold them, uint8 [8, 8], and what the data set gives."""
    stored = recipe.load(str(finished / "recipe.yaml"))
    test = data.load(stored.data, stored.seed).test
    pixels = (test.pixels[:count, 0].float() * 255 / 16).round().byte().numpy()
    return pixels, test.__getitems__(list(range(count)))


def test_predict_names_the_class_of_each_file(iirsnn, finished, deployed, tmp_path):
    pixels, samples = digits(finished, 12)
    net = EventNetwork.load(deployed)
    expected = [net.notes["class_names"][int(net(x[None]).argmax())] for x, _ in samples]
    files = []
    for index, image in enumerate(pixels):
        files.append(f"{index}.png")
        Image.fromarray(image).save(tmp_path / files[-1])
    result = iirsnn("predict", deployed, *files)
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines() if ".png" in line]
    assert [row[0] for row in rows] == files
    agree = [row[1] == name for row, name in zip(rows, expected, strict=True)]
    assert sum(agree) >= 11  # 8-bit grey levels are not exactly the data set's 17
    assert all(float(row[-1]) >= 0 for row in rows)


def test_a_network_that_is_no_faster_than_the_dense_one_is_a_line(finished, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "iirsnn", "deploy", str(finished), "--stage", "T2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: this network makes 0.")
    assert line.endswith("the dense network is faster")


def test_predict_classifies_what_it_can_read(iirsnn, deployed, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "tall.png")
    result = iirsnn("predict", deployed, "none.png", "good.png")
    assert result.code == 1
    assert "good.png" in result.out
    assert result.err == (
        "error: one image could not be classified: image none.png: no such file\n"
    )
    result = iirsnn("predict", deployed, "tall.png", "good.png", "none.png")
    assert "good.png" in result.out
    assert "error: 2 of 3 images could not be classified: image tall.png: expected" in result.err
    assert "; image none.png: no such file" in result.err


@pytest.mark.parametrize("name", ["", "avx512"])
def test_predict_runs_on_the_instruction_set_that_is_asked_for(finished, deployed, tmp_path, name):
    """Of the processor's own; any other name is one line."""
    pixels, _ = digits(finished, 1)
    Image.fromarray(pixels[0]).save(tmp_path / "0.png")
    done = subprocess.run(
        [sys.executable, "-m", "iirsnn", "predict", str(deployed), "0.png"],
        env=os.environ | {"IIRSNN_CPU_CAPABILITY": name},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if name and name not in levels():
        assert done.returncode == 2
        expected = "IIRSNN_CPU_CAPABILITY: expected portable, avx2 or avx512, at most "
        assert expected in done.stderr
        assert f"got '{name}'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0
        assert "0.png" in done.stdout


def test_deploy_takes_any_stage_and_precision(iirsnn, finished, tmp_path):
    for stage, precision in ((2, "fp32"), (1, "bf16"), (1, "int8")):
        arguments = ("--stage", f"T{stage}" if stage == 2 else stage, "--precision", precision)
        assert iirsnn("deploy", finished, *arguments, "--out", "x.iirsnn").code == 0
        net = EventNetwork.load(tmp_path / "x.iirsnn")
        assert (net.timesteps, net.precision) == (stage, precision)
        assert net.notes["recipe"] == "digits"
        assert len(net.notes["class_names"]) == 10


def test_energy_counts_the_engine_beside_the_ann(iirsnn, finished_copy):
    result = iirsnn("energy", finished_copy)
    assert result.code == 0
    assert "One image, T = 1, fp32 weights" in result.out
    assert (finished_copy / "energy.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads((finished_copy / "energy.json").read_text())
    stage = RunFolder.read(finished_copy).result("T1")
    total = report["total"]
    # binary digits of the pooled counts are fewer than the spikes counted
    assert total["additions"] <= stage["additions"]
    assert 0 < total["multiplications"] <= stage["multiplications"]
    ann = RunFolder.read(finished_copy).result("ann")
    assert total["ann_energy_uj"] == pytest.approx(ann["energy_uj"])
    assert 0 < total["energy_uj"] < total["ann_energy_uj"]
    assert total["energy_uj"] == pytest.approx(
        1e-6 * (0.9 * total["additions"] + 4.6 * total["multiplications"])
    )
    for spikes, rate, layer in zip(
        [entry for entry in report["layers"] if entry["spikes"]],
        stage["spike_rates"],
        stage["layers"],
        strict=True,
    ):
        assert spikes["spikes"] / spikes["neurons"] == pytest.approx(rate, rel=1e-3), layer
    assert total["bytes"] == pytest.approx(
        total["weight_bytes"] + total["spike_bytes"] + total["value_bytes"] + 4 * 64
    )
    for whose in ("", "ann_"):
        assert total[f"{whose}energy_with_memory_uj"] == {
            place: pytest.approx(total[f"{whose}energy_uj"] + pj * total[f"{whose}bytes"] * 1e-6)
            for place, pj in (("sram", 1.25), ("dram", 160))
        }
    assert "Modelled energy of one image" in result.out
    other = iirsnn("energy", finished_copy, "--stage", 2, "--precision", "int8")
    assert "One image, T = 2, int8 weights" in other.out


def test_the_table_keeps_its_numbers_at_60_columns(iirsnn, finished_copy):
    assert iirsnn("energy", finished_copy).code == 0
    report = json.loads((finished_copy / "energy.json").read_text())
    texts = []
    for width in (60, 200):
        console = Console(file=io.StringIO(), width=width, color_system=None)
        engine_energy.show(report, console)
        texts.append(console.file.getvalue())
    narrow, wide = texts
    assert "…" not in narrow
    assert all(len(line) <= 60 for line in narrow.splitlines())
    tables = wide[: wide.index("Means over")]
    assert {word for word in tables.split() if word[0].isdigit()} <= set(narrow.split())


def test_bad_input(iirsnn, finished, deployed, tmp_path):
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(tmp_path / "tall.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "short.iirsnn").write_bytes(deployed.read_bytes()[:-9])
    anonymous = EventNetwork.load(deployed)
    anonymous.notes.clear()
    anonymous.save(tmp_path / "anonymous.iirsnn")
    predict = ("predict", deployed)
    assert_one_line(iirsnn(*predict, "tall.png"), 2, "tall.png: expected 8 x 8 pixels, got 9 x 8")
    assert_one_line(iirsnn(*predict, "-", "good.png"), 2, "- or --watch DIR, and one of them alone")
    assert_one_line(iirsnn(*predict, "none.png"), 1, "image none.png: no such file")
    assert_one_line(iirsnn(*predict, "broken.png"), 1, "image broken.png: cannot be read")
    assert_one_line(iirsnn("predict", "none", "good.png"), 1, "network none: no such file")
    assert_one_line(iirsnn("predict", "short.iirsnn", "good.png"), 1, "truncated")
    assert_one_line(iirsnn("predict", "anonymous.iirsnn", "good.png"), 2, "deploy wrote")
    assert_one_line(
        iirsnn("deploy", finished, "--stage", 7), 2, "expected one of 2, 1 timesteps, got 7"
    )
    assert_one_line(iirsnn("deploy", finished, "--stage", "x"), 2, "like 1 or T1, got 'x'")
    assert_one_line(iirsnn("deploy", finished, "--precision", "fp8"), 2, "precision", "'fp8'")
    assert_one_line(iirsnn("deploy", finished, "-o", "no/net"), 1, "no/net: cannot be written")
    assert_one_line(iirsnn("deploy", tmp_path), 2, "no run there")
    assert_one_line(iirsnn("energy", finished, "--stage", 9), 2, "timesteps, got 9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "says nothing about its images"),
        ({"images": {"std": [1.0]}}, "notes: mean: expected 1 finite numbers, got None"),
        ({"images": {"mean": [0.5], "std": [0]}}, "notes: std: expected positive numbers, got [0]"),
        ({"class_names": ["a"]}, "notes: class_names: expected 10 names, got ['a']"),
        ({"class_names": list(range(10))}, "notes: class_names: expected 10 names, got [0"),
    ],
)
def test_notes_that_are_not_deploys_are_one_line(iirsnn, deployed, tmp_path, change, message):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    net = EventNetwork.load(deployed)
    net.notes.update(change)
    net.save(tmp_path / "changed.iirsnn")
    assert_one_line(iirsnn("predict", "changed.iirsnn", "good.png"), 2, message)


def test_a_network_without_an_image_shape_is_one_line(iirsnn, tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "good.png")
    ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    snn = convert(ann, torch.rand(4, 1, 8, 8), timesteps=1)
    EventNetwork.from_model(snn).save(tmp_path / "net.iirsnn")
    result = iirsnn("predict", "net.iirsnn", "good.png")
    assert_one_line(result, 2, "net: does not say the size of its images")


def test_deploy_writes_over_nothing_but_networks(iirsnn, finished, deployed, tmp_path):
    assert iirsnn("deploy", finished, "-o", "net.iirsnn").code == 0
    (tmp_path / "thesis.txt").write_text("years of work")
    checkpoint = finished / "stages" / "T1" / "best.safetensors"
    (tmp_path / "best").write_bytes(checkpoint.read_bytes())
    (tmp_path / "cut.iirsnn").write_bytes(deployed.read_bytes()[:50])
    (tmp_path / "empty").touch()
    for name in ("thesis.txt", "best", "cut.iirsnn", "empty"):
        before = (tmp_path / name).read_bytes()
        assert_one_line(
            iirsnn("deploy", finished, "-o", name), 2, f"{name} is there", "--force writes over it"
        )
        assert (tmp_path / name).read_bytes() == before
    assert iirsnn("deploy", finished, "-o", "thesis.txt", "--force").code == 0
    EventNetwork.load(tmp_path / "thesis.txt")
    (tmp_path / "folder").mkdir()
    result = iirsnn("deploy", finished, "-o", "folder", "--force")
    assert_one_line(result, 2, "expected a file, got the folder folder")


def test_brackets_in_names_are_printed_as_they_are(iirsnn, deployed, tmp_path):
    (tmp_path / "[bold]x[").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "[bold]x[" / "bold].png")
    net = EventNetwork.load(deployed)
    net.notes["class_names"] = [f"[red]{i}[/red]" for i in range(10)]
    net.save(tmp_path / "names.iirsnn")
    result = iirsnn("predict", "names.iirsnn", "[bold]x[/bold].png")
    assert result.code == 0
    assert "[bold]x[/bold].png" in result.out
    assert "[red]" in result.out


@pytest.mark.parametrize("keep_batch_norm", [True, False])
def test_a_residual_anns_operations_stand_beside_the_engines(keep_batch_norm):
    blocks = ((3, 1), (5, 1))  # an identity shortcut, then one with weights
    ann = resnet(Plan((3,), True, blocks, False), 4, (1, 8, 8), batch_norm=True)
    neuron = NeuronConfig(keep_batch_norm=keep_batch_norm)
    net = EventNetwork.from_model(convert(ann, torch.rand(4, 1, 8, 8), timesteps=1, neuron=neuron))
    if not keep_batch_norm:
        fold_batch_norm(ann)
    counter = count_operations(ann, torch.zeros(2, 1, 8, 8))
    found = beside([layer.name for layer in net.layers], counter)
    engine = {layer.name: layer.dense_operations for layer in statistics(net)}
    products = {name: sum(o.multiplications for o in each) for name, each in found.items()}
    assert products == {name: dense for name, dense in engine.items() if dense}
    additions = [sum(o.additions for o in each) for each in found.values()]
    assert sum(additions) == 2 * 3 * 4 * 4  # of the identity shortcut


def statistics(net):
    net(torch.zeros(2, 1, 8, 8))
    return net.statistics()


def test_only_finished_stages_are_used(iirsnn, finished_copy):
    for stage in ("T1", "T2"):
        (finished_copy / "stages" / stage / "result.json").unlink()
        if stage == "T1":
            assert_one_line(
                iirsnn("deploy", finished_copy), 2, "expected one of 2 timesteps, got 1"
            )
    assert_one_line(iirsnn("energy", finished_copy), 1, "no spiking stage is finished yet")
