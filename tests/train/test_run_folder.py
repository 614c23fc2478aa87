"""The folder of a run: who owns it, what it takes back, and what it refuses."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from iirsnn.errors import RunError, UsageError
from iirsnn.train import recipe
from iirsnn.train.run_folder import RunFolder
from tests.conftest import contents

HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """other_process(folder): another process that has the run's lock until it is killed."""
    started = []

    def hold(folder):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder / ".lock")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_new_run_holds_its_complete_recipe(tmp_path, quick):
    path = tmp_path / "some" / "where"
    with RunFolder.create(path, quick):
        assert contents(path).keys() == {(path / "recipe.yaml").relative_to(path)}
    assert RunFolder.read(path).recipe == quick
    with RunFolder.resume(path) as folder:
        assert folder.recipe == quick


def test_an_empty_folder_is_taken(tmp_path, quick):
    with RunFolder.create(tmp_path, quick) as folder:
        assert folder.path == tmp_path


def test_a_folder_with_a_run_is_left_alone(tmp_path, quick):
    RunFolder.create(tmp_path, quick).close()
    before = contents(tmp_path)
    other = dataclasses.replace(quick, seed=5)
    with pytest.raises(UsageError, match=r"holds a run; continue it with --resume"):
        RunFolder.create(tmp_path, other)
    assert contents(tmp_path) == before
    RunFolder.resume(tmp_path).close()  # and no lock is left on it


def test_a_folder_with_something_else_is_left_alone(tmp_path, quick):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, quick)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path, quick):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"output folder .*file: is a file"):
        RunFolder.create(file, quick)
    with pytest.raises(RunError, match=r"output folder .*below: cannot be made"):
        RunFolder.create(file / "below", quick)
    assert file.read_text() == "mine"


def test_a_name_too_long(tmp_path, quick):
    with pytest.raises(RunError, match=r"cannot be made \(File name too long\)"):
        RunFolder.create(tmp_path / ("x" * 300), quick)


def test_a_folder_that_is_not_writable(tmp_path, quick, monkeypatch):
    # a superuser may write anywhere, so the answer of the system is given here
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match="is not writable"):
        RunFolder.create(tmp_path / "run", quick)


@pytest.mark.parametrize("open_run", [RunFolder.create, RunFolder.resume])
def test_a_run_of_another_process_is_in_use_until_that_dies(
    open_run, tmp_path, quick, other_process
):
    RunFolder.create(tmp_path, quick).close()
    if open_run == RunFolder.create:
        (tmp_path / "recipe.yaml").unlink()
    owner = other_process(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(RunError, match="in use by another run"):
        open_run(tmp_path, quick)
    assert contents(tmp_path) == before
    owner.kill()
    owner.wait()
    open_run(tmp_path, quick).close()


def test_a_run_is_in_use_in_its_own_process_too(tmp_path, quick):
    with RunFolder.create(tmp_path, quick):
        with pytest.raises(RunError, match="in use by another run"):
            RunFolder.resume(tmp_path)
        assert RunFolder.read(tmp_path).recipe == quick  # reading is free
    RunFolder.resume(tmp_path).close()


def test_no_run(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"no run there \(no recipe\.yaml in it\)"):
            RunFolder.resume(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=1", "seed is 0 there and 1 here"),
        ("ann.learning_rate=0.1", "ann.learning_rate is 0.05 there and 0.1 here"),
        ("timesteps=[3,1]", r"timesteps is \[2, 1\] there and \[3, 1\] here"),
        ("stages.T2.epochs=4", "stages.T2.epochs is None there and 4 here"),
        ("model.layers=[8,A]", "model.layers is"),
    ],
)
def test_a_run_goes_on_with_its_own_recipe_only(tmp_path, quick, change, message):
    RunFolder.create(tmp_path, quick).close()
    before = contents(tmp_path)
    other = recipe.parse(recipe.dump(quick), [change], source="test")
    with pytest.raises(UsageError, match=f"was started with another recipe: {message}"):
        RunFolder.resume(tmp_path, other)
    assert contents(tmp_path) == before
    RunFolder.resume(tmp_path).close()


