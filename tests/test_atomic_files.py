"""Files written whole or not at all, and files that are none."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from iirsnn import atomic_files
from iirsnn.errors import RunError


@contextmanager
def files_of_at_most(size):
    """A full disk, as far as this process can tell: a write beyond `size` bytes fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def some_tensors():
    torch.manual_seed(0)
    return {
        "weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "bias": torch.randn(4, requires_grad=True),
        "step": torch.tensor(7.0),
        "half": torch.randn(5).bfloat16(),
        "view": torch.arange(12)[::3],
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "some.safetensors"
    atomic_files.save(path, some_tensors(), {"stage": "T1", "accuracy": 0.1 + 0.2})
    return path


def test_what_is_saved_is_loaded(saved):
    tensors, header = atomic_files.load(saved)
    assert header == {"format": atomic_files.FORMAT, "stage": "T1", "accuracy": 0.1 + 0.2}
    assert tensors.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name].dtype == value.dtype
    assert os.listdir(saved.parent) == [saved.name]


def test_the_mode_is_that_of_the_users_other_files(saved):
    plain = saved.with_name("plain")
    plain.write_text("")
    assert saved.stat().st_mode == plain.stat().st_mode


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved):
    before = saved.read_bytes()
    large = {"weight": torch.zeros(100_000)}
    with files_of_at_most(50_000), pytest.raises(RunError, match=r"some\.safetensors: cannot be"):
        atomic_files.save(saved, large, {})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("path", [".", ".."])
def test_a_folder_is_not_written_over(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"cannot be written .*got a folder"):
        atomic_files.save(Path(path), some_tensors(), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["_sync", "os.replace"])
def test_a_failure_after_the_write_leaves_the_old_file_and_nothing_else(
    saved, monkeypatch, function
):
    def fail(*arguments):
        raise OSError(5, "Input/output error")

    before = saved.read_bytes()
    owner, name = (os, "replace") if function == "os.replace" else (atomic_files, function)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(RunError, match="cannot be written"):
            atomic_files.save(saved, some_tensors(), {})
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_what_a_kill_leaves_behind_is_overwritten(saved):
    class Killed(BaseException):
        pass

    def half_written(temporary):
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            atomic_files.write_atomically(saved, half_written)
    assert len(os.listdir(saved.parent)) == 2
    atomic_files.load(saved)
    atomic_files.save(saved, some_tensors(), {})
    assert os.listdir(saved.parent) == [saved.name]


def test_two_that_write_one_file_wait_for_each_other(tmp_path):
    path = tmp_path / "table"
    started, go_on = threading.Event(), threading.Event()
    order = []

    def slow(temporary):
        Path(temporary).write_text("half")
        started.set()
        assert go_on.wait(60)
        Path(temporary).write_text("first")
        order.append("first")

    def second(temporary):
        Path(temporary).write_text("second")
        order.append("second")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(atomic_files.write_atomically, path, slow)
        assert started.wait(60)
        after = pool.submit(atomic_files.write_atomically, path, second)
        with pytest.raises(TimeoutError):
            after.result(0.2)
        assert not path.exists()
        go_on.set()
        first.result(60)
        after.result(60)
    assert order == ["first", "second"]
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["table"]


def test_a_child_of_a_writer_that_fails_keeps_nobody_waiting(tmp_path):
    children = []

    def fails(temporary):
        children.append(os.fork())
        if children[0] == 0:  # it has the descriptor of the lock too
            signal.pause()
            os._exit(0)
        raise KeyboardInterrupt

    path = tmp_path / "text"
    try:
        with pytest.raises(KeyboardInterrupt):
            atomic_files.write_atomically(path, fails)
        atomic_files.write_text(path, "text")
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)
    assert path.read_text() == "text"


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path):
    path, other = tmp_path / "text", tmp_path / "other"
    other.write_text("other")
    (tmp_path / ".text.tmp").symlink_to(other)
    with pytest.raises(RunError, match="cannot be written"):
        atomic_files.write_text(path, "text")
    assert other.read_text() == "other"
    assert not path.exists()


def test_processes_that_write_one_file(tmp_path):
    path = tmp_path / "table"
    program = (
        "import sys; from pathlib import Path; from iirsnn.atomic_files import write_text\n"
        "for _ in range(200): write_text(Path(sys.argv[1]), sys.argv[2] * 5000)"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(path), word], stderr=subprocess.PIPE)
        for word in ("one ", "two ")
    ]
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert path.read_text() in ("one " * 5000, "two " * 5000)
    assert os.listdir(tmp_path) == ["table"]


