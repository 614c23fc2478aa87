"""Many processes: the run of one process, whatever their number, and one message if it ends."""

import copy
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF, atomic_files, cli
from iirsnn.errors import RunError
from iirsnn.ops.backend import has_kernels
from iirsnn.train import data, device, pipeline
from iirsnn.train.data import DataConfig
from iirsnn.train.processes import Processes
from iirsnn.train.stage_training import StageTraining
from tests.processes import join, printed, start_many
from tests.train.tiny_runs import TINY, outcome, steps_done, tiny, tiny_splits

#: Of one process and several: gradients are summed in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
NO_DROPOUT = ("ann.dropout=0", "snn.dropout=0")


def command(event, *arguments):
    """`iirsnn ARGUMENTS` on the images of `tiny_splits`, without a report.

    event: None, or (rank, stage, step, signal): what that process gets after that step; an error
    where the signal is None.
    """
    pipeline.open_data = lambda recipe: tiny_splits()
    cli.train.write_report = lambda folder, splits: print("report")
    atomic_files._sync = lambda path: None
    step = StageTraining._step

    def step_then_event(training, *batch):
        step(training, *batch)
        rank, stage, number, signal_number = event
        here = (training.processes.rank, training.stage.name, training.progress.step)
        if here == (rank, stage, number):
            if signal_number is None:
                raise RunError("the network card is on fire")
            os.kill(os.getpid(), signal_number)

    if event is not None:
        StageTraining._step = step_then_event
    sys.argv = ["iirsnn", *map(str, arguments)]
    cli.main()


def train(path, *settings, count, event=None):
    """Start or resume a run with `count` processes; their exit codes and what they printed."""
    recipe = path.parent / "tiny.yaml"
    recipe.write_text(TINY)
    options = [argument for setting in settings for argument in ("--set", setting)]
    target = ("--resume", path) if path.exists() else (recipe, "--out", path)
    logs = path.with_name(path.name + "-logs")
    processes = start_many(command, event, "train", *target, *options, count=count, logs=logs)
    codes = join(processes)
    text = printed(logs)
    shutil.rmtree(logs)
    return codes, text


