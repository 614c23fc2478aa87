"""A run as a whole: what each stage starts from, and what is measured."""

import pytest
import torch

from iirsnn import FusedLIF
from iirsnn.conversion import convert
from iirsnn.errors import RunError, UsageError
from iirsnn.measure.evaluation import accuracies, count_operations
from iirsnn.nn import neurons
from iirsnn.train import recipe
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder


@pytest.fixture
def pipeline(finished):
    folder = RunFolder.read(finished)
    threads = torch.get_num_threads()
    yield Pipeline(folder, open_data(folder.recipe))
    torch.set_num_threads(threads)


def test_a_stage_starts_from_all_of_the_one_before(pipeline):
    stage = pipeline.stages[-1]
    initial, parent = pipeline.initial(stage), pipeline.trained("T2")
    assert (stage.name, initial.timesteps, parent.timesteps) == ("T1", 1, 2)
    assert initial.state_dict().keys() == parent.state_dict().keys()
    for name, value in parent.state_dict().items():
        assert torch.equal(initial.state_dict()[name], value), name
    trained_at = [neuron.threshold.item() for neuron in neurons(pipeline.converted(2))]
    assert [neuron.threshold.item() for neuron in neurons(initial)] != trained_at


def test_the_first_spiking_stage_starts_from_the_converted_ann(pipeline):
    initial = pipeline.initial(pipeline.stages[1])
    images = pipeline.calibration_images(pipeline.recipe.conversion.images)
    expected = convert(pipeline.trained("ann"), images, timesteps=2)
    assert initial.timesteps == 2
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(initial.state_dict()[name], value)


def test_thresholds_are_balanced_at_the_timesteps_and_by_the_rule_asked_for(pipeline):
    conversion = pipeline.recipe.conversion
    conversion.percentile, conversion.scale, conversion.images = 70.0, 0.5, 33
    images = pipeline.calibration_images(33)
    for timesteps in (1, 4):
        expected = neurons(convert(pipeline.trained("ann"), images, 70, 0.5, timesteps=timesteps))
        converted = pipeline.converted(timesteps)
        assert converted.timesteps == timesteps
        assert [n.threshold.item() for n in neurons(converted)] == pytest.approx(
            [n.threshold.item() for n in expected]
        )


def test_calibration_images_are_training_images_and_the_same_in_every_call(pipeline):
    images = pipeline.calibration_images(20)
    assert images.shape == (20, 1, 8, 8)
    assert torch.equal(images, pipeline.calibration_images(20))
    train = torch.stack([image for image, _ in map(pipeline.splits.train.__getitem__, range(1293))])
    assert all((train == image).all((1, 2, 3)).any() for image in images)
    assert not torch.equal(images, pipeline.test_images(20))


def test_results_are_those_of_the_checkpoints(pipeline):
    test = [pipeline.splits.test[i] for i in range(len(pipeline.splits.test))]
    images = torch.stack([image for image, _ in test])
    labels = torch.tensor([label for _, label in test])
    for stage in pipeline.stages:
        result = pipeline.folder.result(stage.name)
        network = pipeline.trained(stage.name)
        assert [result["test_accuracy"]] == accuracies([network], [(images, labels)], "cpu")
        if stage.timesteps is None:
            assert result["spike_rates"] == []
            continue
        converted = pipeline.converted(stage.timesteps)
        assert [result["converted_without_retraining_accuracy"]] == accuracies(
            [converted], [(images, labels)], "cpu"
        )
        counted = count_operations(network, images)
        assert result["timesteps"] == stage.timesteps
        assert result["spike_rates"] == pytest.approx(counted.spike_rates)
        assert result["additions"] == pytest.approx(counted.additions)
        assert result["energy_uj"] == pytest.approx(counted.energy_uj)


def test_anns_operations_are_those_of_its_folded_network(pipeline):
    convolutions = 9 * (1 * 8 * 64 + 8 * 16 * 16)
    linear = 16 * 16 * 32 + 32 * 10
    result = pipeline.folder.result("ann")
    assert (result["multiplications"], result["additions"]) == (convolutions + linear, 0)
    assert result["energy_uj"] == pytest.approx((convolutions + linear) * 4.6e-6)


def test_networks_have_the_memory_format_of_the_recipe(pipeline):
    network = pipeline.trained("T1")
    weight = network.layers[3].weight
    assert isinstance(network.layers[1], FusedLIF)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_training_beats_chance_and_conversion_alone(pipeline):
    result = pipeline.folder.result("T1")
    assert pipeline.folder.result("ann")["test_accuracy"] > 0.6
    assert result["test_accuracy"] > 0.3
    assert result["test_accuracy"] > result["converted_without_retraining_accuracy"] + 0.1


def test_a_stage_that_is_not_trained_yet(tmp_path, quick):
    with RunFolder.create(tmp_path, quick) as folder:
        pipeline = Pipeline(folder, open_data(quick))
        with pytest.raises(RunError, match=r"stages/T2/best\.safetensors: no such file"):
            pipeline.trained("T2")


def test_the_checkpoint_of_another_network(finished_copy):
    with RunFolder.resume(finished_copy) as folder:
        pipeline = Pipeline(folder, open_data(folder.recipe))
        tensors, header = folder.load_checkpoint("T1", "best")
        del tensors["layers.0.weight"]
        folder.save_checkpoint("T1", "best", tensors, header)
        with pytest.raises(RunError, match=r"checkpoint: of another network .*layers\.0\.weight"):
            pipeline.trained("T1")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (["data.name=mnist"], UsageError, "data.name: expected one of digits, .*, got 'mnist'"),
        (["model.layers=[]"], UsageError, "layers: expected a convolution's channels first"),
        (["model.layers=[4,A,A,A,A]"], UsageError, "4 pools are too many for images of 8 x 8"),
        (["model.pool=median"], UsageError, "pool: expected one of average, max"),
        (["neuron.surrogate_scale=0"], UsageError, "surrogate_scale: expected .*, got 0.0"),
        (["neuron.backend=abacus"], UsageError, "backend: expected one of .*, got 'abacus'"),
        (["neuron.backend=cuda"], UsageError, "backend: expected one that can run, got 'cuda'"),
        (["seed=-1"], UsageError, "seed: expected from 0"),
        (["data.validation=0"], UsageError, "data.validation"),
        (
            ["data.name=cifar10", "data.root=nowhere", "data.download=false"],
            RunError,
            "cifar10: no folder cifar-10-batches-py in nowhere",
        ),
    ],
)
def test_recipes_that_cannot_run(settings, kind, message, tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    bad = recipe.parse(recipe.dump(quick), settings, source="test")
    with pytest.raises(kind, match=message) as error:
        open_data(bad)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