def test_what_another_user_left_behind_is_removed(tmp_path, monkeypatch):
    """Their file cannot be opened for writing; the folder is ours."""
    path, left = tmp_path / "table", tmp_path / ".table.tmp"
    left.write_text("left")
    theirs, real = left.stat().st_ino, os.open

    def opened(file, *arguments):
        if Path(file).exists() and os.stat(file).st_ino == theirs:
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments)

    held = left.open()  # so that the number of their file is not given again
    with held, monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        atomic_files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["table"]


def test_text_is_written_whole(tmp_path):
    path = tmp_path / "text"
    atomic_files.write_text(path, "old µ\n")
    with files_of_at_most(1000), pytest.raises(RunError, match="cannot be written"):
        atomic_files.write_text(path, "x" * 10_000)
    assert path.read_text(encoding="utf-8") == "old µ\n"
    assert os.listdir(tmp_path) == ["text"]


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(RunError, match="cannot be written"):
            atomic_files.save(folder / "x.safetensors", some_tensors(), {})


def test_a_device_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(RunError, match="expected a file or nothing there"):
        atomic_files.write_text(path, "text")
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file(tmp_path):
    with pytest.raises(RunError, match=r"checkpoint .*none\.safetensors: no such file"):
        atomic_files.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_files(saved, keep):
    whole = saved.read_bytes()
    length = int(len(whole) * keep) if isinstance(keep, float) else keep
    saved.write_bytes(whole[:length])
    with pytest.raises(RunError, match=r"checkpoint .*: truncated or no checkpoint"):
        atomic_files.load(saved)


def test_a_changed_bit_is_noticed(saved):
    whole = saved.read_bytes()
    content = int.from_bytes(whole[:8], "little") + 8  # where the tensors begin
    for position in (content, (content + len(whole)) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[position] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(atomic_files.Damaged, match="its content is not what was written"):
            atomic_files.load(saved)


def test_the_one_before_is_kept(tmp_path):
    path, previous = tmp_path / "last", tmp_path / "previous"
    for number in range(3):
        atomic_files.save(path, some_tensors(), {"number": number}, previous=previous)
    assert [atomic_files.load(file)[1]["number"] for file in (path, previous)] == [2, 1]
    large = {"weight": torch.zeros(100_000)}
    with files_of_at_most(50_000), pytest.raises(RunError, match="cannot be written"):
        atomic_files.save(path, large, {}, previous=previous)
    assert [atomic_files.load(file)[1]["number"] for file in (path, previous)] == [2, 1]
    assert sorted(os.listdir(tmp_path)) == ["last", "previous"]


@pytest.mark.parametrize("content", [b"hello", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" * 20])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "other.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match="truncated or no checkpoint"):
        atomic_files.load(path)


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(RunError, match="checkpoint "):
        atomic_files.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_somebody_else(tmp_path, metadata):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(RunError, match="a safetensors file, but not one of iirsnn's"):
        atomic_files.load(path)


@pytest.mark.parametrize("header", ["{", "3", "{}", "null"])
def test_a_header_that_is_none(tmp_path, header):
    path = tmp_path / "damaged.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"iirsnn": header})
    with pytest.raises(RunError, match="truncated or no checkpoint"):
        atomic_files.load(path)


def test_a_format_that_is_no_number(tmp_path):
    path = tmp_path / "damaged.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"iirsnn": '{"format": "new"}'})
    with pytest.raises(atomic_files.Damaged, match="expected a format, got 'new'"):
        atomic_files.load(path)


def test_a_newer_format(tmp_path):
    path = tmp_path / "newer.safetensors"
    newer = atomic_files.FORMAT + 1
    save_file({"weight": torch.zeros(3)}, path, {"iirsnn": json.dumps({"format": newer})})
    with pytest.raises(RunError, match=f"expected format 2 or older, got {newer}; a newer iirsnn"):
        atomic_files.load(path)


def test_any_bit_that_turned_is_seen(saved):
    """In the header and in the tensors: the checksum is of all bytes."""
    content = saved.read_bytes()
    for at in range(0, len(content), 3):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        with pytest.raises(RunError):
            atomic_files.from_bytes(bytes(changed))


def test_files_of_format_1_are_read(tmp_path):
    """Their checksum, of the tensors alone, stands in the header."""
    path, tensors = tmp_path / "old.safetensors", {"weight": torch.arange(3.0)}
    value = zlib.crc32(tensors["weight"].numpy().tobytes())
    for checksum in (value, value + 1):
        save_file(tensors, path, {"iirsnn": json.dumps({"format": 1, "crc32": checksum, "x": 2})})
        if checksum == value:
            assert atomic_files.load(path)[1] == {"format": 1, "x": 2}
        else:
            with pytest.raises(RunError, match="its content is not what was written"):
                atomic_files.load(path)


def test_a_file_without_the_checksum_of_its_format(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"iirsnn": '{"format": 2}'})
    with pytest.raises(RunError, match="expected a checksum, got none"):
        atomic_files.load(path)
