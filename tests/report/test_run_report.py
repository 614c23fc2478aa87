"""The report: what report.json holds, plots that are pictures, a table for 80 columns."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from iirsnn.errors import RunError
from iirsnn.measure import evaluation, provenance
from iirsnn.measure.evaluation import latencies
from iirsnn.report import run_report
from iirsnn.report.run_report import tables
from iirsnn.train.pipeline import open_data
from iirsnn.train.run_folder import RunFolder

PICTURES = {"accuracy.png": (960, 600), "spike_rates.png": (1440, 600), "times.png": (1440, 600)}


def printed(built, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    run_report.show(built, console)
    return console.file.getvalue()


def built_of(path):
    with RunFolder.resume(path) as folder:
        return run_report.build(folder, open_data(folder.recipe))


def test_report_holds_what_others_read(finished):
    found = json.loads((finished / "report.json").read_text())
    assert isinstance(found["ann"]["test_accuracy"], float)
    assert [stage["timesteps"] for stage in found["stages"]] == [2, 1]
    for stage in found["stages"]:
        for key in (
            "test_accuracy",
            "validation_accuracy",
            "converted_without_retraining_accuracy",
        ):
            assert 0 <= stage[key] <= 1
        assert len(stage["spike_rates"]) == 3
        assert all(0 < rate < stage["timesteps"] for rate in stage["spike_rates"])
        assert 0 < stage["energy_uj"] < found["ann_energy_uj"]
        assert stage["additions"] > stage["multiplications"] > 0
        assert stage["milliseconds_per_image"] > 0
    assert found["ann_energy_uj"] == found["ann"]["energy_uj"]
    assert isinstance(found["machine"], str)
    assert "1 threads" in found["machine"]
    assert found["versions"].keys() == {"iirsnn", "torch", "torchvision", "numpy"}


def test_commit_is_that_of_the_source_tree(monkeypatch, tmp_path):
    source = Path(provenance.__file__).resolve()
    git = ["git", "-C", str(source.parent), "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode == 0:
        assert provenance.commit().removesuffix("-modified") == head.stdout.strip()
    # a copy that git does not track, as in site-packages, has a version alone
    elsewhere = tmp_path / "provenance.py"
    shutil.copy(source, elsewhere)
    monkeypatch.setattr(provenance, "__file__", str(elsewhere))
    assert provenance.commit().startswith("iirsnn 0.")


def test_plots_are_pictures(finished):
    for name, size in PICTURES.items():
        with Image.open(finished / name) as picture:
            assert picture.format == "PNG"
            assert picture.size == size
            assert len(set(picture.convert("L").tobytes())) > 20


def test_times_are_of_each_path_and_batch(finished):
    found = json.loads((finished / "report.json").read_text())
    assert found["engine_missing"] == ""
    for times in found["ann"]["times"].values():
        assert list(times) == [
            "PyTorch",
            "PyTorch, BatchNorm folded",
            "PyTorch, BatchNorm folded, channels_last",
        ]
        assert all(milliseconds > 0 for milliseconds in times.values())
    for stage in found["stages"]:
        assert list(stage["times"]) == ["1", "64"] == list(found["ann"]["times"])
        for times in stage["times"].values():
            assert list(times) == ["PyTorch", "engine"]
            assert all(milliseconds > 0 for milliseconds in times.values())
        assert stage["milliseconds_per_image"] == stage["times"]["64"]["PyTorch"]


def test_energy_with_memory_is_of_the_bytes_counted(finished):
    found = json.loads((finished / "report.json").read_text())
    entries = [found["ann"], *found["stages"]]
    for entry in entries:
        assert entry["bytes"] > 0
        assert entry["energy_with_memory_uj"] == {
            "sram": pytest.approx(entry["energy_uj"] + 1.25e-6 * entry["bytes"]),
            "dram": pytest.approx(entry["energy_uj"] + 160e-6 * entry["bytes"]),
        }
    for stage in found["stages"]:
        # a weight for each operation, and little else
        assert stage["bytes"] < 5 * (stage["additions"] + stage["multiplications"])
        assert stage["bytes"] < found["ann"]["bytes"]
    assert found["ann"]["bytes"] > 4 * found["ann"]["multiplications"]


def test_the_table_of_energy():
    report = large_report((1,), 3)
    assert not any("energy" in title for title, *_ in tables(report))
    for entry, energy in ((report["ann"], 100.0), (report["stages"][0], 4.0)):
        entry["energy_uj"] = energy
        entry["energy_with_memory_uj"] = {"sram": 2 * energy + 2, "dram": 50 * energy + 50}
    report["ann_energy_uj"] = 100.0
    columns, rows = next(table[1:] for table in tables(report) if "Modelled energy" in table[0])
    assert [column.header.replace("\n", " ") for column in columns] == [
        *("", "operations", "ANN / this"),
        *("and bytes in SRAM", "ANN / this", "and bytes in DRAM", "ANN / this"),
    ]
    assert rows == [
        ["ANN", "100", "1.0x", "202", "1.0x", "5050", "1.0x"],
        ["T=1", "4.00", "25.0x", "10.00", "20.2x", "250", "20.2x"],
    ]
    said = " ".join(printed(report).split())
    assert "Energy is modelled" in said
    assert "With memory: 1.25 pJ (SRAM of 8 KB) or 160 pJ (DRAM) for each byte" in said


def test_the_engine_stands_beside_the_anns_best():
    report = large_report((2, 1), 3)
    report["ann"]["times"] = {"1": {"PyTorch": 9.0, "folded": 6.0}, "64": {"PyTorch": 3.0}}
    for stage, engine in zip(report["stages"], (3.0, 1.5), strict=True):
        stage["times"] = {"1": {"PyTorch": 8.0, "engine": engine}, "64": {"PyTorch": 7.0}}
    columns, rows = next(table[1:] for table in tables(report) if "Milliseconds" in table[0])
    assert [column.header.replace("\n", " ") for column in columns] == [
        "",
        *("PyTorch batch 1", "engine batch 1", "ANN's best / engine"),
        *("PyTorch batch 64", "engine batch 64", "ANN's best / engine"),
    ]
    assert rows == [
        ["ANN's best", "6.000", "", "", "3.000", "", ""],
        ["T=2", "8.000", "3.000", "2.0x", "7.000", "", ""],
        ["T=1", "8.000", "1.500", "4.0x", "7.000", "", ""],
    ]
    assert "folded (batch 1); PyTorch (batch 64)" in " ".join(printed(report).split())
    report["engine_missing"] = "no compiler"
    assert "No engine: no compiler." in " ".join(printed(report).split())


def test_table_of_a_run(finished):
    text = printed(json.loads((finished / "report.json").read_text()))
    text = text[: text.index("Milliseconds an image")]
    lines = [line.split() for line in text.splitlines()]
    rows = {line[0]: line for line in lines if line and line[0] in ("ANN", "T=2", "T=1")}
    assert rows.keys() == {"ANN", "T=2", "T=1"}
    found = json.loads((finished / "report.json").read_text())
    assert rows["ANN"][1] == f"{found['ann']['test_accuracy']:.2%}"
    assert "1.0x" in rows["ANN"]
    for stage in found["stages"]:
        row = rows[f"T={stage['timesteps']}"]
        assert row[1] == f"{stage['test_accuracy']:.2%}"
        assert row[2] == f"{stage['converted_without_retraining_accuracy']:.2%}"


def large_report(timesteps, layers):
    """As wide as numbers get: VGG16 on ImageNet."""
    shared = {"test_accuracy": 1.0, "additions": 123.4e9, "multiplications": 15.47e9}
    batches = ("1", "64")
    ann = {**shared, "name": "ann", "energy_uj": 71162.0}
    ann["times"] = {batch: {"PyTorch": 1234.567} for batch in batches}
    stage = {**shared, "energy_uj": 71162.0}
    stage["times"] = {batch: {"PyTorch": 1234.567, "engine": 123.456} for batch in batches}
    stage |= {"converted_without_retraining_accuracy": 1.0, "spike_rates": [1.2345] * layers}
    return {
        "recipe": "imagenet",
        "ann": ann,
        "stages": [{**stage, "timesteps": t} for t in timesteps],
        "ann_energy_uj": 71162.0,
        "timed_batch": 64,
        "engine_missing": "",
        "commit": "0123456789ab",
        "machine": "A processor with quite a long name @ 2.45 GHz, 128 threads",
    }


@pytest.mark.parametrize(("timesteps", "layers"), [((5, 4, 3, 2, 1), 15), ((128, 8, 1), 4)])
def test_tables_fit_into_80_columns_uncut(timesteps, layers):
    text = printed(large_report(timesteps, layers))
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    for t in timesteps:
        assert f"T={t} " in text
    assert text.count("1.234 ") + text.count("1.235 ") >= layers * len(timesteps)
    for number in ("123 G", "15.5 G", " 71162 ", " 1235 ", "100.00%", "additions"):
        assert number in text, number


@pytest.mark.parametrize("width", [60, 40])
def test_tables_keep_their_numbers_on_a_narrow_console(width):
    report = large_report((5, 4, 3, 2, 1), 15)
    narrow, wide = printed(report, width), printed(report, 200)
    assert "…" not in narrow
    assert all(len(line) <= width for line in narrow.splitlines())
    above = wide[: wide.index("All per image")]
    assert {word for word in above.split() if word[0].isdigit()} <= set(narrow.split())


def test_a_run_that_is_not_finished_is_reported_as_far_as_it_is(finished_copy):
    for name in ("report.json", *PICTURES):
        (finished_copy / name).unlink()
    (finished_copy / "stages" / "T1" / "result.json").unlink()
    built = built_of(finished_copy)
    assert [stage["timesteps"] for stage in built["stages"]] == [2]
    run_report.write(built, finished_copy)
    assert all((finished_copy / name).stat().st_size > 5000 for name in PICTURES)

    (finished_copy / "stages" / "T2" / "result.json").unlink()
    built = built_of(finished_copy)
    assert built["stages"] == []
    assert "ANN" in printed(built)
    run_report.write(built, finished_copy)
    run_report.write_page(built, finished_copy)
    assert json.loads((finished_copy / "report.json").read_text())["stages"] == []

    (finished_copy / "stages" / "ann" / "result.json").unlink()
    with pytest.raises(RunError, match="no stage is finished yet"):
        built_of(finished_copy)


def test_a_folder_that_cannot_be_written(finished, tmp_path):
    built = json.loads((finished / "report.json").read_text())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"report\.json: cannot be written"):
        run_report.write(built, tmp_path / "file")


def test_latencies_are_milliseconds_an_image_of_interleaved_runs(monkeypatch):
    order = []
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: sum(order))

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, images):
            assert not self.training
            order.append(self.seconds)

    slow = [Slow(0.02), Slow(0.04)]
    times = latencies(slow, torch.zeros(4, 1), repeats=3)
    assert order == [0.02, 0.04] * 4
    assert times == pytest.approx([5, 10])
    assert all(module.training for module in slow)
