"""Tables: which runs they make, what these share, and going on after a stop or a failure."""

import io
import json
import os
import signal
import threading

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from iirsnn.errors import UsageError
from iirsnn.train import device, pipeline, table_of_runs
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stage_inputs import digest, stage_inputs
from iirsnn.train.stage_training import StageTraining

#: A run in under a second.
TINY = {
    "data.batch_size": 512,
    "model.layers": [4, "A"],
    "model.hidden": [8],
    "ann.epochs": 1,
    "snn.epochs": 1,
    "stages.T1.epochs": 1,
    "runtime.threads": 1,
    "runtime.device": "cpu",
}
ROWS = [
    {"name": "both", "set": {"timesteps": [2, 1]}, "reason": "the method"},
    {"name": "slow", "set": {"timesteps": [2, 1], "stages.T1.epochs": 2}, "reason": "longer"},
    {"name": "direct", "set": {"timesteps": [1]}},
]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps({"base": "digits", "seeds": [0], "set": TINY, "rows": ROWS}))
    return file


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def trained(monkeypatch):
    """The (row/seed, stage) pairs that were trained, in order."""
    stages = []
    train = Pipeline.train_stage

    def recorded(self, stage, console, stop=None):
        path = self.folder.path
        stages.append((f"{path.parent.name}/{path.name}", stage.name))
        train(self, stage, console, stop)

    monkeypatch.setattr(pipeline.Pipeline, "train_stage", recorded)
    return stages


def quiet():
    return Console(file=io.StringIO(), color_system=None)


def plan(table, tmp_path, **options):
    return table_of_runs.plan(table_of_runs.load(str(table)), tmp_path / "out", **options)


def test_runs_of_a_table(table, tmp_path):
    runs = plan(table, tmp_path, seeds=[0, 3], overrides=["snn.epochs=5"])
    assert [run.label for run in runs] == [
        *["both/seed0", "slow/seed0", "direct/seed0"],
        *["both/seed3", "slow/seed3", "direct/seed3"],
    ]
    last = runs[-1]
    assert last.path == tmp_path / "out" / "direct" / "seed3"
    assert (last.recipe.name, last.recipe.seed, last.recipe.timesteps) == ("direct", 3, [1])
    assert last.recipe.model.layers == [4, "A"]
    assert last.recipe.snn.epochs == 5
    assert [run.label for run in plan(table, tmp_path, only=["slow"])] == ["slow/seed0"]