def test_how_a_run_computes_may_change(tmp_path, quick):
    RunFolder.create(tmp_path, quick).close()
    other = recipe.parse(
        recipe.dump(quick), ["runtime.threads=2", "runtime.checkpoint_minutes=1"], source="test"
    )
    with RunFolder.resume(tmp_path, other) as folder:
        assert folder.recipe.runtime.threads == 2
        folder.save_checkpoint("ann", "best", {"weight": torch.zeros(2)}, {})
    with RunFolder.resume(tmp_path, quick) as folder:
        folder.load_checkpoint("ann", "best")


def test_checkpoints_know_their_stage_and_recipe(tmp_path, quick):
    with RunFolder.create(tmp_path / "a", quick) as folder:
        assert not folder.has_checkpoint("T2", "last")
        folder.save_checkpoint("T2", "last", {"weight": torch.ones(2)}, {"progress": 3})
        assert folder.has_checkpoint("T2", "last")
        tensors, header = folder.load_checkpoint("T2", "last")
        assert torch.equal(tensors["weight"], torch.ones(2))
        assert (header["stage"], header["progress"]) == ("T2", 3)
        assert recipe.parse(header["recipe"], source="header") == quick

        stages = tmp_path / "a" / "stages"
        shutil.copytree(stages / "T2", stages / "T1")
        with pytest.raises(RunError, match="expected stage T1, got 'T2'"):
            folder.load_checkpoint("T1", "last")
        with pytest.raises(RunError, match=r"ann/last\.safetensors: no such file"):
            folder.load_checkpoint("ann", "last")
        assert not (stages / "ann").exists()  # to read is to make nothing
        save_file({"weight": torch.zeros(3)}, stages / "T2" / "last.safetensors")
        with pytest.raises(RunError, match="not one of iirsnn's"):
            folder.load_checkpoint("T2", "last")


def test_a_checkpoint_of_another_run(tmp_path, quick):
    with RunFolder.create(tmp_path / "a", quick) as a:
        a.save_checkpoint("ann", "best", {"weight": torch.ones(2)}, {})
    with RunFolder.create(tmp_path / "b", dataclasses.replace(quick, seed=9)) as b:
        shutil.copytree(tmp_path / "a" / "stages", tmp_path / "b" / "stages")
        with pytest.raises(RunError, match=r"not of this run's recipe: seed is 0 there and 9 here"):
            b.load_checkpoint("ann", "best")


def test_a_finished_stage_needs_no_resume_checkpoint(tmp_path, quick):
    with RunFolder.create(tmp_path, quick) as folder:
        folder.save_checkpoint("ann", "best", {}, {})
        folder.save_checkpoint("ann", "last", {}, {})
        assert folder.result("ann") is None
        folder.finish_stage("ann", {"test_accuracy": 0.5})
        assert folder.result("ann") == {"test_accuracy": 0.5}
        assert folder.has_checkpoint("ann", "best")
        assert not folder.has_checkpoint("ann", "last")


def record(stage, epoch):
    return {"stage": stage, "epoch": epoch}


def test_metrics_are_rewound_to_the_epoch_that_goes_on(tmp_path, quick):
    with RunFolder.create(tmp_path, quick) as folder:
        assert folder.metrics() == []
        logged = [record("ann", 4), record("ann", 8), record("T2", 4), record("T2", 8)]
        for entry in logged:
            folder.log(entry)
        assert folder.metrics() == logged
        folder.rewind_metrics("T2", 8)
        assert folder.metrics() == logged
        folder.rewind_metrics("T2", 7)
        assert folder.metrics() == logged[:3]
        folder.rewind_metrics("T2", 0)
        assert folder.metrics() == logged[:2]


def test_a_line_of_metrics_cut_off_by_a_crash_is_dropped(tmp_path, quick):
    file = tmp_path / "metrics.jsonl"
    with RunFolder.create(tmp_path, quick) as folder:
        folder.log(record("ann", 4))
        with file.open("a") as stream:
            stream.write(json.dumps(record("ann", 8))[:-3])
        assert folder.metrics() == [record("ann", 4)]
        folder.rewind_metrics("ann", 4)
        folder.log(record("ann", 8))
        lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record("ann", 4), record("ann", 8)]
