"""Recipes: what ships is complete and sound, what is wrong is one line."""

import dataclasses

import pytest

from iirsnn.errors import UsageError
from iirsnn.models import build
from iirsnn.train import recipe
from iirsnn.train.data import DataConfig
from iirsnn.train.recipe import Recipe

SHAPES = {
    "digits": (10, (1, 8, 8)),
    "fashion-mnist": (10, (1, 28, 28)),
    "cifar10": (10, (3, 32, 32)),
    "cifar100": (100, (3, 32, 32)),
    "imagenet": (1000, (3, 224, 224)),
    "folder": (22, (3, 32, 32)),  # clipart
}


def test_the_recipes_of_the_main_jobs_ship():
    assert {"digits", "fashion-mnist"} <= set(recipe.names())


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_survive_dump_and_parse(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    again = recipe.parse(recipe.dump(loaded), source="dump")
    assert again == loaded
    assert recipe.dump(again) == recipe.dump(loaded)
    assert isinstance(again.stage_config("T1"), recipe.StageConfig)
    assert isinstance(again.data, DataConfig)


@pytest.mark.parametrize("name", recipe.names())
def test_shipped_recipes_describe_networks(name):
    import torch

    loaded = recipe.load(name)
    with torch.device("meta"):
        build(loaded.model, *SHAPES[loaded.data.name])


def test_defaults_are_the_papers():
    default = Recipe()
    assert default.timesteps == [5, 4, 3, 2, 1]
    assert (default.conversion.percentile, default.conversion.scale) == (90.0, 1.0)
    assert default.conversion.images == 512
    ann, snn = default.ann, default.stage_config("T3")
    assert (ann.optimizer, ann.learning_rate, ann.momentum) == ("sgd", 1e-2, 0.9)
    assert (ann.weight_decay, ann.decay, ann.milestones) == (5e-4, 5.0, [0.45, 0.7, 0.9])
    assert (snn.optimizer, snn.learning_rate, snn.weight_decay) == ("adam", 1e-4, 0.0)
    assert (snn.decay, snn.milestones, snn.dropout) == (5.0, [0.6, 0.8, 0.9], 0.2)
    neuron = default.neuron
    assert (neuron.leak, neuron.learn_threshold, neuron.learn_leak) == (1.0, True, True)
    assert (neuron.reset, neuron.detach_reset, neuron.surrogate) == ("soft", True, "triangle")


def test_overrides_change_their_value_and_nothing_else():
    base = recipe.load("digits")
    changed = recipe.load(
        "digits", ["seed=3", "snn.learning_rate=2e-3", "model.layers=[4,A]", "timesteps=[4,2]"]
    )
    expected = dataclasses.replace(
        base,
        seed=3,
        timesteps=[4, 2],
        snn=dataclasses.replace(base.snn, learning_rate=2e-3),
        model=dataclasses.replace(base.model, layers=[4, "A"]),
    )
    assert changed == expected


def test_a_stage_has_the_settings_of_snn_but_for_its_own():
    loaded = recipe.load("digits", ["snn.epochs=7", "stages.T1.epochs=9", "stages.T2.decay=2"])
    assert loaded.stage_config("T5") == loaded.snn
    assert loaded.stage_config("T1") == dataclasses.replace(loaded.snn, epochs=9)
    assert loaded.stage_config("T2") == dataclasses.replace(loaded.snn, decay=2.0)
    assert loaded.stage_config("ann") == loaded.ann


def test_settings_of_a_stage_survive_a_list_without_it():
    assert recipe.load("digits", ["timesteps=[5,3]"]).timesteps == [5, 3]


def test_a_recipe_from_a_file_is_named_after_it(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: {layers: [8, A]}\n")
    assert recipe.load(str(file)).name == "mine"
    file.write_text("name: theirs\nmodel: {layers: [8, A]}\n")
    assert recipe.load(str(file)).name == "theirs"


def test_flatten_names_every_leaf():
    flat = recipe.flatten(recipe.load("digits"))
    assert flat["ann.learning_rate"] == 0.05
    assert flat["stages.T1.epochs"] == 20
    assert flat["model.layers"] == [32, 64, "A", 128, "A"]
    assert not any(isinstance(value, dict) for value in flat.values())


@pytest.mark.parametrize("name", ["digit", "", "recipes/digits", "missing.yaml", "digits.yaml"])
def test_unknown_recipes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"recipe: expected one of .*digits.*, or a \.yaml file"):
        recipe.load(name)


def test_a_recipe_that_cannot_be_read(tmp_path):
    file = tmp_path / "binary.yaml"
    file.write_bytes(b"\x80\x81")
    with pytest.raises(UsageError, match=r"recipe .*binary\.yaml: cannot be read"):
        recipe.load(str(file))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("nothing=1", "Key 'nothing' not in 'Recipe'"),
        ("data.nothing=1", "Key 'nothing' not in 'DataConfig'"),
        ("stages.T1.nothing=1", "Key 'nothing' not in 'StageConfig'"),
        ("stages.ann.epochs=1", "stages: expected T1, T2, ..., got 'ann'"),
        ("stages.T0.epochs=1", "stages: expected T1, T2, ..., got 'T0'"),
        ("seed", "--set: expected key=value, got 'seed'"),
        ("=5", "Key '' not in 'Recipe'"),
        ("[=3", "recipe digits: "),
        ("snn.teacher=me", "T5: teacher: expected one of none, ann, previous, got 'me'"),
        ("ann.teacher=previous", "ann: teacher: expected none, as the first, got 'previous'"),
        ("ann.energy_weight=1", "ann: energy_weight: expected 0, got 1.0: no spikes"),
        ("snn.energy_weight=-1", "T5: energy_weight: expected a value at least 0, got -1.0"),
        ("snn.neuron_rate=-1", "T5: neuron_rate: expected a value at least 0, got -1.0"),
        ("ann.mixup=-1", "ann: mixup: expected a value at least 0, got -1.0"),
        ("snn.teacher_weight=2", r"T5: teacher_weight: expected a value in \[0, 1\], got 2.0"),
        ("snn.teacher_temperature=0", "T5: teacher_temperature: expected a value positive, got 0"),
        # wrong types
        ("seed=x", "Value 'x' of type 'str' could not be converted to Integer"),
        ("seed=", "Incompatible value 'None'"),
        ("ann.epochs=1.5", "could not be converted to Integer"),
        ("ann.learning_rate=fast", "could not be converted to Float"),
        ("timesteps=5", "Invalid value assigned"),
        ("timesteps=[2.5]", "could not be converted to Integer"),
        ("stages.T1=3", "Cannot assign int"),
        ("stages=[1]", "recipe digits: "),
        ("model.layers={}", "recipe digits: "),
        ("model.layers=[1.5]", "incompatible with type hint"),
        ("model.layers=[a", "while parsing a flow sequence"),
        ("data=3", "Merge error"),
        ("seed=${nothing}", "Interpolation key 'nothing' not found"),
        # out of range
        ("timesteps=[]", "timesteps: expected each T to be at least 1"),
        ("timesteps=[5,0]", "timesteps: expected each T to be at least 1"),
        ("timesteps=[1,2]", "timesteps: expected a strictly decreasing list"),
        ("conversion.percentile=0", r"conversion.percentile: expected a value in \(0, 100\]"),
        ("conversion.percentile=101", "conversion.percentile: .*, got 101"),
        ("conversion.scale=0", "conversion.scale: expected a value positive, got 0"),
        ("conversion.scale=-0.3", "conversion.scale"),
        ("conversion.images=0", "conversion.images"),
        ("neuron.leak=1.5", r"neuron.leak: expected a value in \[0, 1\], got 1.5"),
        ("neuron.reset=later", "neuron.reset: expected one of soft, .*, got 'later'"),
        ("neuron.surrogate=step", "neuron.surrogate: expected one of .*, got 'step'"),
        ("model.name=resnet", "model.name: expected one of vgg, .*, got 'resnet'"),
        ("ann.learning_rate=0", "ann: learning_rate: expected a value positive, got 0.0"),
        ("snn.learning_rate=-1e-3", "T5: learning_rate: expected a value positive"),
        ("stages.T1.learning_rate=0", "T1: learning_rate: expected a value positive"),
        ("ann.learning_rate=nan", "ann: learning_rate"),
        ("ann.learning_rate=inf", "ann: learning_rate"),
        ("ann.epochs=0", "ann: epochs: expected a value at least 1, got 0"),
        ("ann.accumulate=0", "ann: accumulate"),
        ("ann.decay=0", "ann: decay"),
        ("ann.momentum=1", "ann: momentum"),
        ("ann.weight_decay=-1", "ann: weight_decay"),
        ("ann.label_smoothing=2", "ann: label_smoothing"),
        ("snn.dropout=1", r"T5: dropout: expected a value in \[0, 1\), got 1.0"),
        ("ann.milestones=[0.5,1]", "ann: milestones"),
        ("ann.optimizer=lion", "ann: optimizer: expected one of sgd, adam, got 'lion'"),
        ("ann.schedule=steps", "ann: schedule: expected one of step, cosine"),
        ("runtime.device=tpu", "runtime.device: expected one of auto, cpu"),
        ("runtime.allocator=mine", "runtime.allocator: expected one of retain, system"),
        ("runtime.precision=int4", "runtime.precision: expected one of fp32, bf16, fp16"),
        ("runtime.threads=-1", "runtime.threads"),
        ("runtime.checkpoint_minutes=-1", "runtime.checkpoint_minutes"),
    ],
)
def test_bad_settings_are_one_line(override, message):
    with pytest.raises(UsageError, match=message) as error:
        recipe.load("digits", [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["- 1\n- 2", "3", "a: [", "\t", "seed: 1\nseed: 2", "hello"])
def test_text_that_is_no_recipe_is_one_line(text):
    with pytest.raises(UsageError, match="recipe here: ") as error:
        recipe.parse(text, source="here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", ".hidden", "a\\b", "a\nb"])
def test_a_name_leads_nowhere_else(name):
    with pytest.raises(UsageError, match=r"^name: expected the name of a folder, no path, got "):
        recipe.load("digits", [f"name={name!r}"])
    assert recipe.load("digits", ["name='my run'"]).name == "my run"
