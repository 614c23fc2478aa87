"""Any network by its graph: activations, norms, units of spikes, calibration, what is refused."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF, convert
from iirsnn.conversion import NeuronConfig, balance_thresholds, to_spiking
from iirsnn.conversion.batch_norm_folding import fold_graph
from iirsnn.conversion.normal_form import normal_form
from iirsnn.conversion.tracing import trace
from iirsnn.models.graph import Affine, GraphNetwork
from iirsnn.nn import neurons

from .networks import NETWORKS, Dense, Residual, Shuffle, SpikesOut, images, trained_like

SHAPE = (3, 8, 8)


def made(kind):
    torch.manual_seed(0)
    return trained_like(kind())


def normal(ann):
    return normal_form(trace(ann.eval(), SHAPE, torch.float32), type(ann).__name__).eval()


def kinds(snn):
    return [type(module) for module in snn.graph_module.modules()]


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_folded_graph_gives_what_the_network_gives(kind):
    ann = made(kind)
    graph = normal(ann)
    x = images(5)
    torch.testing.assert_close(graph(x), ann(x), rtol=0, atol=1e-6)
    fold_graph(graph)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.modules())
    torch.testing.assert_close(graph(x), ann(x), rtol=1e-5, atol=1e-5)


#: Mean distance from the ANN's logits at T = 128, by their standard deviation. A max pool of
#: spikes is their OR, which fires more often than its busiest input.
BOUNDS = {Residual: 0.4, Dense: 0.05, Shuffle: 0.02, SpikesOut: 0.05}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("per_channel", [False, True])
@torch.no_grad()
def test_rates_come_to_the_logits(kind, per_channel):
    ann, x = made(kind), images(16, seed=1)
    distances = []
    for timesteps in (4, 128):
        neuron = NeuronConfig(per_channel=per_channel)
        snn = convert(ann, x, 100.0, timesteps=timesteps, neuron=neuron)
        logits = ann(x)
        distances.append(float((snn(x) - logits).abs().mean() / logits.std()))
    assert distances[1] < BOUNDS[kind]
    assert distances[1] < distances[0] / (1.5 if kind is Residual else 10)
    assert len({n.threshold.mean().item() for n in neurons(snn)}) == len(neurons(snn))


class Once(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.activation = activation

    def forward(self, x):
        x = self.conv(x)
        y = self.activation(x)
        return self.head((x if y is None else y).mean((2, 3)))


def ignoring_the_result(x):
    x.relu_()


@pytest.mark.parametrize(
    "activation",
    [
        *[nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu],
        *[torch.relu_, lambda x: F.relu(x, inplace=True), F.relu_, lambda x: x.relu()],
        *[lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0), lambda x: x.clamp_min(0.0)],
        *[lambda x: x.clip(0), ignoring_the_result],
    ],
)
def test_a_relu_however_it_is_written(activation):
    torch.manual_seed(0)
    ann = Once(activation)
    x = images(4, seed=1)
    snn = convert(ann, x, timesteps=3)
    torch.manual_seed(0)
    expected = convert(Once(nn.ReLU()), x, timesteps=3)
    assert len(neurons(snn)) == 1
    assert torch.equal(snn(x), expected(x))


@pytest.mark.parametrize(
    ("activation", "ceiling"),
    [
        *[(nn.ReLU6(), 6.0), (F.relu6, 6.0), (nn.Hardtanh(0, 0.2), 0.2)],
        *[(lambda x: x.clamp(0, 0.1), 0.1), (lambda x: F.hardtanh(x, 0.0, 0.3), 0.3)],
        (lambda x: torch.clamp(x, min=0, max=0.1), 0.1),
    ],
)
def test_what_saturates_becomes_neurons_with_no_higher_threshold(activation, ceiling):
    torch.manual_seed(0)
    ann = Once(activation)
    x = images(16, seed=1)
    snn = convert(ann, x, 100.0, timesteps=64)
    (neuron,) = neurons(snn)
    free = neurons(convert(Once(nn.ReLU()), x, 100.0))[0].threshold.item()
    assert neuron.threshold.item() == pytest.approx(min(ceiling, neuron.threshold.item()))
    assert neuron.threshold.item() <= ceiling + 1e-6
    assert ceiling > free or neuron.threshold.item() == pytest.approx(ceiling)
    torch.testing.assert_close(snn(x), ann(x), rtol=0, atol=0.02)


class Twice(nn.Module):
    """One block object in two places, one ReLU in four."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), self.act)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.block(self.block(self.act(self.stem(x))))
        return self.head(self.act(x - 0.1).mean((2, 3)))