def test_rows_share_the_stages_they_have_in_common(iirsnn, table, tmp_path, trained):
    result = iirsnn("reproduce", table, "--out", "out")
    assert result.code == 0
    assert trained == [
        *[("both/seed0", "ann"), ("both/seed0", "T2"), ("both/seed0", "T1")],
        *[("slow/seed0", "T1"), ("direct/seed0", "T1")],
    ]
    assert "longer" in result.out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [group["name"] for group in found["groups"]] == ["both", "slow", "direct"]
    assert found["groups"][0]["reason"] == "the method"

    both, slow = (RunFolder.read(tmp_path / "out" / row / "seed0") for row in ("both", "slow"))
    assert slow.result("T2") == {"copied_from": "both/seed0", **both.result("T2")}
    assert "copied_from" not in slow.result("T1")
    weights = [load_file(f.path / "stages/T2/best.safetensors") for f in (both, slow)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [r["stage"] for r in slow.metrics()] == ["ann", "T2", "T1", "T1"]

    # each is an ordinary run, equal to one trained on its own
    assert iirsnn("evaluate", tmp_path / "out" / "slow" / "seed0").code == 0
    alone = RunFolder.create(tmp_path / "alone", slow.recipe)
    Pipeline(alone, pipeline.open_data(slow.recipe)).train(quiet())
    assert alone.result("T1")["test_accuracy"] == slow.result("T1")["test_accuracy"]
    assert alone.result("T1")["additions"] == slow.result("T1")["additions"]

    trained.clear()
    assert iirsnn("reproduce", table, "--out", "out").code == 0
    assert trained == []


def test_rows_may_differ_in_precision(table, tmp_path):
    """As those of the CIFAR tables do."""
    for precision in ("fp32", "bf16", "fp32"):
        (run,) = plan(table, tmp_path, only=["both"], overrides=[f"runtime.precision={precision}"])
        with device.autocast(torch.device("cpu"), run.recipe.runtime.precision):
            logits = nn.Linear(2, 3)(torch.zeros(1, 2))
        assert logits.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_a_stopped_table_goes_on(iirsnn, table, tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        recorded = Pipeline.train_stage

        def interrupted(self, stage, console, stop=None):
            if stage.name == "T1":
                raise KeyboardInterrupt
            recorded(self, stage, console, stop)

        patch.setattr(Pipeline, "train_stage", interrupted)
        runs = plan(table, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            table_of_runs.train(runs, tmp_path / "out", quiet())
    assert trained == [("both/seed0", "ann"), ("both/seed0", "T2")]
    trained.clear()
    assert iirsnn("reproduce", table, "--out", "out").code == 0
    assert trained == [("both/seed0", "T1"), ("slow/seed0", "T1"), ("direct/seed0", "T1")]


def test_a_signal_saves_and_ends_with_code_0(iirsnn, table, tmp_path, trained, monkeypatch):
    """SIGTERM in the first epoch of T2: the epoch's step is saved, no other row is begun."""
    epoch = ["--set", "data.batch_size=64"]
    begun = StageTraining._step

    def interrupted(self, *arguments):
        begun(self, *arguments)
        if self.stage.name == "T2":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StageTraining, "_step", interrupted)
        result = iirsnn("reproduce", table, "--out", "out", *epoch)
    assert result.code == 0
    assert "SIGTERM: stopped, both/seed0 is saved; the same command goes on" in result.out
    assert trained == [("both/seed0", "ann"), ("both/seed0", "T2")]
    assert RunFolder.read(tmp_path / "out/both/seed0").has_checkpoint("T2", "last")
    assert iirsnn("reproduce", table, "--out", "out", *epoch).code == 0
    assert trained[2:4] == [("both/seed0", "T2"), ("both/seed0", "T1")]


def test_a_row_that_fails_does_not_stop_the_others(iirsnn, table, tmp_path, monkeypatch):
    recorded = Pipeline.train_stage

    def failing(self, stage, console, stop=None):
        if stage.name == "T2":
            raise RuntimeError("out of\nmemory")
        recorded(self, stage, console, stop)

    monkeypatch.setattr(Pipeline, "train_stage", failing)
    result = iirsnn("reproduce", table, "--out", "out", "--seeds", "0,1")
    assert result.code == 1
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: 2 of the table's runs failed: both/seed0, stage T2: Runtime")
    assert (
        "slow/seed0: left out, both/seed0, stage T2" in result.out
    )  # the same T2: not tried again
    for seed in (0, 1):
        assert RunFolder.read(tmp_path / f"out/direct/seed{seed}").result("T1") is not None
    assert (tmp_path / "out" / "compare.json").exists()


def test_what_another_process_trains_is_waited_for(table, tmp_path, trained, monkeypatch):
    """`direct` can be trained meanwhile, `both` and `slow` come when the lock is free."""
    runs, out = plan(table, tmp_path), tmp_path / "out"
    table_of_runs.train([runs[2]], out, quiet())
    trained.clear()
    other = FileLock(out / ".locks" / digest(stage_inputs(runs[0].recipe, "T2")))
    other.acquire()
    waits = []

    def wait():  # not time.sleep, which threads of libraries call as well
        waits.append(list(trained))
        other.release()

    monkeypatch.setattr(table_of_runs, "wait", wait)
    third = plan(table, tmp_path, only=["direct"], seeds=[1])
    table_of_runs.train([*runs[:2], *third], out, quiet())
    # two looks in vain, then the work that is free, then a wait
    assert waits == [[("direct/seed1", "ann"), ("direct/seed1", "T1")]]
    assert trained[2:] == [("both/seed0", "T2"), ("both/seed0", "T1"), ("slow/seed0", "T1")]


def test_a_folder_in_use_is_waited_for(table, tmp_path, trained, monkeypatch):
    """As after the result of a stage, before its process has let go of the folder."""
    (run, *_), out = plan(table, tmp_path), tmp_path / "out"
    owner = RunFolder.create(run.path, run.recipe)
    monkeypatch.setattr(table_of_runs, "wait", owner.close)
    assert table_of_runs.train([run], out, quiet()) == []
    assert trained == [("both/seed0", stage) for stage in ("ann", "T2", "T1")]


def test_two_processes_share_a_table(table, tmp_path, trained):
    """Threads stand for processes: a FileLock of another object excludes both alike."""
    runs, out = plan(table, tmp_path, seeds=[0, 1]), tmp_path / "out"
    workers = [
        threading.Thread(target=table_of_runs.train, args=(runs, out, quiet())) for _ in "ab"
    ]
    table_of_runs.POLL_SECONDS, before = 0.05, table_of_runs.POLL_SECONDS
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        table_of_runs.POLL_SECONDS = before
    assert len(trained) == len(set(trained)) == 10
    for run in runs:
        assert RunFolder.read(run.path).result("T1") is not None


def test_a_folder_of_another_recipe_is_not_taken(iirsnn, table, tmp_path):
    assert iirsnn("reproduce", table, "--out", "out", "--only", "both").code == 0
    result = iirsnn("reproduce", table, "--out", "out", "--set", "ann.epochs=2", "--only", "both")
    assert result.code == 1
    assert "both/seed0: was started with another recipe: ann.epochs is 1 there and 2" in result.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "expected at least one row and one seed"),
        ({"seeds": []}, "expected at least one row and one seed"),
        ({"rows": [ROWS[0], ROWS[0]]}, "expected names of rows to differ"),
        ({"rows": [{"name": "a/b"}]}, "name of a row: expected the name of a folder, .* 'a/b'"),
        ({"rows": [{"name": ".."}]}, "name of a row: expected the name of a folder, .* '..'"),
        ({"name": "../x"}, "name: expected the name of a folder, no path, got '../x'"),
        ({"nothing": 1}, "Key 'nothing' not in 'TableConfig'"),
        ({"rows": [{"name": "a", "set": {"nothing": 1}}]}, "row a: .*Key 'nothing'"),
        ({"base": "nothing"}, "row both: recipe: expected one of"),
    ],
)
def test_tables_that_are_none(tmp_path, change, message):
    content = {"base": "digits", "seeds": [0], "rows": ROWS, **change}
    (tmp_path / "bad.yaml").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        plan(tmp_path / "bad.yaml", tmp_path)


def test_a_table_that_cannot_be_read(iirsnn, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x81")
    result = iirsnn("reproduce", "binary.yaml")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "table binary.yaml: cannot be read" in result.err


def test_bad_arguments(iirsnn, table, monkeypatch):
    for arguments, part in (
        (["nowhere"], "table: expected one of "),
        ([table, "--only", "other"], "only: expected rows among both, slow, direct, got 'other'"),
        ([table, "--seeds", "a"], "seeds: expected whole numbers like 0,1,2, got 'a'"),
    ):
        result = iirsnn("reproduce", *arguments)
        assert result.code == 2
        assert part in result.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = iirsnn("reproduce", table)
    assert result.code == 2
    assert "expected one process" in result.err


@pytest.mark.parametrize("name", table_of_runs.names())
def test_tables_that_ship(name, tmp_path):
    table = table_of_runs.load(name)
    runs = table_of_runs.plan(table, tmp_path)
    assert len(runs) == len(table.rows) * len(table.seeds)
    keys = [digest(stage_inputs(r.recipe, f"T{r.recipe.timesteps[-1]}")) for r in runs]
    assert len(set(keys)) == len(keys)  # no row is another one
    assert all(row.reason for row in table.rows)
