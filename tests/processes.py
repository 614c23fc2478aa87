"""Processes for the tests, forked from a server that has torch imported: they start at once."""

import contextlib
import multiprocessing
import os
from pathlib import Path

from torch.distributed import TCPStore

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["iirsnn.cli.train", "tests.train.test_stage_training"])
_stores = []


def new_event():
    """An event that a process of `start` can set."""
    return _context.Event()


def start(function, *arguments, log, **environment):
    """A process that runs function(*arguments), with what it prints in the file `log`."""
    process = _context.Process(target=_run, args=(function, arguments, str(log), environment))
    process.start()
    return process


def start_many(function, *arguments, count, logs):
    """`count` processes of one run, as torchrun would start them; LOGS/RANK is what each prints."""
    logs.mkdir(exist_ok=True)
    # as with torchrun, the store outlives every process of the run
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    shared = {
        "WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    return [
        start(function, *arguments, log=logs / str(rank), RANK=rank, LOCAL_RANK=rank, **shared)
        for rank in range(count)
    ]


def join(processes):
    """The exit codes of processes that end by themselves."""
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


def printed(logs):
    """What the processes of a run have printed, all together."""
    return "".join(log.read_text() for log in sorted(Path(logs).iterdir()))


def _run(function, arguments, log, environment):
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with (
        open(1, "w", closefd=False) as out,
        open(2, "w", closefd=False) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        function(*arguments)
