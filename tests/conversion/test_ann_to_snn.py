"""Conversion: BatchNorm folded, thresholds balanced as the paper says, and models it refuses."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iirsnn import FusedLIF, Network, Readout, SharedDropout, convert
from iirsnn.conversion import (
    NeuronConfig,
    balance_thresholds,
    fold_batch_norm,
    to_spiking,
)
from iirsnn.models import vgg
from iirsnn.nn import neurons


def trained_like(network, seed=0):
    """The network with running statistics, scales and shifts as a training would leave them."""
    torch.manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.1, 0.3)
    return network


def small_ann(**options):
    torch.manual_seed(0)
    options = {"hidden": [12], "batch_norm": True, **options}
    return trained_like(vgg([6, "A", 8, 7], 5, (2, 8, 8), **options))


def percentile_of(values, percentile):
    """By sorting all elements: linear between the two nearest ranks."""
    ordered = sorted(values.flatten().tolist())
    place = (len(ordered) - 1) * percentile / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def folded_layers(ann):
    """(weight, bias, kind) of each layer with BatchNorm folded by its formula; and the pools."""
    layers = []
    modules = [m for m in ann.layers if not isinstance(m, (nn.ReLU, nn.Flatten, SharedDropout))]
    for module, following in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.AvgPool2d):
            layers.append(("pool", None, None))
        elif isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach().double()
            bias = torch.zeros(len(weight)) if module.bias is None else module.bias.detach()
            bias = bias.double()
            if isinstance(following, (nn.BatchNorm1d, nn.BatchNorm2d)):
                gain = following.weight / (following.running_var + following.eps).sqrt()
                gain = gain.detach().double()
                bias = following.bias.detach() + (bias - following.running_mean) * gain
                weight = weight * gain.view(-1, *[1] * (weight.dim() - 1))
            layers.append(("conv" if weight.dim() == 4 else "linear", weight, bias.double()))
    return layers


def layer_by_layer(ann, images, timesteps, percentile, scale, thresholds):
    """The rule of the paper, one layer and one timestep after the other, in float64.

    Layer k sees the spikes that the layers before it emit with `thresholds`, leak 1. Returns for
    each hidden layer the percentile of its current at each timestep, times `scale`.
    """
    found = []
    spikes = [images.double()] * timesteps
    remaining = iter(thresholds)
    for kind, weight, bias in folded_layers(ann)[:-1]:
        if kind == "pool":
            spikes = [F.avg_pool2d(s, 2) for s in spikes]
            continue
        if kind == "conv":
            currents = [F.conv2d(s, weight, bias, padding=1) for s in spikes]
        else:
            currents = [s.flatten(1) @ weight.T + bias for s in spikes]
        found.append([scale * percentile_of(current, percentile) for current in currents])
        threshold = next(remaining)
        v, spikes = 0.0, []
        for current in currents:
            h = v + current
            s = (h / threshold - 1 > 0).double()
            v = h - threshold * s
            spikes.append(s)
    return found


@pytest.mark.parametrize("timesteps", [1, 2, 5])
@pytest.mark.parametrize(("percentile", "scale"), [(90.0, 1.0), (99.7, 0.3), (100.0, 1.0)])
def test_thresholds_are_those_of_the_papers_rule(timesteps, percentile, scale):
    ann = small_ann().double()
    images = torch.randn(11, 2, 8, 8, dtype=torch.float64)
    snn = convert(ann, images, percentile, scale, timesteps=timesteps)
    thresholds = [neuron.threshold.item() for neuron in neurons(snn)]
    found = layer_by_layer(ann, images, timesteps, percentile, scale, thresholds)
    assert len(thresholds) == len(found) == 4
    assert all(threshold > 0 for threshold in thresholds)
    assert thresholds == pytest.approx([max(steps) for steps in found], rel=1e-6)
    if timesteps == 5 and scale == 1:
        # it matters to take the maximum over time, and that the layers before are balanced
        assert any(max(steps) > 1.01 * steps[0] for steps in found)
        unbalanced = layer_by_layer(ann, images, timesteps, percentile, scale, [1.0] * 4)
        assert any(
            max(a) != pytest.approx(max(b), rel=0.01)
            for a, b in zip(found, unbalanced, strict=True)
        )


def test_default_percentile_and_scale_are_the_papers():
    ann, images = small_ann(), torch.randn(4, 2, 8, 8)
    default = [n.threshold.item() for n in neurons(convert(ann, images))]
    assert default == [n.threshold.item() for n in neurons(convert(ann, images, 90, 1.0))]


def test_balance_returns_what_it_set_and_keeps_the_mode():
    snn = to_spiking(small_ann(dropout=0.5), 3).train()
    images = torch.randn(4, 2, 8, 8)
    thresholds = balance_thresholds(snn, images)
    assert thresholds == pytest.approx([n.threshold.item() for n in neurons(snn)])
    assert all(module.training for module in snn.modules())
    assert thresholds == balance_thresholds(snn, images)  # without dropout, and without a residue
    assert all(not module._forward_pre_hooks for module in snn.modules())


def test_a_percentile_that_is_not_positive_becomes_a_tenth():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(ann[1].weight)
    for bias in (0.0, -1.0):
        nn.init.constant_(ann[1].bias, bias)
        (neuron,) = neurons(convert(ann, torch.randn(5, 1, 2, 2), scale=0.5))
        assert neuron.threshold.item() == pytest.approx(0.1)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_is_folded_into_what_is_before_it(bias):
    torch.manual_seed(1)
    ann = nn.Sequential(
        *[nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), nn.ReLU()],
        nn.AvgPool2d(2),
        *[nn.Conv2d(6, 4, 3, bias=bias, groups=2), nn.BatchNorm2d(4), nn.ReLU()],
        nn.Flatten(),
        *[nn.Linear(16, 9, bias=bias), nn.BatchNorm1d(9), nn.ReLU()],
        nn.Linear(9, 3),
    )
    trained_like(ann, seed=2).eval()
    folded = copy.deepcopy(ann)
    fold_batch_norm(folded)
    assert [type(m).__name__ for m in folded] == [
        *["Conv2d", "ReLU", "AvgPool2d", "Conv2d", "ReLU", "Flatten", "Linear", "ReLU", "Linear"]
    ]
    assert not any(module.training for module in folded.modules())
    training = copy.deepcopy(ann).train()
    fold_batch_norm(training)
    assert all(module.training for module in training.modules())
    images = torch.randn(8, 2, 8, 8)
    torch.testing.assert_close(folded(images), ann(images), rtol=1e-5, atol=1e-5)
    assert (ann(images) - ann.train()(images)).abs().max() > 0.1  # the statistics do matter


def test_the_networks_of_a_recipe_are_folded_too():
    ann = small_ann().eval()
    folded = copy.deepcopy(ann)
    fold_batch_norm(folded)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in folded.modules())
    images = torch.randn(8, 2, 8, 8)
    torch.testing.assert_close(folded(images), ann(images), rtol=1e-5, atol=1e-5)


def test_the_ann_is_left_as_it_was():
    for training in (True, False):
        ann = small_ann().train(training)
        ann.layers[0].weight.requires_grad_(False)
        before = copy.deepcopy(ann)
        snn = convert(ann, torch.randn(4, 2, 8, 8))
        assert str(ann) == str(before)
        assert ann.timesteps == 1
        assert [m.training for m in ann.modules()] == [m.training for m in before.modules()]
        for name, value in before.state_dict().items():
            assert torch.equal(ann.state_dict()[name], value), name
        memory = {p.data_ptr() for p in ann.parameters()}
        assert not memory & {p.data_ptr() for p in snn.parameters()}
        frozen = [name for name, p in snn.named_parameters() if not p.requires_grad]
        assert frozen == ["layers.0.weight"]  # what was frozen stays so


def test_no_relu_and_no_normalisation_is_left_and_the_readout_is_skipped():
    snn = convert(small_ann(), torch.randn(4, 2, 8, 8), timesteps=3)
    kinds = [type(module).__name__ for module in snn.layers]
    assert kinds == [
        *["Conv2d", "FusedLIF", "AvgPool2d"],
        *["Conv2d", "FusedLIF", "SharedDropout", "Conv2d", "FusedLIF", "SharedDropout"],
        *["Flatten", "Linear", "FusedLIF", "SharedDropout", "Readout"],
    ]
    assert snn.timesteps == 3


def test_neurons_get_the_settings_asked_for():
    settings = NeuronConfig(
        leak=0.9, learn_threshold=False, reset="hard", surrogate="atan", surrogate_scale=3.0
    )
    for neuron in neurons(convert(small_ann(), torch.randn(4, 2, 8, 8), neuron=settings)):
        assert neuron.leak.item() == pytest.approx(0.9)
        assert (neuron.reset, neuron.surrogate, neuron.surrogate_scale) == ("hard", "atan", 3.0)
        assert not neuron.threshold.requires_grad
        assert neuron.leak.requires_grad


def pieces():
    torch.manual_seed(3)
    return [
        *[nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)],
        *[nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU()],
        nn.Linear(8, 3),
    ]


def test_a_plain_sequential_is_taken_however_it_is_nested():
    flat = pieces()
    nested = pieces()
    ann = nn.Sequential(
        nn.Sequential(nn.Sequential(*nested[:3]), nested[3], nn.Sequential(*nested[4:6])),
        nested[6],
        nn.Sequential(*nested[7:]),
    )
    images = torch.randn(6, 1, 4, 4)
    expected = convert(nn.Sequential(*flat), images, timesteps=4)
    snn = convert(ann, images, timesteps=4)
    assert len(neurons(snn)) == 3
    assert torch.equal(snn(images), expected(images))
    # at rest between images: the batch is not taken for time
    assert torch.equal(snn(images)[1:], snn(images[1:]))


def test_one_relu_in_many_places_becomes_as_many_neurons():
    ann = pieces()
    relu = ann[2]
    ann[5] = ann[8] = relu
    snn = convert(nn.Sequential(*ann), torch.randn(6, 1, 4, 4))
    assert len(neurons(snn)) == 3
    assert not any(isinstance(module, nn.ReLU) for module in snn.modules())


@pytest.mark.parametrize("index", range(5))
def test_a_plain_sequential_with_hooks_is_refused(index):
    """A Network of the same layers would leave them out."""
    modules = [nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)]
    modules[index].register_forward_hook(lambda module, inputs, output: output * 3)
    kind = type(modules[index]).__name__
    with pytest.raises(ValueError, match=rf"ann: expected no hooks .* got {index} \({kind}\)"):
        convert(nn.Sequential(*modules).eval(), torch.rand(8, 1, 2, 2))


def test_dropout_of_a_plain_sequential_gets_one_mask_for_all_timesteps():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(4, 9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 2))
    snn = convert(ann, torch.randn(4, 1, 2, 2))
    (dropout,) = [module for module in snn.modules() if isinstance(module, SharedDropout)]
    assert dropout.p == 0.3
    assert not any(isinstance(module, nn.Dropout) for module in snn.modules())


class Analog(nn.Module):
    def forward(self, x):
        return torch.tanh(x)


@pytest.mark.parametrize(
    ("ann", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), "ann: no ReLU"),
        (nn.Conv2d(1, 2, 1), "ann: no ReLU"),
        (
            Network([nn.Flatten(), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)]),
            "ann: expected each BatchNorm right after a Conv2d or Linear",
        ),
        (
            nn.Sequential(
                *[nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)],
                *[nn.ReLU(), nn.Linear(3, 2)],
            ),
            "expected running statistics to fold, got BatchNorm1d",
        ),
        (
            Network([nn.Flatten(), nn.ReLU(), nn.Linear(4, 3), nn.SiLU(), Readout(3, 2)]),
            r"functions that are not linear, got layers.3 \(SiLU\)",
        ),
        (
            Network([nn.Flatten(), nn.ReLU(), Analog(), Readout(4, 2)]),
            r"functions that are not linear, got layers.2 \(Analog\)",
        ),
    ],
)
def test_models_that_cannot_be_converted(ann, message):
    with pytest.raises(ValueError, match=message):
        convert(ann, torch.zeros(2, 1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 0}, r"percentile: expected a value in \(0, 100\], got 0"),
        ({"percentile": -1}, "percentile"),
        ({"percentile": 100.1}, "percentile"),
        ({"percentile": float("nan")}, "percentile"),
        ({"scale": 0}, "scale: expected a positive factor, got 0"),
        ({"scale": -1.0}, "scale"),
        ({"timesteps": 0}, "timesteps: expected an integer of at least 1, got 0"),
        ({"timesteps": 2.5}, "timesteps: expected an integer of at least 1, got 2.5"),
        ({"neuron": NeuronConfig(reset="sometimes")}, "reset"),
        ({"neuron": NeuronConfig(surrogate="step")}, "surrogate"),
        ({"neuron": NeuronConfig(backend="abacus")}, "backend"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        convert(small_ann(), torch.zeros(2, 2, 8, 8), **options)


def test_calibration_images_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match=r"calibration_images: expected tensors .*, got ndarray"):
        convert(small_ann(), [np.zeros((2, 2, 8, 8), np.float32)])


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan")])
def test_thresholds_out_of_range(threshold):
    with pytest.raises(ValueError, match="threshold: expected"):
        FusedLIF(threshold)