def test_what_is_used_twice_becomes_two_things():
    ann = made(Twice)
    x = images(8, seed=1)
    snn = convert(ann, x, 100.0, timesteps=128)
    assert len({n.threshold.item() for n in neurons(snn)}) == 4
    assert kinds(snn).count(nn.Conv2d) == 3
    torch.testing.assert_close(snn(x), ann(x), rtol=0, atol=0.1)


class TwoNorms(nn.Module):
    """One convolution called for two norms, and one value that two norms take."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        a, b, c, d = self.norms
        x = F.relu(self.stem(x))
        one, two = F.relu(a(self.conv(x))), F.relu(b(self.conv(x)))
        shared = self.conv(one)
        three = F.relu(c(shared) + d(shared))
        return self.head(torch.cat([two, three], 1).mean((2, 3)))


class NormAndActivation(nn.BatchNorm2d):
    """As timm has it: a norm that holds the activation behind it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        norm = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(x, *norm))


class ActivationsInNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 3), NormAndActivation(4)
        self.conv, self.norm2 = nn.Conv2d(4, 4, 3), NormAndActivation(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm2(self.conv(self.norm1(self.stem(x))))
        return self.head(x.mean((2, 3)))


def test_an_activation_inside_a_norm():
    ann = made(ActivationsInNorms)
    x = images(8, seed=1)
    snn = convert(ann, x, 100.0, timesteps=256)
    assert kinds(snn).count(FusedLIF) == 2
    torch.testing.assert_close(snn(x), ann(x), rtol=0, atol=0.05)


def test_a_convolution_of_two_norms_is_not_folded_twice():
    ann = made(TwoNorms)
    x = images(8, seed=1)
    snn = convert(ann, x, 100.0, timesteps=256)
    assert kinds(snn).count(nn.Conv2d) == 4
    assert kinds(snn).count(Affine) == 2  # the norms of the shared value
    torch.testing.assert_close(snn(x), ann(x), rtol=0, atol=0.05)


def test_norms_may_be_kept():
    ann, x = made(Residual), images(8, seed=1)
    settings = NeuronConfig(keep_batch_norm=True)
    kept, folded = (convert(ann, x, timesteps=2, neuron=n).eval() for n in (settings, None))
    assert kinds(kept).count(BatchNormLIF) == 2  # behind the stem and inside the first block
    assert kinds(kept).count(nn.BatchNorm2d) == 3
    assert kinds(folded).count(nn.BatchNorm2d) == 0
    one, other = (sorted(n.threshold.item() for n in neurons(snn)) for snn in (kept, folded))
    assert one == pytest.approx(other, rel=1e-4)
    kept.train()(x).sum().backward()
    assert all(p.grad is not None for p in kept.parameters() if p.requires_grad)


def test_frozen_parameters_stay_frozen():
    ann = made(Residual)
    for parameter in ann.stem.parameters():
        parameter.requires_grad_(False)
    ann.beside.bias.requires_grad_(False)
    snn = convert(ann, images(4))
    frozen = {name for name, p in snn.graph_module.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if "unit" not in name} == {
        *("stem.0.weight", "stem.0.bias", "beside.bias")
    }


def test_the_ann_is_left_as_it_was():
    ann = made(Dense).train()
    before = copy.deepcopy(ann)
    convert(ann, images(4))
    assert all(module.training for module in ann.modules())
    for name, value in before.state_dict().items():
        assert torch.equal(ann.state_dict()[name], value), name


def test_a_network_is_settable_saved_copied_and_trained():
    ann, x = made(Shuffle), images(4, seed=1)
    snn = convert(ann, x, timesteps=2).eval()
    assert isinstance(snn, GraphNetwork)
    assert not torch.equal(snn(x), convert(ann, x, timesteps=3).eval()(x))
    fresh = to_spiking(ann, 2, image_shape=SHAPE).eval()
    fresh.load_state_dict(snn.state_dict())
    buffer = io.BytesIO()
    torch.save(snn, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for same in (fresh, copy.deepcopy(snn), pickle.loads(pickle.dumps(snn)), loaded):
        assert torch.equal(same(x), snn(x))
        for timesteps in (1, 4):
            same.timesteps = snn.timesteps = timesteps
            assert torch.equal(same(x), snn(x))
        snn.timesteps = 2
        assert balance_thresholds(copy.deepcopy(same), x) == balance_thresholds(same, x)
    snn.train()(x).sum().backward()
    assert all(n.threshold.grad is not None for n in neurons(snn))
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 8, 8\]"):
        snn(images(2, size=9))
    snn.timesteps = 0
    with pytest.raises(ValueError, match="timesteps: expected at least 1, got 0"):
        snn(x)


def test_dropout_has_one_mask_for_all_timesteps_and_none_in_eval():
    torch.manual_seed(0)
    snn = convert(SpikesOut(), images(4), timesteps=3)
    names = [type(module).__name__ for module in snn.modules()]
    assert "SharedDropout" in names
    assert "Dropout" not in names


# ---- Calibration ----


@pytest.mark.parametrize("kind", [Residual, Shuffle])
def test_batches_give_the_thresholds_of_the_whole(kind):
    ann, x = made(kind), images(24, seed=1)
    whole = convert(ann, x, 95.0, timesteps=4)
    thresholds = [n.threshold.item() for n in neurons(whole)]
    labels = torch.zeros(24)
    ways = [
        convert(ann, x, 95.0, timesteps=4, batch_size=7),
        convert(ann, list(x.split(7)), 95.0, timesteps=4),
        convert(ann, zip(x.split(9), labels.split(9), strict=True), 95.0, timesteps=4),
    ]
    for snn in ways:
        found = [n.threshold.item() for n in neurons(snn)]
        assert found == pytest.approx(thresholds, rel=2e-3)
        torch.testing.assert_close(snn(x), whole(x), rtol=0, atol=0.3)
    # counts do not depend on how images come in batches
    assert [n.threshold.item() for n in neurons(ways[0])] == [
        n.threshold.item() for n in neurons(ways[1])
    ]


def test_batches_of_the_packages_own_networks():
    torch.manual_seed(0)
    ann = nn.Sequential(
        *[nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten()],
        *[nn.Linear(96, 5)],
    )
    x = images(20, seed=1)
    whole, parts = convert(ann, x), convert(ann, x, batch_size=6)
    for one, other in zip(neurons(whole), neurons(parts), strict=True):
        assert one.threshold.item() == pytest.approx(other.threshold.item(), rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "kind",
    [Residual, lambda: nn.Sequential(nn.Conv2d(3, 2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))],
)
def test_images_that_are_not_finite_are_refused(kind, value):
    x = images(4)
    x[2, 1, 3, 3] = value
    with pytest.raises(ValueError, match="calibration_images: expected finite values"):
        convert(kind().eval(), x)


@pytest.mark.parametrize("none", [torch.zeros(0, 3, 8, 8), [], [torch.zeros(0, 3, 8, 8)]])
def test_no_images_are_refused(none):
    with pytest.raises(ValueError, match="calibration_images: expected at least one image"):
        convert(made(Residual), none)


def test_a_current_that_is_not_finite_is_refused_by_the_neurons_name():
    ann = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 2))
    ann[1].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers.2: expected a finite current"):
        convert(ann, images(2))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_out_of_range(batch_size):
    with pytest.raises(ValueError, match="batch_size: expected at least 1"):
        convert(made(SpikesOut), images(2), batch_size=batch_size)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("activation", "named"),
    [
        *[(nn.SiLU(), "activation (SiLU)"), (nn.GELU(), "activation (GELU)")],
        *[(nn.LeakyReLU(), "activation (LeakyReLU)"), (nn.PReLU(), "activation (PReLU)")],
        *[(nn.Hardtanh(), "activation (Hardtanh)"), (nn.ELU(), "activation (ELU)")],
        *[(nn.Sigmoid(), "activation (Sigmoid)"), (nn.Softmax(1), "activation (Softmax)")],
        *[(nn.GroupNorm(2, 4), "activation (GroupNorm)"), (nn.Tanh(), "activation (Tanh)")],
        (nn.LocalResponseNorm(2), "activation (LocalResponseNorm)"),
        *[(F.silu, "Once (silu)"), (torch.sigmoid, "Once (sigmoid)")],
        *[(lambda x: x.clamp(-1, 1), "clamp(-1, 1)"), (lambda x: x.tanh(), "Once (tanh)")],
        *[(lambda x: x * x, "mul of two values"), (lambda x: x.softmax(1), "Once (softmax)")],
        *[(lambda x: x.abs(), "Once (abs)"), (lambda x: x / x.sum(), "Once (sum)")],
        (lambda x: x + x[:1], "getitem"),
        (lambda x: F.dropout(x, 0.5), "Once (a dropout that is always on)"),
    ],
)
def test_what_is_not_linear_is_refused_by_name_and_place(activation, named):
    with pytest.raises(ValueError, match="ann: expected ReLU, ReLU6") as error:
        convert(Once(activation), images(2))
    assert named in str(error.value)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x):
        x = x.flatten(2)
        return F.relu(self.attention(x, x, x)[0]).mean(1)