def finish(path, *settings, count):
    codes, text = train(path, *settings, count=count)
    assert codes == [0] * count, text
    assert text.endswith("report\n")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(*settings, count): the folder of a finished run, made once."""
    made = {}

    def finished(*settings, count):
        if (settings, count) not in made:
            path = tmp_path_factory.mktemp("whole") / "run"
            made[settings, count] = finish(path, *settings, count=count)
        return made[settings, count]

    return finished


def assert_close(path, expected_path):
    """The same stages, epochs and choices; losses and weights up to rounding."""
    (found, metrics), (expected, expected_metrics) = outcome(path), outcome(expected_path)
    assert found.keys() == expected.keys()
    for stage, (tensors, header, _) in expected.items():
        assert found[stage][1] == header
        torch.testing.assert_close(found[stage][0], tensors, **ROUNDING)
    for record, wanted in zip(metrics, expected_metrics, strict=True):
        assert record.pop("stage") == wanted.pop("stage")
        assert record == pytest.approx(wanted, rel=ROUNDING["rtol"])


def assert_same_weights(path, expected_path):
    """The same bits in every stage."""
    found, expected = outcome(path)[0], outcome(expected_path)[0]
    assert found.keys() == expected.keys()
    for stage, (tensors, *_) in expected.items():
        for name, value in tensors.items():
            assert torch.equal(found[stage][0][name], value), f"{stage}: {name}"


@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (2, []),
        (2, ["model.batch_norm=false", "snn.accumulate=3", "data.batch_size=5"]),
        (3, ["data.batch_size=7"]),  # the last batch has 2 images
    ],
)
def test_several_processes_make_the_run_of_one(tmp_path, whole, count, settings):
    one = whole(*NO_DROPOUT, *settings, count=1)
    many = whole(*NO_DROPOUT, *settings, count=count)
    assert_close(many, one)
    assert '"processes": 1' in (one / "stages" / "T1" / "result.json").read_text()
    assert f'"processes": {count}' in (many / "stages" / "T1" / "result.json").read_text()


@pytest.mark.parametrize(
    ("count", "rank", "number"),
    [(1, 0, signal.SIGTERM), (1, 0, signal.SIGINT), (3, 2, signal.SIGTERM)],
)
def test_a_signal_saves_and_ends_without_an_error(tmp_path, whole, count, rank, number):
    path = tmp_path / "my run"
    settings = ["runtime.checkpoint_minutes=5"]
    codes, text = train(path, *settings, count=count, event=(rank, "T2", 3, number))
    assert codes == [0] * count, text
    who = number.name if rank == 0 else "a signal"
    command = f"iirsnn train --resume '{path}'"
    line = f"stopped by {who} in stage T2 after step 3 of 4; go on with: {command}\n"
    assert text.count("stopped") == 1
    assert text.endswith(line) if count == 1 else "in stage T2 after step 3 of 4; go on" in text
    assert steps_done(path / "stages" / "T2" / "last.safetensors") == 3
    finish(path, count=count)
    assert_same_weights(path, whole(count=count))


@pytest.mark.parametrize(("rank", "then"), [(1, 2), (0, 1)])
def test_a_process_killed_stops_all_and_the_run_goes_on(tmp_path, whole, rank, then):
    path = tmp_path / "run"
    event = (rank, "T2", 3, signal.SIGKILL)
    codes, text = train(path, *NO_DROPOUT, count=2, event=event)
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 1
    assert text.count("another process of this run ended before its time") == 1
    assert f"go on with: iirsnn train --resume {path}\n" in text
    assert "Traceback" not in text
    finish(path, count=then)
    if then == 2:
        assert_same_weights(path, whole(*NO_DROPOUT, count=2))
    else:
        assert_close(path, whole(*NO_DROPOUT, count=2))


def test_a_run_goes_on_with_more_processes(tmp_path, whole):
    path = tmp_path / "run"
    codes, text = train(path, *NO_DROPOUT, count=1, event=(0, "T2", 1, signal.SIGTERM))
    assert codes == [0], text
    finish(path, count=2)
    assert_close(path, whole(*NO_DROPOUT, count=1))


def test_an_error_of_one_process_is_the_one_message(tmp_path):
    path = tmp_path / "run"
    codes, text = train(path, count=2, event=(1, "ann", 2, None))
    assert codes == [1, 1]
    assert text == "error: the network card is on fire\n"


def test_bad_input_is_one_message(tmp_path):
    codes, text = train(tmp_path / "run", "ann.epochs=0", count=2)
    assert codes == [2, 2]
    assert text.count("error: ") == 1
    assert "ann: epochs: expected a value at least 1, got 0" in text
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    logs = tmp_path / "logs"
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "thesis"
    processes = start_many(command, None, "train", recipe, "--out", out, count=2, logs=logs)
    codes, text = join(processes), printed(logs)
    assert codes[0] == 2
    assert codes[1] != 0
    assert text.count("error: ") == text.count("\n") == 1
    assert "thesis: is not empty and holds no run" in text


def batch_norm():
    """In each of the processes: synchronised BatchNorm against one over the whole batch."""
    processes = Processes(device.choose(tiny().runtime))
    for shape, kind in (
        ((5, 3, 4, 2), nn.BatchNorm2d),
        ((5, 3), nn.BatchNorm1d),
        ((5, 3, 2, 2, 2), nn.BatchNorm3d),
    ):
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(shape, generator=generator) * 3 + 7 for _ in range(2))
        results = []
        for synchronised in (False, True):
            torch.manual_seed(1 + processes.rank * synchronised)  # process 0 decides
            norm = nn.Sequential(kind(3))
            nn.init.normal_(norm[0].weight)
            part = slice(None)
            if synchronised:
                processes.synchronise(norm)
                part = slice(
                    *(i * 5 // processes.count for i in (processes.rank, processes.rank + 1))
                )
            here = x[part].clone().requires_grad_()
            for _ in range(2):
                y = norm(here)
            (y * g[part]).sum().backward()
            for p in norm.parameters():
                p.grad *= processes.count if synchronised else 1
            if synchronised:
                processes.average_gradients(norm.parameters())
            norm.eval()
            results.append((y, here.grad, norm(x), norm[0].weight.grad, norm[0].bias.grad, part))
        (y, grad, *rest, _), (y_here, grad_here, *rest_here, part) = results
        torch.testing.assert_close(y_here, y[part])
        torch.testing.assert_close(grad_here, grad[part], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rest_here, rest)
    exchanged_norms(processes)


def exchanged_norms(processes):
    """A BatchNormLIF takes the statistics of all processes, in its kernels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, 5, 5, generator=generator) * 3 + 7
    for affine in (True, False):
        parts = nn.BatchNorm2d(6, affine=affine), FusedLIF(0.7, 0.8)
        whole, here = BatchNormLIF(*copy.deepcopy(parts)), BatchNormLIF(*parts)
        processes.synchronise(here)
        mine = slice(2 * processes.rank, 2 * processes.rank + 2)
        leaf = x[:, mine].clone().requires_grad_()
        s = here(leaf)
        assert torch.equal(s, whole(x)[:, mine])
        torch.testing.assert_close(dict(here.named_buffers()), dict(whole.named_buffers()))
        if has_kernels("cpu"):
            assert type(s.grad_fn).__name__ == "_SynchronisedBackward"


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path):
    processes = start_many(batch_norm, count=2, logs=tmp_path / "logs")
    assert join(processes) == [0, 0], printed(tmp_path / "logs")


