"""A build that opens no files: IIRSNN_FILES=OFF of CMake."""

import subprocess

import numpy as np
import pytest

from iirsnn import runtime
from tests.native.toolchain import HOST, kernels
from tests.runtime.test_network import saved, vgg
from tests.runtime.test_processors import CSRC, FLAGS, HERE

SOURCES = [CSRC / "event" / "c_interface.cpp", CSRC / "event" / "file" / "tensors.cpp"]


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The program, linked with the engine; what has files in it is compiled without."""
    folder = tmp_path_factory.mktemp("board")
    made = kernels(HOST, engine=True).items()
    objects = [path for source, path in made if source not in SOURCES]
    for source in SOURCES:
        objects.append(folder / f"{source.stem}.o")
        command = [HOST.compiler, "-std=c++17", "-O1", "-DIIRSNN_NO_FILES", f"-I{CSRC}"]
        subprocess.run([*command, "-c", source, "-o", objects[-1]], check=True)
        needed = subprocess.run(["nm", "-u", objects[-1]], capture_output=True, text=True).stdout
        assert not {"open", "open64", "fopen", "mmap", "stat"} & {*needed.split()}
    subprocess.run(["cc", *FLAGS, "-c", HERE / "board.c", "-o", folder / "board.o"], check=True)
    linked = [HOST.compiler, "-s", folder / "board.o", *objects, *HOST.link]
    subprocess.run([*linked, "-o", folder / "board"], check=True)
    return folder / "board"


def run(board, content):
    return subprocess.run([board], input=content, capture_output=True)


def test_a_network_in_memory_gives_the_same_bits(board, tmp_path):
    model, x = vgg()
    saved(tmp_path / "net", model, x)
    done = run(board, (tmp_path / "net").read_bytes())
    assert done.stderr == b"built without files: expected iirsnn_load_memory\n"
    white = np.ones((1, *x.shape[1:]), np.float32)
    expected = runtime.load(tmp_path / "net")(white)[0]
    assert [float.fromhex(line.decode()) for line in done.stdout.split()] == expected.tolist()


def test_the_program_is_smaller_than_a_megabyte(board):
    assert board.stat().st_size < 1_000_000


def test_bytes_that_are_no_network(board, tmp_path):
    done = run(board, b"PK\x03\x04" * 20)
    assert done.returncode == 1
    assert done.stderr.endswith(b"board: expected a checksum, got none\n")
