"""A run cut off anywhere ends in the same bits as one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from iirsnn import atomic_files
from iirsnn.train import data
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.stopping import Stopped
from tests.conftest import QUICK, command
from tests.train.tiny_runs import (
    Killed,
    assert_same_outcome,
    kill_after,
    steps_done,
    tiny,
    tiny_splits,
    train,
)

pytestmark = pytest.mark.usefixtures("no_waiting_for_disks")


class Power:
    """Counts the writes of a run, and cuts it off in the middle of number `last`.

    copies: a folder for what a cut would leave of `run` in the middle of each write, by its number.
    """

    def __init__(self, monkeypatch, last=None, run=None, copies=None):
        self.writes, self.last, self.run, self.copies = [], last, run, copies
        write, log = atomic_files.write_atomically, RunFolder.log

        def write_or_cut(path, write_to, previous=None):
            half = path.with_name(f".{path.name}.tmp")
            self._count(path.name, lambda place: place(half).write_bytes(b"half"))
            if previous is not None and path.exists():
                self._count(previous.name, lambda place: os.replace(place(path), place(previous)))
            write(path, write_to, previous)

        def log_or_cut(folder, record):
            def half(place):
                with place(folder.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record)[:20])

            self._count("log", half)
            log(folder, record)

        monkeypatch.setattr(atomic_files, "write_atomically", write_or_cut)
        monkeypatch.setattr(RunFolder, "log", log_or_cut)

    def _count(self, name, half):
        """half(place) does a part of the write; place(path) is where a file of the run lies."""
        self.writes.append(name)
        if len(self.writes) == self.last:
            half(lambda path: path)
            raise Killed
        if self.copies is not None:
            copy = self.copies / str(len(self.writes))
            shutil.copytree(self.run, copy)
            half(lambda path: copy / path.relative_to(self.run))


@pytest.mark.parametrize("minutes", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_cut_off_at_any_write_ends_in_the_same_bits(tmp_path, monkeypatch, minutes):
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    with monkeypatch.context() as patch:
        power = Power(patch, run=whole, copies=copies)
        train(whole, tiny(f"runtime.checkpoint_minutes={minutes}"))
    writes = power.writes
    assert writes.count("log") == 5
    assert writes.count("last.safetensors") == (10 if minutes else 15)  # and around a validation
    assert writes.count("result.json") == 3
    first = writes.index("recipe.yaml") + 2  # a run without a recipe is none yet
    for number in range(first, len(writes) + 1):
        train(copies / str(number))
        assert_same_outcome(copies / str(number), whole)


def test_a_run_cut_off_again_and_again_ends_in_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "whole", tiny())
    path, cuts = tmp_path / "cut", 0
    while True:
        with monkeypatch.context() as patch:
            Power(patch, last=5)  # rewinds the metrics, saves two or three steps, dies
            try:
                train(path, tiny())
                break
            except Killed:
                cuts += 1
    assert cuts >= 4
    assert_same_outcome(path, tmp_path / "whole")


@pytest.mark.parametrize(
    ("split", "where", "step"),
    [("validation", "in the validation after step 2 of 4", 2), ("test", "in its test", 4)],
)
def test_a_signal_in_a_validation_or_a_test_ends_it_between_two_batches(
    split, where, step, tmp_path, monkeypatch
):
    train(tmp_path / "whole", tiny())
    splits, path, read, evaluate = tiny_splits(), tmp_path / "run", [], data.eval_batches

    def eval_batches(dataset, *arguments):
        for batch in evaluate(dataset, *arguments):
            if dataset is getattr(splits, split):
                read.append(batch)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, RunFolder.create(path, tiny()) as folder:
        patch.setattr(data, "eval_batches", eval_batches)
        with pytest.raises(Stopped, match=f"^stopped by SIGTERM in stage ann {where}; go on with"):
            Pipeline(folder, splits).train(Console(quiet=True))
    assert len(read) == 1  # of two
    _, header = atomic_files.load(path / "stages" / "ann" / "last.safetensors")
    assert (header["progress"]["step"], header["progress"]["epochs"]) == (step, step // 4 * 2)
    train(path)
    assert_same_outcome(path, tmp_path / "whole")


def test_a_signal_while_operations_are_counted_ends_it(tmp_path, monkeypatch):
    def count_operations(network, images):
        os.kill(os.getpid(), signal.SIGTERM)
        network(images[:1])
        raise AssertionError("went on")

    monkeypatch.setattr("iirsnn.train.pipeline.count_operations", count_operations)
    with (
        RunFolder.create(tmp_path / "run", tiny()) as folder,
        pytest.raises(Stopped, match="in stage ann in its test"),
    ):
        Pipeline(folder, tiny_splits()).train(Console(quiet=True))


def test_a_checkpoint_without_a_number_of_epochs_goes_on(tmp_path, monkeypatch):
    train(tmp_path / "whole", tiny())
    with monkeypatch.context() as patch:
        kill_after(patch, ("ann", 3))
        with pytest.raises(Killed):
            train(tmp_path / "old", tiny())
    last = tmp_path / "old" / "stages" / "ann" / "last.safetensors"
    tensors, header = atomic_files.load(last)
    del header["progress"]["epochs"]
    atomic_files.save(last, tensors, header)
    train(tmp_path / "old")
    assert_same_outcome(tmp_path / "old", tmp_path / "whole")


#: Enough steps for a kill to hit the stage that it is meant for.
LONGER = [*QUICK, "ann.epochs=6", "snn.epochs=6", "runtime.checkpoint_minutes=0"]


def kill_at(arguments, file, step, log):
    """Start `python -m iirsnn train ...`, and kill -9 it once `file` has reached a step."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "iirsnn", "train", *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "80"},
        )
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if steps_done(file) >= step:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, log.read_text()


@pytest.mark.slow  # one killed at random moments is in tests/train/test_interruptions.py
def test_a_process_killed_twice_ends_in_the_same_bits(tmp_path):
    settings = [argument for setting in LONGER for argument in ("--set", setting)]
    run, whole = tmp_path / "run", tmp_path / "whole"
    ann, t2 = (run / "stages" / name / "last.safetensors" for name in ("ann", "T2"))
    log = tmp_path / "log"
    kill_at(["digits", *settings, "--out", run], ann, 8, log)
    assert any(ann.parent.glob("[lp]*.safetensors")), "killed within the first stage"
    assert not (run / "stages" / "ann" / "result.json").exists()
    kill_at(["--resume", run], t2, 10, log)
    assert any(t2.parent.glob("[lp]*.safetensors")), "killed within the second stage"
    assert not (run / "stages" / "T2" / "result.json").exists()
    assert command("train", "--resume", run) == 0
    assert command("train", "digits", *settings, "--out", whole) == 0
    assert_same_outcome(run, whole)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(tmp_path / "a", tiny())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "b")
    assert_same_outcome(tmp_path / "b", tmp_path / "a")
