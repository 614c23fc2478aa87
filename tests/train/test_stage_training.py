"""Training: the same bits whether or not it was killed, and no step into the void."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from iirsnn import SharedDropout, atomic_files
from iirsnn.conversion import to_spiking
from iirsnn.errors import RunError
from iirsnn.models import vgg
from iirsnn.nn import neurons
from iirsnn.train import data, pipeline, recipe
from iirsnn.train.data import Splits
from iirsnn.train.images import MemoryImages
from iirsnn.train.objective import Objective
from iirsnn.train.pipeline import Pipeline
from iirsnn.train.recipe import StageConfig
from iirsnn.train.run_folder import RunFolder
from iirsnn.train.schedule import make_optimizer, set_learning_rate
from iirsnn.train.seeds import derive_seed
from iirsnn.train.stage_training import StageTraining
from iirsnn.train.stopping import Stopped
from tests.conftest import QUICK, command
from tests.test_atomic_files import files_of_at_most

#: Five epochs of two steps with a checkpoint after each step, on images of `tiny_splits`.
TINY = """
name: tiny
timesteps: [2, 1]
data: {batch_size: 8, test_batch_size: 5}
model: {layers: [4, A, 6], hidden: [8]}
conversion: {images: 12}
ann: {epochs: 2, learning_rate: 0.05}
snn: {epochs: 2, learning_rate: 0.01}
stages: {T1: {epochs: 1}}
runtime: {threads: 1, device: cpu, checkpoint_minutes: 0}
"""


def tiny(*overrides):
    return recipe.parse(TINY, overrides, source="tiny")


def tiny_splits():
    """Three classes of noisy 1x4x4 images: 16 to train on, 9 for validation, 9 for the test."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(256, (3, 1, 4, 4), generator=generator)

    def part(count):
        labels = torch.arange(count) % 3
        noise = torch.randint(-90, 90, (count, 1, 4, 4), generator=generator)
        pixels = (patterns[labels] + noise).clamp(0, 255).to(torch.uint8)
        return MemoryImages(pixels, labels, [0.5], [0.3], pad=1, flip=True)

    return Splits(part(16), part(9), part(9), ["a", "b", "c"])


def train(path, settings=None):
    """Train the run in a folder to its end, from wherever it is."""
    started = (path / "recipe.yaml").exists()
    with RunFolder.resume(path) if started else RunFolder.create(path, settings) as folder:
        Pipeline(folder, tiny_splits()).train(Console(quiet=True))


def outcome(path):
    """All that a run is to repeat bit for bit: weights, accuracies, metrics."""
    timed = ("seconds", "images_per_second", "commit", "machine")

    def untimed(record):
        return {key: value for key, value in record.items() if key not in timed}

    found = {}
    for folder in sorted((path / "stages").iterdir()):
        tensors, header = atomic_files.load(folder / "best.safetensors")
        result = untimed(json.loads((folder / "result.json").read_text()))
        found[folder.name] = (tensors, header, result)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return found, [untimed(json.loads(line)) for line in lines]


def assert_same_outcome(path, expected_path):
    (found, metrics), (expected, expected_metrics) = outcome(path), outcome(expected_path)
    assert found.keys() == expected.keys()
    for stage, (tensors, header, result) in expected.items():
        assert found[stage][0].keys() == tensors.keys()
        for name, value in tensors.items():
            assert torch.equal(found[stage][0][name], value), f"{stage}: {name}"
        assert found[stage][1] == header
        assert found[stage][2] == result
    assert metrics == expected_metrics
    leftovers = [*path.rglob("*.tmp"), *path.rglob("last.*"), *path.rglob("previous.*")]
    assert not leftovers


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    """What is durable is of no interest here, only what is written, and in which order."""
    monkeypatch.setattr(atomic_files, "_sync", lambda path: None)


class Killed(BaseException):
    """What no code of the package may catch."""


def kill_after(patch, *places):
    """Trainings die after these (stage, step), once after each."""
    left, step = set(places), StageTraining._step

    def step_or_die(stage, *arguments):
        place = (stage.stage.name, stage.progress.step)
        if place in left:
            left.remove(place)
            raise Killed
        step(stage, *arguments)

    patch.setattr(StageTraining, "_step", step_or_die)