def test_one_process_alone_needs_no_others():
    alone = Processes()
    assert (alone.main, alone.share) == (True, (0, 1))
    assert alone.first(lambda: 3) == alone.in_turn(lambda: 3) == 3
    assert alone.any(True, False) == [True, False]
    assert alone.gather("x") == ["x"]
    network = SimpleNamespace()
    alone.synchronise(network)  # not even looked at


@pytest.mark.parametrize("count", [2, 3, 5])
def test_shares_of_training_batches_make_up_the_batch(count):
    splits, config = tiny_splits(), DataConfig(batch_size=7)
    options = {"seed": 3, "epoch": 1}
    whole = list(data.train_batches(splits, config, **options))
    assert [len(labels) for _, labels in whole] == data.batch_sizes(16, 7) == [7, 7, 2]
    shares = [
        list(data.train_batches(splits, config, **options, share=(rank, count)))
        for rank in range(count)
    ]
    for index, (images, labels) in enumerate(whole):
        parts = [share[index] for share in shares]
        bounds = [data.part(len(labels), (rank, count)) for rank in range(count)]
        parts = [
            (x[: last - first], y[: last - first])
            for (x, y), (first, last) in zip(parts, bounds, strict=True)
        ]
        assert torch.equal(torch.cat([part for part, _ in parts]), images)
        assert torch.equal(torch.cat([part for _, part in parts]), labels)
        sizes = [len(part) for _, part in parts]
        assert max(sizes) - min(sizes) <= 1
    later = data.train_batches(splits, config, **options, share=(1, count), start_batch=2)
    assert [len(labels) for _, labels in later] == [len(shares[1][2][1])]


@pytest.mark.parametrize("count", [2, 4])
def test_shares_of_evaluated_images_have_each_once(count):
    splits, config = tiny_splits(), DataConfig(test_batch_size=2)
    whole = [images for images, _ in data.eval_batches(splits.test, config)]
    shares = [list(data.eval_batches(splits.test, config, (rank, count))) for rank in range(count)]
    for index, images in enumerate(whole):
        assert torch.equal(shares[index % count][index // count][0], images)
    assert sum(map(len, shares)) == len(whole)


@pytest.mark.parametrize(
    ("images", "size", "sizes"),
    [(16, 8, [8, 8]), (17, 8, [8, 8]), (18, 8, [8, 8, 2]), (3, 8, [3]), (1, 8, [])],
)
def test_batch_sizes(images, size, sizes):
    assert data.batch_sizes(images, size) == sizes
