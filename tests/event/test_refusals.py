"""What the engine does not have, by its name; wrong arguments."""

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.errors import RunError, UsageError
from iirsnn.event.network import EventNetwork


def refused(*modules, match, timesteps=1, **options):
    with pytest.raises(UsageError, match=match):
        EventNetwork.from_model(nn.Sequential(*modules), timesteps, **options)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.ReLU(), r"1 \(ReLU\): the event engine has no such module"),
        (nn.Sigmoid(), r"1 \(Sigmoid\)"),
        (nn.GroupNorm(2, 4), r"1 \(GroupNorm\): the event engine has no such module"),
        (FusedLIF(stateful=True), r"1 \(FusedLIF\): expected stateful=False"),
        (FusedLIF(packed=True), r"1 \(FusedLIF\): expected packed=False"),
        (FusedLIF(channels=3), r"1 \(FusedLIF\): threshold: expected 1 element or 4, got 3"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"1 \(BatchNorm2d\): expected running"),
        (nn.BatchNorm1d(4), r"1 \(BatchNorm1d\): expected a Flatten before"),
        (nn.BatchNorm2d(3), r"1 \(BatchNorm2d\): expected 4 channels, got 3"),
    ],
)
def test_modules_after_a_convolution(module, match):
    refused(nn.Conv2d(1, 4, 3), module, nn.Flatten(), nn.Linear(16, 2), match=match)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (nn.AdaptiveAvgPool2d(1), r"2 \(AdaptiveAvgPool2d\)"),
        (nn.AvgPool2d(2, ceil_mode=True), r"2 \(AvgPool2d\): ceil_mode needs image_shape"),
        (nn.AvgPool2d(2, divisor_override=3), r"2 \(AvgPool2d\): expected no divisor_override"),
        (nn.AvgPool2d(2, padding=1, count_include_pad=False), "count_include_pad=True"),
        (nn.MaxPool2d(2, ceil_mode=True), r"2 \(MaxPool2d\): ceil_mode needs image_shape"),
        (nn.MaxPool2d(2, return_indices=True), r"2 \(MaxPool2d\): expected return_indices=False"),
        (nn.Conv2d(4, 4, 1, padding_mode="circular"), r"2 \(Conv2d\).*padding with zeros"),
        (FusedLIF(), r"2 \(neurons\): needs image_shape"),
        (nn.ZeroPad2d(-1), r"2 \(ZeroPad2d\): expected no negative padding"),
        (nn.Linear(4, 4), r"2 \(Linear\): expected a Flatten before"),
        (nn.Flatten(0), r"2 \(Flatten\): expected start_dim=1"),
    ],
)
def test_modules_after_neurons(module, match):
    refused(nn.Conv2d(1, 4, 3), FusedLIF(), module, nn.Flatten(), nn.Linear(16, 2), match=match)


def tripled(module, kind):
    """The module, which gives three times what its class would."""
    if kind == "hook":
        module.register_forward_hook(lambda module, inputs, output: output * 3)
    elif kind == "hook before":
        module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    else:
        module.forward = lambda x: type(module).forward(module, x) * 3
    return module


@pytest.mark.parametrize("kind", ["hook", "hook before", "forward"])
def test_modules_that_do_something_else(kind):
    message = "expected no hooks and no forward of its own"
    end = nn.Flatten(), nn.Linear(16, 2)
    refused(tripled(nn.Conv2d(1, 4, 3), kind), FusedLIF(), *end, match=rf"0 \(Conv2d\): {message}")
    both = BatchNormLIF(nn.BatchNorm2d(4), tripled(FusedLIF(), kind))
    refused(nn.Conv2d(1, 4, 3), both, *end, match=rf"\(FusedLIF\): {message}")
    model = tripled(nn.Sequential(nn.Conv2d(1, 4, 3), FusedLIF(), *end), kind)
    with pytest.raises(UsageError, match=rf"model \(Sequential\): {message}"):
        EventNetwork.from_model(model)


def test_other_models():
    refused(nn.Conv2d(1, 4, 3), FusedLIF(), match="expected a Linear as its last layer")
    refused(nn.AvgPool2d(2), match=r"model \(image\): needs image_shape")
    shape = (1, 5, 5)
    uneven = (nn.Conv2d(1, 4, 1), FusedLIF(), nn.AvgPool2d(2, ceil_mode=True))
    refused(*uneven, match="expected ceil_mode=False", image_shape=shape)
    uneven = (nn.Conv2d(1, 4, 1), FusedLIF(), nn.AdaptiveMaxPool2d(2))
    refused(*uneven, match=r"expected a divisor of \(5, 5\), got \(2, 2\)", image_shape=shape)
    shuffle = (nn.Conv2d(1, 4, 1), FusedLIF(), nn.ChannelShuffle(3))
    refused(*shuffle, match="expected channels in 3 groups", image_shape=shape)
    refused(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), FusedLIF(), nn.Flatten(),
        nn.Linear(4, 2), match="padding with zeros, got reflect",
    )  # fmt: skip
    with pytest.raises(UsageError, match="TransformerEncoderLayer"):
        EventNetwork.from_model(nn.TransformerEncoderLayer(8, 1))


def test_numbers_that_are_not_finite(small):
    for name in ("layers.0.weight", "layers.4.bias", "layers.1.threshold", "layers.5.leak"):
        network, _ = small
        state = network.state_dict()
        kept = state[name].clone()
        state[name].view(-1)[0] = float("nan")
        with pytest.raises(UsageError, match=r"expected a finite"):
            EventNetwork.from_model(network, 2)
        state[name].copy_(kept)


def test_wrong_arguments(small):
    network, x = small
    with pytest.raises(UsageError, match="expected the T of the model, 2, got 1"):
        EventNetwork.from_model(network)
    with pytest.raises(UsageError, match="precision: expected one of fp32, bf16, int8, got 'fp8'"):
        EventNetwork.from_model(network, 2, precision="fp8")
    with pytest.raises(UsageError, match="timesteps: expected an integer"):
        EventNetwork.from_model(network, 0)
    net = EventNetwork.from_model(network, 2)
    with pytest.raises(RunError, match="expected a call"):
        net.statistics()
    with pytest.raises(UsageError, match=r"expected \[B, 1, 6, 6\], got \[5, 1, 6, 7\]"):
        net(torch.zeros(5, 1, 6, 7))
    with pytest.raises(UsageError, match=r"expected \[B, 1, 6, 6\], got \[5, 3, 6, 6\]"):
        net(torch.zeros(5, 3, 6, 6))
    with pytest.raises(UsageError, match="expected a float tensor"):
        net(torch.zeros(5, 1, 6, 6, dtype=torch.uint8))
    with pytest.raises(UsageError, match="expected finite values"):
        net(x / 0)


def test_images_too_small_for_the_model():
    net = EventNetwork.from_model(
        nn.Sequential(nn.Conv2d(1, 4, 5), FusedLIF(), nn.Flatten(), nn.Linear(16, 2))
    )
    with pytest.raises(UsageError, match=r"0: cannot follow 1 x 3 x 3 .*kernel that fits"):
        net(torch.zeros(1, 1, 3, 3))
    with pytest.raises(UsageError, match=r"3: cannot follow 4 x 3 x 3 .*36 input features, got 16"):
        net(torch.zeros(1, 1, 7, 7))