class Power:
    """Counts the writes of a run, and cuts it off in the middle of number `last`."""

    def __init__(self, monkeypatch, last=None):
        self.writes, self.last = [], last
        write, log = atomic_files.write_atomically, RunFolder.log

        def write_until_cut(path, write_to, previous=None):
            if self._cut(path.name):
                path.with_name(f".{path.name}.tmp").write_bytes(b"half")
                raise Killed
            if previous is not None and path.exists() and self._cut(previous.name):
                os.replace(path, previous)
                raise Killed
            write(path, write_to, previous)

        def log_until_cut(folder, record):
            if self._cut("log"):
                with (folder.path / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record)[:20])
                raise Killed
            log(folder, record)

        monkeypatch.setattr(atomic_files, "write_atomically", write_until_cut)
        monkeypatch.setattr(RunFolder, "log", log_until_cut)

    def _cut(self, name):
        self.writes.append(name)
        return len(self.writes) == self.last


@pytest.mark.parametrize("minutes", [0, 5])
def test_a_run_cut_off_at_any_write_ends_in_the_same_bits(tmp_path, monkeypatch, minutes):
    settings = tiny(f"runtime.checkpoint_minutes={minutes}")
    with monkeypatch.context() as patch:
        power = Power(patch)
        train(tmp_path / "whole", settings)
    writes = power.writes
    assert writes.count("log") == 5
    assert writes.count("last.safetensors") == (10 if minutes else 15)  # and around a validation
    assert writes.count("result.json") == 3
    first = writes.index("recipe.yaml") + 2  # a run without a recipe is none yet
    for number in range(first, len(writes) + 1):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            Power(patch, last=number)
            with pytest.raises(Killed):
                train(path, settings)
        train(path)
        assert_same_outcome(path, tmp_path / "whole")
        shutil.rmtree(path)


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


def test_another_seed_gives_another_network(tmp_path):
    train(tmp_path / "a", tiny())
    train(tmp_path / "b", tiny("seed=1"))
    with pytest.raises(AssertionError):
        assert_same_outcome(tmp_path / "a", tmp_path / "b")


#: Enough steps for a kill to hit the stage that it is meant for.
LONGER = [*QUICK, "ann.epochs=6", "snn.epochs=6", "runtime.checkpoint_minutes=0"]