def test_attention_is_refused_by_name_and_place():
    with pytest.raises(ValueError, match=r"attention \(MultiheadAttention\)"):
        convert(Attention(), images(2))


def test_all_that_is_refused_is_named():
    ann = nn.Sequential(*[nn.SiLU() for _ in range(8)], nn.Flatten(), nn.Linear(192, 2))
    with pytest.raises(ValueError, match=r"0 \(SiLU\), 1 \(SiLU\), .* and 2 more"):
        convert(ann, images(2))


class Branching(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(x).flatten(1) * self.calls


class Aliased(nn.Module):
    def forward(self, x):
        y = x[:, :]
        y.relu_()
        return (x + y).flatten(1)


@pytest.mark.parametrize(
    ("ann", "message"),
    [
        (Branching(), "torch.fx cannot trace in Branching"),
        (Stateful(), "expected a network that its graph repeats"),
        (Aliased(), "expected a network that its graph repeats"),
        (nn.Sequential(nn.Conv2d(5, 2, 3), nn.ReLU()), r"cannot run on images \[3, 8, 8\]"),
        (FusedLIF(), r"\(FusedLIF\)"),
    ],
)
def test_networks_that_no_graph_stands_for(ann, message):
    with pytest.raises(ValueError, match=message):
        convert(ann, images(2))


def test_an_image_shape_is_needed_or_an_attribute_of_the_network():
    ann = made(Residual)
    with pytest.raises(
        ValueError, match=r"image_shape: expected \[C, H, W\] of an image, got None"
    ):
        to_spiking(ann, 1)
    ann.image_shape = SHAPE
    assert to_spiking(ann, 1).image_shape == SHAPE
