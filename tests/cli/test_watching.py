"""predict --watch and predict -: the network stays loaded, images come one by one."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from iirsnn import FusedLIF
from iirsnn.cli.watching import Latencies, appearing, named
from iirsnn.errors import RunError, UsageError
from iirsnn.event import EventNetwork
from tests.conftest import assert_one_line
from tests.event.networks import integers

NAMES = ["shoe", "coat", "bag"]
SUMMARY = re.compile(r"\d+ images?: p50 [\d.]+ ms, p95 [\d.]+ ms, p99 [\d.]+ ms")


@pytest.fixture
def net(tmp_path):
    model = integers(
        *(nn.Conv2d(1, 4, 3, padding=1), FusedLIF(channels=4)),
        *(nn.Flatten(), nn.Linear(256, 3)),
        image_shape=(1, 8, 8),
    )
    network = EventNetwork.from_model(model)
    network.notes.update(class_names=NAMES, images={"mean": [0.25], "std": [0.5]})
    network.save(tmp_path / "net.iirsnn")
    return tmp_path / "net.iirsnn"


def image(path, seed=0):
    pixels = np.random.default_rng(seed).integers(256, size=(8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def class_of(net, path):
    from iirsnn.train.deployment import read_image

    network = EventNetwork.load(net)
    return NAMES[int(network(read_image(path, network)).argmax())]


class Predicting:
    """`iirsnn predict` in a process of its own, whose lines are collected as they come."""

    def __init__(self, *arguments):
        code = "from iirsnn.cli import main\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "predict", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
            # what starts the tests in the background may have it ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.lines, self.errors = [], []
        for stream, kept in (
            (self.process.stdout, self.lines),
            (self.process.stderr, self.errors),
        ):
            threading.Thread(target=lambda s=stream, k=kept: k.extend(s), daemon=True).start()

    def until(self, there, seconds=60):
        end = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, self.errors
            assert time.monotonic() < end, (self.lines, self.errors)
            time.sleep(0.01)

    def end(self, how):
        if how == "stdin":
            self.process.stdin.close()
        else:
            self.process.send_signal(how)
        assert self.process.wait(60) == 0, self.errors
        end = time.monotonic() + 10
        while not self.lines or not SUMMARY.fullmatch(self.lines[-1].strip()):
            assert time.monotonic() < end, self.lines
            time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_folder_is_watched(tmp_path, net, how):
    folder = tmp_path / "images"
    folder.mkdir()
    image(folder / "old.png")
    (folder / "notes.txt").write_text("no image")
    predicting = Predicting(net, "--watch", folder)
    predicting.until(lambda: predicting.errors)
    assert predicting.errors.pop() == f"watching {folder}\n"
    new = image(folder / "new.png", 1)
    predicting.until(lambda: any("new.png" in line for line in predicting.lines))
    (folder / "bad.png").write_bytes(b"no image at all")
    Image.new("L", (8, 9)).save(folder / "tall.png")
    predicting.until(lambda: len(predicting.errors) == 2)
    image(folder / "after.png", 2)
    predicting.until(lambda: any("after.png" in line for line in predicting.lines))
    predicting.end(how)
    *lines, summary = (line.rstrip("\n") for line in predicting.lines)
    assert SUMMARY.fullmatch(summary)
    rows = {line.split("\t")[0]: line.split("\t")[1:] for line in lines}
    assert int(summary.split()[0]) == len(lines) == len(rows)
    assert str(folder / "old.png") not in rows
    name, odds, took = rows[str(new)]
    assert name == class_of(net, new)
    assert odds.endswith("%")
    assert float(took.removesuffix(" ms")) > 0
    tall, bad = sorted(predicting.errors, key=lambda line: "bad.png" in line)
    assert tall == f"error: image {folder}/tall.png: expected 8 x 8 pixels, got 9 x 8\n"
    assert bad.startswith(f"error: image {folder}/bad.png: cannot be read")


def test_paths_on_stdin(tmp_path, net):
    predicting = Predicting(net, "-")
    first, second = image(tmp_path / "a b.png", 1), image(tmp_path / "c.png", 2)
    predicting.process.stdin.write(f"{first}\n\n{tmp_path}/none.png\n{second}\n")
    predicting.end("stdin")
    rows = [line.split("\t") for line in predicting.lines[:-1]]
    assert [row[:2] for row in rows] == [[str(p), class_of(net, p)] for p in (first, second)]
    assert predicting.lines[-1].startswith("2 images: p50 ")
    assert predicting.errors == [f"error: image {tmp_path}/none.png: no such file\n"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_no_encoding_has(tmp_path, net, encoding):
    name = b"caf\xe9 \xe2\x98\x83.png"  # Latin-1, and a snowman in UTF-8
    image(tmp_path / "a.png").rename(tmp_path / os.fsdecode(name))
    done = subprocess.run(
        [sys.executable, "-m", "iirsnn", "predict", str(net), "-"],
        input=bytes(tmp_path) + b"/" + name + b"\n",
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\udce9" in done.stdout
    assert b"\n1 image: " in done.stdout


def test_a_closed_stdin_names_nothing():
    assert list(named(None, str)) == []


def test_what_is_asked_for_is_one_thing(iirsnn, net, tmp_path):
    image(tmp_path / "x.png")
    for arguments in ([], ["x.png", "--watch", "."], ["-", "--watch", "."]):
        assert_one_line(iirsnn("predict", net, *arguments), 2, "expected IMAGE..., - or --watch")
    assert_one_line(iirsnn("predict", net, "--watch", "none"), 2, "--watch none: expected a folder")
    assert_one_line(iirsnn("predict", net, "--watch", "x.png"), 2, "expected a folder")


# ---- When a file is whole ----


def next_of(watched, seconds=10):
    """What comes next, while another thread may write."""
    found = []
    thread = threading.Thread(target=lambda: found.append(next(watched)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "nothing came"
    return found[0]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A watched folder whose files are whole once they end in `end`."""
    monkeypatch.setattr("iirsnn.cli.watching.PATIENCE", 0.5)

    def read(path):
        content = path.read_text()
        if not content.endswith("end"):
            raise RunError(f"image {path}: truncated")
        if "tall" in content:
            raise UsageError(f"image {path}: tall")
        return content

    return appearing(tmp_path, (".png",), read)


