"""Inputs of a stage: equal where the result is, different where a setting that matters differs."""

import pytest

from iirsnn.train import recipe
from iirsnn.train.stage_inputs import digest, run_inputs, stage_inputs


def key(stage, *settings):
    return digest(stage_inputs(recipe.load("digits", settings), stage))


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("seed=1", "ann"),
        ("data.validation=0.2", "ann"),
        ("data.batch_size=32", "ann"),
        ("model.pool=max", "ann"),
        ("ann.epochs=3", "ann"),
        ("runtime.precision=bf16", "ann"),
        ("neuron.leak=0.9", "T5"),
        ("conversion.percentile=99.7", "T5"),
        ("snn.learning_rate=0.5", "T5"),
        ("stages.T3.epochs=3", "T3"),
        ("timesteps=[5,4,1]", "T1"),
        ("timesteps=[5,4,3,2]", None),
        ("name=other", None),
        ("data.root=elsewhere", None),
        ("data.workers=2", None),
        ("runtime.threads=1", None),
        ("stages.T7.epochs=3", None),
        ("stages.T4.epochs=8", None),  # what it is already
        ("snn.learning_rate=1e-3", None),
    ],
)
def test_a_setting_counts_from_the_first_stage_it_matters_to(setting, first):
    names = ["ann", "T5", "T4", "T3", "T2"] if "timesteps" not in setting else ["ann", "T5", "T4"]
    changed = [
        name
        for name in [*names, "T1"]
        if name != "T1" or setting[-2:] != "2]"
        if key(name) != key(name, setting)
    ]
    expected = [*names, "T1"]
    assert changed == (expected[expected.index(first) :] if first else [])


def test_a_value_counts_wherever_the_recipe_writes_it():
    stages = [f"stages.T{t}.epochs=3" for t in (5, 4, 3, 2, 1)]
    everywhere = recipe.load("digits", ["snn.epochs=3", "stages.T1.epochs=3"])
    assert run_inputs(everywhere) == run_inputs(recipe.load("digits", stages))
    assert key("T1", "snn.epochs=3", "stages.T1.epochs=3") == key("T1", *stages)


def test_order_does_not_count():
    assert digest({"a": 1, "b": [2, "A"]}) == digest({"b": [2, "A"], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_stage_that_the_run_has_not():
    with pytest.raises(ValueError, match="T7"):
        stage_inputs(recipe.load("digits"), "T7")
