"""What several test files share: a small recipe, the command line, a finished run."""

import os
import random
import shutil
import sys
import zlib
from types import SimpleNamespace

import numpy
import pytest
import torch

os.environ.setdefault("IIRSNN_CALIBRATE", "0")  # the tests measure nothing and cache nothing

#: Settings that make a run of seconds out of the digits recipe. One thread: bit for bit everywhere.
QUICK = [
    "timesteps=[2,1]",
    "data.batch_size=128",
    "model.layers=[8,A,16]",
    "model.hidden=[32]",
    "ann.epochs=4",
    "snn.epochs=1",
    "snn.learning_rate=0.01",
    "stages.T1.epochs=2",
    "runtime.threads=1",
    "runtime.device=cpu",
]


def pytest_collection_modifyitems(items):
    """Files that take longest come first, so that several processes end together."""
    first = "kernels", "ptx", "train", "test_wheel.py"
    items.sort(key=lambda item: not {item.path.parent.name, item.path.name}.intersection(first))


@pytest.fixture(autouse=True)
def seeded(request):
    """Every test draws the same numbers in any order and on any worker: those of its own name."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def command(*arguments, cwd=None):
    """`iirsnn ARGUMENTS` as a person would type it: its exit code, its stdout and its stderr."""
    from iirsnn import cli

    capture = pytest.MonkeyPatch()
    threads = torch.get_num_threads()
    folder = os.getcwd()
    with capture.context() as patch:
        patch.setattr(sys, "argv", ["iirsnn", *map(str, arguments)])
        code = 0
        try:
            if cwd is not None:
                os.chdir(cwd)
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)
    return code


@pytest.fixture
def iirsnn(capsys, tmp_path):
    """The command line, run in an empty folder: iirsnn(*arguments) -> code, out, err."""

    def run(*arguments, cwd=tmp_path):
        capsys.readouterr()
        code = command(*arguments, cwd=cwd)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


def contents(folder):
    """Every file of a run but its lock, and what is in it."""
    return {
        file.relative_to(folder): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def assert_one_line(result, code, *parts):
    """What `iirsnn` returned is an error, one line with these parts in it."""
    assert result.code == code
    lines = (result.out + result.err).strip().splitlines()
    assert len(lines) == 1, result.out + result.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def quick():
    """The digits recipe, cut down to a run of seconds."""
    from iirsnn.train import recipe

    return recipe.load("digits", QUICK)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished quick run. Not to be changed: see `finished_copy`."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = [argument for setting in QUICK for argument in ("--set", setting)]
    assert command("train", "digits", *settings, "--out", folder) == 0
    return folder


@pytest.fixture
def finished_copy(finished, tmp_path):
    """A finished quick run of the test's own."""
    return shutil.copytree(finished, tmp_path / "finished")