def test_a_file_that_grows_slowly_is_read_when_it_is_whole(tmp_path, watched):
    file = tmp_path / "slow.PNG"
    file.write_text("")

    def grow():
        for _ in range(10):
            time.sleep(0.1)  # longer than a look at the folder, shorter than its patience
            with file.open("a") as stream:
                stream.write("x")
        with file.open("a") as stream:
            stream.write("end")

    threading.Thread(target=grow, daemon=True).start()
    assert next_of(watched) == (file, "x" * 10 + "end")


def test_a_file_that_is_never_whole_is_an_error_once(tmp_path, watched):
    (tmp_path / "half.png").write_text("x")
    path, error = next_of(watched)
    assert path.name == "half.png"
    assert isinstance(error, RunError)
    (tmp_path / "next.png").write_text("end")
    assert next_of(watched)[0].name == "next.png"
    (tmp_path / "half.png").write_text("x and the end")
    assert next_of(watched) == (tmp_path / "half.png", "x and the end")


def test_files_that_are_renamed_written_anew_or_gone(tmp_path, watched):
    (tmp_path / ".hidden.png").write_text("end")
    (tmp_path / "other.txt").write_text("end")
    (tmp_path / "moved.tmp").write_text("moved end")
    (tmp_path / "moved.tmp").rename(tmp_path / "moved.png")
    assert next_of(watched) == (tmp_path / "moved.png", "moved end")
    (tmp_path / "moved.png").write_text("new end")
    assert next_of(watched) == (tmp_path / "moved.png", "new end")
    (tmp_path / "gone.png").write_text("end")
    (tmp_path / "gone.png").unlink()
    (tmp_path / "tall.png").write_text("tall end")
    path, error = next_of(watched)
    assert path.name == "tall.png"
    assert isinstance(error, UsageError)
    (tmp_path / "tall.png").unlink()


def test_a_stream_goes_on_after_an_error(tmp_path):
    def read(path):
        if path.name == "bad":
            raise RunError("bad")
        return path.name

    found = [given for _, given in named(["a\n", "\n", "bad\r\n", "b c"], read)]
    assert [found[0], found[2]] == ["a", "b c"]
    assert str(found[1]) == "bad"


def test_latencies():
    latencies = Latencies()
    assert str(latencies) == "no images"
    latencies.add(0.001)
    assert str(latencies) == "1 image: p50 1.000 ms, p95 1.000 ms, p99 1.000 ms"
    for milliseconds in torch.randperm(999).tolist():
        latencies.add((milliseconds + 2) / 1e3)
    assert str(latencies) == "1000 images: p50 500.000 ms, p95 950.000 ms, p99 990.000 ms"
