"""The command line: what it prints, and one clear line for every bad input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from iirsnn.train import recipe
from iirsnn.train.run_folder import RunFolder
from tests.conftest import assert_one_line, contents


def test_train_reports_what_it_did(finished):
    made = {str(path) for path in contents(finished)}
    assert made == {
        *["recipe.yaml", "data.json", "metrics.jsonl", "report.json", "accuracy.png"],
        *["spike_rates.png", "raster.png", "membranes.png", "thresholds.png", "times.png"],
        "report.html",
        *(
            f"stages/{s}/{f}"
            for s in ("ann", "T2", "T1")
            for f in ("best.safetensors", "result.json")
        ),
    }
    stored = recipe.load(str(finished / "recipe.yaml"))
    assert stored.timesteps == [2, 1]  # of --set
    assert stored.stage_config("T1").epochs == 2
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["stage"] for r in records] == ["ann"] * 4 + ["T2"] + ["T1"] * 2
    assert [r["step"] for r in records] == [11, 22, 33, 44, 11, 11, 22]
    assert all(r["images_per_second"] > 0 for r in records)


def test_train_without_a_terminal_prints_a_line_an_epoch(iirsnn, tmp_path):
    tiny = ["ann.epochs=2", "snn.epochs=1", "timesteps=[1]", "stages.T1.epochs=1"]
    tiny += ["model.layers=[4,A]", "model.hidden=[8]", "data.batch_size=700", "runtime.threads=1"]
    settings = [argument for setting in tiny for argument in ("--set", setting)]
    result = iirsnn("train", "digits", *settings, "--set", "runtime.device=cpu")
    assert result.code == 0
    assert result.out.count("epoch ") == 3
    assert result.out.count(" test ") >= 2
    assert "Written: runs/digits/report.json" in result.out
    assert (tmp_path / "runs" / "digits" / "report.json").stat().st_size > 100


def test_train_names_settings_of_a_stage_that_is_not_trained(iirsnn, tmp_path):
    result = iirsnn("train", "digits", "--set", "timesteps=[5,1]", "--set", "stages.T9.epochs=3")
    assert result.code == 2
    line = "--set stages.T9.epochs=3: expected a stage of timesteps [5, 1] (T5, T1), got T9"
    assert line in result.err
    assert not (tmp_path / "runs").exists()


def test_evaluate_measures_the_same_again(iirsnn, finished):
    before = contents(finished)
    result = iirsnn("evaluate", finished)
    assert result.code == 0
    for stage in ("ann", "T2", "T1"):
        accuracy = RunFolder.read(finished).result(stage)["test_accuracy"]
        assert any(stage in line and f"{accuracy:.2%}" in line for line in result.out.splitlines())
    alone = iirsnn("evaluate", finished, "--stage", "T1")
    assert "T1" in alone.out
    assert "T2" not in alone.out
    assert contents(finished) == before


def test_report_writes_again(iirsnn, finished_copy):
    old = json.loads((finished_copy / "report.json").read_text())
    for name in ("report.json", "report.html", "accuracy.png", "spike_rates.png", "raster.png"):
        (finished_copy / name).unlink()
    result = iirsnn("report", finished_copy)
    assert result.code == 0
    assert "digits: from the ANN to T = 1" in result.out
    new = json.loads((finished_copy / "report.json").read_text())
    assert (finished_copy / "accuracy.png").stat().st_size > 5000
    assert (finished_copy / "raster.png").stat().st_size > 5000
    assert (finished_copy / "report.html").stat().st_size > 50000
    for report in (old, new):
        for entry in (report["ann"], *report["stages"]):
            del entry["milliseconds_per_image"], entry["times"]
        del report["commit"], report["machine"]
    assert new == old


def test_resume_of_a_finished_run_reports_alone(iirsnn, finished_copy):
    before = contents(finished_copy / "stages")
    result = iirsnn("train", "--resume", finished_copy)
    assert result.code == 0
    assert "epoch" not in result.out
    assert contents(finished_copy / "stages") == before
    same = iirsnn("train", "--resume", finished_copy, "--set", "runtime.checkpoint_minutes=1")
    assert same.code == 0


def test_env_names_the_backends(iirsnn):
    result = iirsnn("env")
    assert result.code == 0
    for name in ("cpu", "cuda", "triton", "reference"):
        assert f"backend {name}" in result.out


def test_env_with_an_unknown_instruction_set_is_one_line():
    asked = {**os.environ, "IIRSNN_CPU_CAPABILITY": "mmx"}
    line = [sys.executable, "-m", "iirsnn", "env"]
    done = subprocess.run(line, env=asked, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: IIRSNN_CPU_CAPABILITY: expected portable")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("given", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_wants_them_to_spin(given, policy):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": given} if given else {})
    command = [sys.executable, "-m", "iirsnn", "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("needs a torch with libgomp or libomp, as the wheels for Linux have")
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


@pytest.mark.parametrize("arguments", [["train", "digits", "--nothing"], ["nothing"], ["evaluate"]])
def test_commands_that_are_none(iirsnn, arguments, tmp_path):
    result = iirsnn(*arguments)
    assert result.code == 2
    assert "Usage:" in result.err
    assert "Traceback" not in result.out + result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["nothing=1"], "Key 'nothing' not in 'Recipe'"),
        (["ann.nothing=1"], "Key 'nothing' not in 'StageConfig'"),
        (["seed"], "--set: expected key=value, got 'seed'"),
        (["ann.epochs=many"], "could not be converted to Integer"),
        (["timesteps=[2,0]"], "timesteps: expected each T to be at least 1, got [2, 0]"),
        (["timesteps=[1,2,3]"], "timesteps: expected a strictly decreasing list, got [1, 2, 3]"),
        (["conversion.scale=0"], "conversion.scale: expected a value positive, got 0.0"),
        (["conversion.percentile=-5"], "conversion.percentile: expected a value in (0, 100]"),
        (["ann.learning_rate=0"], "ann: learning_rate: expected a value positive, got 0.0"),
        (["snn.learning_rate=-1"], "learning_rate: expected a value positive, got -1.0"),
        (["data.name=mnist"], "data.name: expected one of digits, "),
        (["model.name=lenet"], "model.name: expected one of vgg, "),
        (["model.layers=[A]"], "layers: expected a convolution's channels first, got ['A']"),
        (["neuron.backend=abacus"], "backend: expected one of auto, "),
        (["neuron.backend=cuda"], "backend: expected one that can run, got 'cuda'"),
        (["neuron.surrogate=step"], "surrogate: expected one of triangle, "),
        (["neuron.reset=later"], "neuron.reset: expected one of soft, "),
    ],
)
def test_bad_settings_are_one_line_and_make_nothing(iirsnn, tmp_path, settings, part):
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert_one_line(iirsnn("train", "digits", *arguments, "--out", "run"), 2, part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["digit", "none.yaml", "."])
def test_unknown_recipes(iirsnn, tmp_path, name):
    assert_one_line(
        iirsnn("train", name), 2, "recipe: expected one of cifar10-resnet20, ", repr(name)
    )
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_recipes(iirsnn, tmp_path):
    (tmp_path / "bad.yaml").write_text("data: [")
    assert_one_line(iirsnn("train", "bad.yaml"), 2, "recipe bad.yaml: ")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert_one_line(iirsnn("train", "bad.yaml"), 2, "recipe bad.yaml: cannot be read")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_missing_data(iirsnn, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "data: {name: imagenet, root: nowhere}\nmodel: {layers: [8, A]}\n"
    )
    assert_one_line(iirsnn("train", "mine.yaml"), 1, "imagenet", "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_nothing_to_train(iirsnn):
    assert_one_line(iirsnn("train"), 2, "expected a RECIPE or --resume RUN, got neither")


def test_output_folders_in_the_way(iirsnn, tmp_path, finished_copy):
    before = contents(tmp_path)
    assert_one_line(iirsnn("train", "digits", "--out", finished_copy), 2, "holds a run; continue")
    assert_one_line(
        iirsnn("train", "digits", "--out", tmp_path), 2, "is not empty and holds no run"
    )
    file = finished_copy / "recipe.yaml"
    assert_one_line(iirsnn("train", "digits", "--out", file), 2, "is a file")
    assert_one_line(iirsnn("train", "digits", "--out", file / "below"), 1, "cannot be made")
    assert_one_line(
        iirsnn("train", "digits", "--resume", finished_copy, "--out", "x"), 2, "--out does not go"
    )
    assert contents(tmp_path) == before


def test_a_run_in_use(iirsnn, finished_copy):
    before = contents(finished_copy)
    with RunFolder.resume(finished_copy):
        for arguments in (["train", "--resume", finished_copy], ["report", finished_copy]):
            assert_one_line(iirsnn(*arguments), 1, "in use by another run")
        assert iirsnn("evaluate", finished_copy, "--stage", "ann").code == 0  # only reads
    assert contents(finished_copy) == before


@pytest.mark.parametrize("command", [["train", "--resume"], ["evaluate"], ["report"]])
def test_no_run(iirsnn, tmp_path, command):
    for path in ("missing", "."):
        assert_one_line(iirsnn(*command, path), 2, f"run {path}: no run there")
    assert not list(tmp_path.iterdir())


def test_resume_with_another_recipe(iirsnn, finished_copy):
    before = contents(finished_copy)
    for arguments, part in (
        (["--set", "seed=7"], "seed is 0 there and 7 here"),
        (["digits"], "timesteps is [2, 1] there and [5, 4, 3, 2, 1] here"),
        (["--set", "ann.learning_rate=0.5"], "ann.learning_rate is 0.05 there and 0.5 here"),
    ):
        result = iirsnn("train", *arguments, "--resume", finished_copy)
        assert_one_line(result, 2, "was started with another recipe: ", part)
    assert_one_line(
        iirsnn("train", "--resume", finished_copy, "--set", "ann.learning_rate=0"), 2, "positive"
    )
    assert contents(finished_copy) == before


def test_damaged_and_foreign_checkpoints(iirsnn, finished_copy):
    best = finished_copy / "stages" / "T2" / "best.safetensors"
    whole = best.read_bytes()
    for damage, part in (
        (lambda: best.write_bytes(whole[:-100]), "truncated or no checkpoint"),
        (lambda: best.write_bytes(b""), "truncated or no checkpoint"),
        (lambda: best.write_bytes(b"\x89PNG" * 100), "truncated or no checkpoint"),
        (lambda: save_file({}, best, {"format": "pt"}), "not one of iirsnn's"),
        (lambda: shutil.copy(best.parents[1] / "T1" / best.name, best), "expected stage T2, got"),
        (best.unlink, "no such file"),
    ):
        damage()
        before = contents(finished_copy)
        for command in ("evaluate", "report"):
            assert_one_line(iirsnn(command, finished_copy), 1, "T2/best.safetensors", part)
        assert contents(finished_copy) == before


def test_evaluate_takes_finished_stages_only(iirsnn, finished_copy):
    (finished_copy / "stages" / "T1" / "result.json").unlink()
    assert "T1" not in iirsnn("evaluate", finished_copy).out
    assert_one_line(
        iirsnn("evaluate", finished_copy, "--stage", "T1"), 2, "expected one of ann, T2, got 'T1'"
    )
    for stage in ("ann", "T2"):
        (finished_copy / "stages" / stage / "result.json").unlink()
    assert_one_line(iirsnn("evaluate", finished_copy), 1, "no stage is finished yet")
    assert_one_line(iirsnn("report", finished_copy), 1, "no stage is finished yet")


def test_a_loss_that_is_not_finite(iirsnn, tmp_path):
    settings = ["ann.learning_rate=1e30", "model.layers=[4,A]", "model.hidden=[8]"]
    settings += ["runtime.device=cpu", "runtime.threads=1", "runtime.checkpoint_minutes=0"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    result = iirsnn("train", "digits", *arguments, "--out", "run")
    assert_one_line(result, 1, "stage ann, step ", " is ", "checkpoint")
    assert not (tmp_path / "run" / "report.json").exists()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_disk_that_fills_up(iirsnn, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "log", full)
    settings = ["ann.epochs=1", "data.batch_size=700", "model.layers=[4]", "runtime.device=cpu"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert_one_line(iirsnn("train", "digits", *arguments), 1, "No space left on device")
