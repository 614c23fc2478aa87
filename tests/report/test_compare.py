"""Runs side by side: groups, means, deviations, ratios, and files that others read."""

import io
import json
import shutil
from statistics import stdev

import pytest
from PIL import Image
from rich.console import Console

from iirsnn.errors import RunError
from iirsnn.report import compare
from iirsnn.train import recipe
from iirsnn.train.run_folder import RunFolder


@pytest.fixture
def seeds(finished, tmp_path):
    """Two runs that differ in their seed, and in the second's better T = 1."""
    paths = [shutil.copytree(finished, tmp_path / name) for name in ("a", "b")]
    text = (paths[1] / "recipe.yaml").read_text()
    (paths[1] / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    file = paths[1] / "stages" / "T1" / "result.json"
    result = json.loads(file.read_text())
    result["test_accuracy"] += 0.1
    result["additions_pooled_once"] /= 2
    file.write_text(json.dumps(result))
    return paths


@pytest.fixture
def other(finished, tmp_path):
    """A run with another setting, of which T = 1 is not finished."""
    path = shutil.copytree(finished, tmp_path / "other")
    text = (path / "recipe.yaml").read_text()
    (path / "recipe.yaml").write_text(text.replace("percentile: 90.0", "percentile: 99.7"))
    (path / "stages" / "T1" / "result.json").unlink()
    return path


def printed(comparison, width=140):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    compare.show(comparison, console)
    return console.file.getvalue()


def test_seeds_of_one_setting_are_a_group(seeds, other):
    first, second = compare.build([*seeds, other])["groups"]
    assert (first["seeds"], second["seeds"]) == ([0, 1], [0])
    assert first["runs"] == [f"{path.parent.name}/{path.name}" for path in seeds]
    results = [RunFolder.read(path).result("T1") for path in seeds]
    accuracies = [result["test_accuracy"] for result in results]
    cell = first["stages"]["T1"]["test_accuracy"]
    assert cell["mean"] == pytest.approx(sum(accuracies) / 2)
    assert cell["std"] == pytest.approx(stdev(accuracies))
    assert cell["n"] == 2
    assert list(first["stages"]) == ["ann", "T2", "T1"]
    assert list(second["stages"]) == ["ann", "T2"]
    assert second["stages"]["T2"]["test_accuracy"]["std"] is None
    assert first["stages"]["T1"]["spike_rates"] == pytest.approx(results[0]["spike_rates"])


def test_energies_count_sub_spikes_and_pooled_values(finished):
    (group,) = compare.build([finished])["groups"]
    folder = RunFolder.read(finished)
    ann, result = folder.result("ann"), folder.result("T1")
    pooled_once = 4.6e-6 * result["multiplications"] + 0.9e-6 * result["additions_pooled_once"]
    measured = {key: cell["mean"] for key, cell in group["stages"]["T1"].items() if "mean" in cell}
    assert measured["energy_uj"] == result["energy_uj"]
    assert measured["energy_pooled_once_uj"] == pytest.approx(pooled_once)
    assert measured["ann_over_this"] == pytest.approx(ann["energy_uj"] / result["energy_uj"])
    assert measured["ann_over_this_pooled_once"] == pytest.approx(ann["energy_uj"] / pooled_once)
    assert pooled_once < result["energy_uj"]
    assert measured["below_ann"] == pytest.approx(ann["test_accuracy"] - result["test_accuracy"])


def test_only_what_differs_is_shown(seeds, other):
    first, second = compare.build([*seeds, other])["groups"]
    assert first["differs"] == {"conversion.percentile": 90.0}
    assert second["differs"] == {"conversion.percentile": 99.7}
    (alone,) = compare.build(seeds)["groups"]
    assert alone["differs"] == {}


def test_groups_of_one_name_are_told_apart(finished, other):
    names = [group["name"] for group in compare.build([finished, other])["groups"]]
    assert names == [f"digits ({finished})", f"digits ({other})"]


def test_tables(seeds, other):
    comparison = compare.build([*seeds, other], {"digits": "why | not"})
    text = printed(comparison)
    group = comparison["groups"][0]
    cell = group["stages"]["T1"]["test_accuracy"]
    assert f"{100 * cell['mean']:.2f} ± {100 * cell['std']:.2f}" in text
    assert "conversion.percentile=99.7" in text
    result = RunFolder.read(other).result("ann")
    origin = f"Trained at commit {result['commit']}; {result['machine']}."
    assert " ".join(text.split()).endswith(origin)
    assert compare.markdown(comparison).endswith(origin + "\n")
    assert text.count("why | not") == 2
    lines = compare.markdown(comparison).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 3 * 4
    for row in rows:
        assert row.replace("\\|", "").count("|") in (5, 6, 10, 4)
    assert any("why \\| not" in row for row in rows)


def test_tables_keep_their_numbers_at_60_columns(seeds, other):
    comparison = compare.build([*seeds, other])
    narrow, wide = printed(comparison, 60), printed(comparison, 200)
    assert "…" not in narrow
    assert all(len(line) <= 60 for line in narrow.splitlines())
    tables = wide[: wide.index("What the recipes differ in")]
    assert {word for word in tables.split() if word[0].isdigit()} <= set(narrow.split())


def test_what_most_recipes_share_is_said_once(finished, tmp_path):
    settings = {
        "plain": {},
        "high": {"percentile: 90.0": "percentile: 99.7"},
        "short": {"T1:\n    epochs: 2": "T1: {}"},
    }
    for name, changes in settings.items():
        path = shutil.copytree(finished, tmp_path / name)
        text = (path / "recipe.yaml").read_text().replace("name: digits", f"name: {name}", 1)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (path / "recipe.yaml").write_text(text)
    comparison = compare.build([tmp_path / name for name in settings])
    text = printed(comparison)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert rows["(most"] == ["of", "them)", "conversion.percentile=90.0"]
    assert text.count("conversion.percentile=90.0") == 1
    assert rows["high"] == ["conversion.percentile=99.7"]
    assert rows["short"] == ["stages.T1.epochs=unset"]
    assert rows["plain"] == []


def test_frontier_has_what_nothing_beats():
    points = [(3, 90), (1, 80), (2, 85), (2, 70), (4, 89), (1, 79)]
    assert compare.frontier(points) == [(1, 80), (2, 85), (3, 90)]
    assert compare.frontier([]) == []


def test_runs_below_a_folder_are_found_once(finished, seeds, tmp_path):
    assert compare.find([tmp_path, seeds[0]]) == [tmp_path / "a", tmp_path / "b"]
    assert compare.find([finished]) == [finished]
    again = tmp_path / "a" / ".." / "a"
    assert compare.find([tmp_path / "a", again]) == [tmp_path / "a"]
    with pytest.raises(RunError, match="no run there, nor below it"):
        compare.find([tmp_path / "a" / "stages"])


def test_runs_without_a_finished_stage(tmp_path):
    with RunFolder.create(tmp_path / "new", recipe.load("digits")):
        pass
    with pytest.raises(RunError, match="no run with a finished stage"):
        compare.build([tmp_path / "new"])


def test_command_prints_and_writes(iirsnn, seeds, other, tmp_path):
    result = iirsnn("compare", *seeds, other)
    assert result.code == 0
    assert "Test accuracy" in result.out
    assert not (tmp_path / "compared").exists()
    result = iirsnn("compare", *seeds, other, "--out", "compared")
    assert result.code == 0
    found = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert [len(group["runs"]) for group in found["groups"]] == [2, 1]
    assert (tmp_path / "compared" / "compare.md").read_text().startswith("**Test accuracy**")
    for name in ("accuracy.png", "frontier.png"):
        with Image.open(tmp_path / "compared" / name) as picture:
            assert picture.format == "PNG"
            assert len(set(picture.convert("L").tobytes())) > 20


def test_command_with_bad_input(iirsnn, finished, tmp_path):
    (tmp_path / "file").write_text("")
    result = iirsnn("compare", tmp_path / "nowhere")
    assert result.code == 1
    assert "error: run" in result.err
    result = iirsnn("compare", finished, "--out", tmp_path / "file" / "below")
    assert result.code == 1
    assert "cannot be made" in result.err