def steps_done(file):
    """The step of a resume checkpoint, from one look at the file; 0 where there is none."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            metadata = json.loads(opened.read(size))["__metadata__"]["iirsnn"]
    except FileNotFoundError:
        return 0
    return json.loads(metadata)["progress"]["step"]


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


def test_choices_use_validation_and_the_test_set_is_read_once_a_stage(tmp_path, monkeypatch):
    splits, events, evaluate = tiny_splits(), [], data.eval_batches
    names = {id(splits.train): "training", id(splits.validation): "validation"}
    names[id(splits.test)] = "test"

    def eval_batches(dataset, *arguments):
        events.append(names[id(dataset)])
        return evaluate(dataset, *arguments)

    monkeypatch.setattr(data, "eval_batches", eval_batches)
    with RunFolder.create(tmp_path, tiny()) as folder:
        Pipeline(folder, splits).train(Console(quiet=True))
        assert events == [
            *["validation", "validation", "test"],
            *["validation", "validation", "test"],
            *["validation", "test"],
        ]
        for stage in ("ann", "T2", "T1"):
            accuracies = [r["validation_accuracy"] for r in folder.metrics() if r["stage"] == stage]
            result = folder.result(stage)
            assert result["validation_accuracy"] == max(accuracies)
            assert result["epoch"] == 1 + accuracies.index(max(accuracies))
            _, header = folder.load_checkpoint(stage, "best")
            assert header["epoch"] == result["epoch"]


def training_of(folder, name="T2"):
    """The training of a stage of a run whose stages before it are finished."""
    pipeline = Pipeline(folder, tiny_splits())
    (stage,) = [stage for stage in pipeline.stages if stage.name == name]
    network = pipeline.initial(stage)
    return StageTraining(network, stage, folder, pipeline.splits, pipeline.device)


@pytest.fixture
def with_ann(tmp_path):
    """An open tiny run whose ANN is finished."""
    with RunFolder.create(tmp_path / "run", tiny()) as folder:
        pipeline = Pipeline(folder, tiny_splits())
        pipeline.stages = pipeline.stages[:1]
        pipeline.train(Console(quiet=True))
        yield folder


@pytest.mark.parametrize(("large", "batch_size"), [(10**6, None), (100, 5)])
def test_calibration_images_that_are_large_go_in_batches(with_ann, large, batch_size, monkeypatch):
    sizes, balance = [], pipeline.balance_thresholds

    def balance_thresholds(*arguments, batch_size):
        sizes.append(batch_size)
        return balance(*arguments, batch_size=batch_size)

    monkeypatch.setattr(pipeline, "balance_thresholds", balance_thresholds)
    monkeypatch.setattr(pipeline, "LARGE", large)
    Pipeline(with_ann, tiny_splits()).converted(2)
    assert sizes == [batch_size]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(with_ann, monkeypatch):
    loss, calls = torch.nn.functional.cross_entropy, []

    def diverging(*arguments, **options):
        calls.append(1)
        return loss(*arguments, **options) * (1 if len(calls) < 5 else math.nan)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", diverging)
    last = with_ann.path / "stages" / "T2" / "last.safetensors"
    message = rf"stage T2, step 3: the loss is nan; the last good checkpoint is kept: {last}"
    with pytest.raises(RunError, match=message):
        training_of(with_ann).run(Console(quiet=True))
    tensors, header = atomic_files.load(last)
    assert header["progress"]["step"] == 2
    assert all(torch.isfinite(value).all() for value in tensors.values())
    monkeypatch.undo()
    assert training_of(with_ann).run(Console(quiet=True)).step == 4


def test_the_first_loss_that_is_not_finite_names_the_checkpoint_it_started_from(
    with_ann, monkeypatch
):
    loss = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda *a, **options: loss(*a, **options) * math.inf
    )
    with pytest.raises(RunError, match=r"stage T2, step 1: the loss is inf; .*that of stage ann"):
        training_of(with_ann).run(Console(quiet=True))
    assert not with_ann.has_checkpoint("T2", "last")
    assert with_ann.has_checkpoint("ann", "best")


@pytest.mark.parametrize(
    ("minutes", "message"),
    [(0, "step 1: the largest weight is nan"), (5, "step 2: the largest weight is nan")],
)
def test_weights_that_are_not_finite_are_never_saved(with_ann, minutes, message):
    with_ann.recipe.runtime.checkpoint_minutes = minutes
    stage = training_of(with_ann)
    bad_step = 1 if minutes == 0 else 2
    weight = stage.network.layers[-1].weight
    weight.register_hook(
        lambda grad: grad * math.nan if stage.progress.step == bad_step - 1 else grad
    )
    with pytest.raises(RunError, match=f"stage T2, {message}"):
        stage.run(Console(quiet=True))
    assert not with_ann.has_checkpoint("T2", "last")
    assert not with_ann.has_checkpoint("T2", "best")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def half_way(with_ann, monkeypatch):
    """A run stopped in its second stage, after step 3 of 4."""
    with monkeypatch.context() as patch:
        kill_after(patch, ("T2", 3))
        with pytest.raises(Killed):
            training_of(with_ann).run(Console(quiet=True))
    folder = with_ann.path / "stages" / "T2"
    return folder / "last.safetensors", folder / "previous.safetensors"


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: os.truncate(file, 0)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(with_ann, monkeypatch, damage, capsys):
    whole = training_of(with_ann)
    whole.run(Console(quiet=True))
    for file in (with_ann.path / "stages" / "T2").iterdir():
        file.unlink()
    last, previous = half_way(with_ann, monkeypatch)
    steps = [atomic_files.load(file)[1]["progress"]["step"] for file in (last, previous)]
    assert steps == [3, 2]
    damage(last)
    resumed = training_of(with_ann)
    assert resumed.progress.step == 2
    resumed.run(Console())
    assert capsys.readouterr().out.startswith(f"warning: checkpoint {last}: ")
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_two_damaged_checkpoints_stop_a_resumed_run(with_ann, monkeypatch, damage):
    files = half_way(with_ann, monkeypatch)
    for file in files:
        damage(file)
    before = [file.read_bytes() for file in files]
    with pytest.raises(RunError, match=r"checkpoint .*last\.safetensors: "):
        training_of(with_ann)
    assert [file.read_bytes() for file in files] == before


def test_a_full_disk_leaves_both_checkpoints(with_ann, monkeypatch):
    files = half_way(with_ann, monkeypatch)
    before = [file.read_bytes() for file in files]
    message = r"last\.safetensors: cannot be written \(.*File too large"
    with files_of_at_most(len(before[0]) // 2), pytest.raises(RunError, match=message):
        training_of(with_ann).run(Console(quiet=True))
    assert [file.read_bytes() for file in files] == before
    assert training_of(with_ann).run(Console(quiet=True)).step == 4


def test_thresholds_and_leaks_stay_in_range(with_ann):
    with_ann.recipe.snn.learning_rate = 0.5
    stage = training_of(with_ann)
    before = [neuron.leak.item() for neuron in neurons(stage.network)]
    stage.run(Console(quiet=True))
    leaks = [neuron.leak.item() for neuron in neurons(stage.network)]
    assert all(leak <= 1 for leak in leaks)
    assert leaks != before
    assert all(neuron.threshold.item() >= 1e-3 for neuron in neurons(stage.network))


def test_every_weight_of_the_spiking_network_is_trained(with_ann):
    stage = training_of(with_ann)
    before = {name: p.detach().clone() for name, p in stage.network.named_parameters()}
    stage.run(Console(quiet=True))
    for name, p in stage.network.named_parameters():
        if not name.endswith("leak"):  # which may want to be above 1
            assert not torch.equal(p, before[name]), name


def test_a_stage_has_its_own_dropout(tmp_path):
    settings = tiny("ann.dropout=0.3", "snn.dropout=0.1", "stages.T1.dropout=0")
    with RunFolder.create(tmp_path, settings) as folder:
        pipeline = Pipeline(folder, tiny_splits())
        for stage, expected in zip(pipeline.stages, (0.3, 0.1, 0.0), strict=True):
            ann = vgg([4, "A", 6], 3, (1, 4, 4), hidden=[8])
            network = ann if stage.timesteps is None else to_spiking(ann, stage.timesteps)
            StageTraining(network, stage, folder, pipeline.splits, pipeline.device)
            dropouts = [m for m in network.modules() if isinstance(m, SharedDropout)]
            assert [dropout.p for dropout in dropouts] == [expected] * 2


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(tmp_path, accumulate):
    networks = []
    for parts in (1, accumulate):
        settings = tiny(f"ann.accumulate={parts}", "ann.dropout=0", "model.batch_norm=false")
        with RunFolder.create(tmp_path / str(parts), settings) as folder:
            pipeline = Pipeline(folder, tiny_splits())
            stage = StageTraining(
                pipeline.initial(pipeline.stages[0]),
                pipeline.stages[0],
                folder,
                pipeline.splits,
                pipeline.device,
            )
            images, labels = next(iter(data.eval_batches(stage.splits.train, folder.recipe.data)))
            stage._step(images[:5], labels[:5], 0.0)
            networks.append(stage.network.state_dict())
    torch.testing.assert_close(networks[1], networks[0])
    assert stage.progress.seen == 5


@pytest.mark.parametrize(
    ("config", "rates"),
    [
        (
            StageConfig(learning_rate=1.0, milestones=[0.6, 0.8, 0.9], decay=5),
            {0: 1, 0.59: 1, 0.6: 0.2, 0.79: 0.2, 0.8: 0.04, 0.9: 0.008, 0.999: 0.008},
        ),
        (StageConfig(learning_rate=2.0, milestones=[]), {0: 2, 0.99: 2}),
        (
            StageConfig(learning_rate=2.0, schedule="cosine"),
            {0: 2, 0.25: 1 + math.sqrt(0.5), 0.5: 1, 0.75: 1 - math.sqrt(0.5)},
        ),
    ],
)
def test_learning_rates(config, rates):
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    optimizer = make_optimizer(network, config)
    for done, rate in rates.items():
        set_learning_rate(optimizer, config, done)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate] * 2)


def test_thresholds_and_leaks_may_have_a_rate_of_their_own():
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    config = StageConfig(learning_rate=0.5, neuron_rate=0.1, milestones=[0.5], decay=10)
    optimizer = make_optimizer(network, config)
    set_learning_rate(optimizer, config, 0.7)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for neuron in neurons(network) for p in neuron.parameters()}
    assert len(own) == 4
    for parameter, rate in rates.items():
        assert rate == pytest.approx(0.005 if parameter in own else 0.05)


def test_an_objective_is_the_labels_loss_and_the_teachers():
    torch.manual_seed(0)
    teacher = vgg([4], 3, (1, 4, 4), hidden=[8], batch_norm=True)
    config = StageConfig(label_smoothing=0.1, teacher_weight=0.3, teacher_temperature=4.0)
    images, labels, logits = (
        torch.randn(5, 1, 4, 4),
        torch.tensor([0, 1, 2, 0, 1]),
        torch.randn(5, 3),
    )
    loss = Objective(config, 3, teacher).loss(logits, images, labels)
    soft = (teacher.eval()(images).detach() / 4).softmax(1)
    distance = -(soft * (logits / 4).log_softmax(1)).sum(1).mean() * 16
    hard = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert loss.item() == pytest.approx((0.7 * hard + 0.3 * distance).item())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert Objective(config, 3).loss(logits, images, labels).item() == pytest.approx(hard.item())


def test_mixup_mixes_images_as_it_mixes_labels():
    torch.manual_seed(0)
    objective = Objective(StageConfig(mixup=1.0), 3)
    labels = torch.tensor([0, 1, 2, 0])
    images = torch.nn.functional.one_hot(labels, 4).float().view(4, 1, 2, 2)  # show their label
    mixed, targets = objective.targets(images, labels)
    assert torch.allclose(mixed.flatten(1)[:, :3], targets)
    assert ((targets > 0) & (targets < 1)).any()
    plain = Objective(StageConfig(), 3).targets(images, labels)
    assert plain[0] is images
    assert plain[1] is labels


def test_every_addition_to_the_method_at_once_reaches_every_neuron(tmp_path):
    settings = tiny(
        "neuron.per_channel=true",
        "neuron.keep_batch_norm=true",
        "snn.teacher=ann",
        "snn.energy_weight=0.5",
        "snn.mixup=0.2",
        "snn.accumulate=2",
        "stages.T1.teacher=previous",
    )
    train(tmp_path / "run", settings)
    result = json.loads((tmp_path / "run" / "stages" / "T1" / "result.json").read_text())
    assert 0 < result["additions"] < math.inf
    pipeline = Pipeline(RunFolder.read(tmp_path / "run"), tiny_splits())
    before, after = (pipeline.trained(name) for name in ("T2", "T1"))
    for first, last in zip(neurons(before), neurons(after), strict=True):
        assert first.threshold.shape == (first.channels,)
        assert not torch.equal(first.threshold, last.threshold)


def test_a_teacher_changes_what_is_learned(tmp_path):
    def trained(name, *settings):
        train(tmp_path / name, tiny(*settings))
        return Pipeline(RunFolder.read(tmp_path / name), tiny_splits()).trained("T1")

    networks = [
        trained("none"),
        trained("ann", "snn.teacher=ann"),
        trained("previous", "snn.teacher=ann", "stages.T1.teacher=previous"),
    ]
    weights = [network.layers[0].weight for network in networks]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_a_price_on_spikes_makes_fewer_of_them(tmp_path):
    additions = {}
    for weight in (0.0, 20.0):
        path = tmp_path / str(weight)
        train(path, tiny(f"snn.energy_weight={weight}", "snn.learning_rate=0.02"))
        result = json.loads((path / "stages" / "T1" / "result.json").read_text())
        additions[weight] = result["additions"]
    assert additions[20.0] < 0.8 * additions[0.0]
    path = tmp_path / "free"
    train(path, tiny("snn.energy_weight=20", "snn.energy_budget=50", "snn.learning_rate=0.02"))
    result = json.loads((path / "stages" / "T1" / "result.json").read_text())
    assert result["additions"] == additions[0.0]  # within the budget nothing is charged


def test_optimizers_are_the_papers():
    network = to_spiking(vgg([4], 3, (1, 4, 4), hidden=[8]), 2)
    adam = make_optimizer(network, StageConfig(weight_decay=0.1))
    assert isinstance(adam, torch.optim.Adam)
    assert all(group["amsgrad"] for group in adam.param_groups)
    sgd = make_optimizer(network, StageConfig(optimizer="sgd", momentum=0.8, weight_decay=0.1))
    assert isinstance(sgd, torch.optim.SGD)
    assert all(group["momentum"] == 0.8 for group in sgd.param_groups)
    for optimizer in (adam, sgd):
        decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        for neuron in neurons(network):
            assert decays.pop(id(neuron.threshold)) == decays.pop(id(neuron.leak)) == 0
        assert len(decays) == len([p for p in network.parameters() if p.dim()]) - 4
        assert set(decays.values()) == {0.1}


def test_seeds_depend_on_every_part():
    seeds = [derive_seed(0, "ann"), derive_seed(0, "T1"), derive_seed(1, "ann"), derive_seed(0)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "ann") == seeds[0]
