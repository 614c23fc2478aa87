"""A run killed at any moment ends in the same bits."""

import random
import time

from rich.console import Console

from iirsnn import atomic_files
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.run_folder import RunFolder
from tests.processes import new_event, start
from tests.train.tiny_runs import assert_same_outcome, tiny, tiny_splits

KILLS = 20


def train(path, started):
    """Train the run in a folder to its end, from wherever it is; a checkpoint after each step."""
    atomic_files._sync = lambda path: None
    begun = (path / "recipe.yaml").exists()
    started.set()
    with RunFolder.resume(path) if begun else RunFolder.create(path, tiny()) as folder:
        Pipeline(folder, tiny_splits()).train(Console(quiet=True))


def started(path):
    """A process that is about to train."""
    event = new_event()
    process = start(train, path, event, log=path.with_suffix(".log"))
    assert event.wait(120)
    return process


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    process = started(tmp_path / "whole")
    begin = time.monotonic()
    process.join(120)
    assert process.exitcode == 0
    seconds = time.monotonic() - begin  # of a whole run
    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        path = tmp_path / str(runs)
        runs += 1
        code = None
        while code != 0:
            process = started(path)
            process.join(rng.uniform(0, seconds) if kills < KILLS else None)
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            code = process.exitcode
            assert code in (0, -9), path.with_suffix(".log").read_text()
        assert_same_outcome(path, tmp_path / "whole")
