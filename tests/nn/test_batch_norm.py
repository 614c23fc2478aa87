"""BatchNormLIF against nn.BatchNorm2d and FusedLIF one after the other."""

import copy

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
from iirsnn.nn.batch_norm import spiking_layers
from tests.composed import Composed

SHAPE = (3, 4, 6, 5, 5)


def pair(dtype=torch.float64, *, norm=None, **options):
    """A norm and a neuron with parameters away from where they start; the neuron in float64."""
    torch.manual_seed(0)
    norm = norm or nn.BatchNorm2d(6)
    neuron = FusedLIF(0.7, 0.8, backend="reference", **options)
    for parameter in [*norm.parameters(), *neuron.parameters()]:
        nn.init.uniform_(parameter, 0.5, 1.0)
    return norm.to(dtype), neuron.to(dtype)


def run(module, x, grad_s):
    x = x.detach().requires_grad_()
    s = module(x)
    s.backward(grad_s)
    return s.detach(), x.grad, [p.grad for p in module.parameters()]


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        ({}, {}),
        ({}, {"channels": 6, "reset": "hard", "surrogate": "atan", "detach_reset": False}),
        ({"affine": False}, {"learn_threshold": False}),
        ({"momentum": None}, {"learn_leak": False, "learn_threshold": False}),
    ],
    ids=["plain", "channels", "not affine", "running mean"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_training_equals_the_two_modules(norm, options, layout):
    norm, neuron = pair(norm=nn.BatchNorm2d(6, **norm), **options)
    fused, composed = BatchNormLIF(norm, neuron), Composed(*copy.deepcopy((norm, neuron)))
    for _ in range(2):  # the second time on other running statistics
        x = 3 + 2 * torch.randn(SHAPE, dtype=torch.float64)
        if layout == "channels_last":
            x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, SHAPE[:2])
        grad_s = torch.randn(SHAPE, dtype=torch.float64)
        s, grad_x, grads = run(fused, x, grad_s)
        wanted_s, wanted_x, wanted = run(composed, x, grad_s)
        assert torch.equal(s, wanted_s)
        assert 0.1 < s.mean() < 0.9
        torch.testing.assert_close(grad_x, wanted_x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(fused.named_buffers()), dict(composed.named_buffers()))
        x = torch.randn(SHAPE, dtype=torch.float64)
        assert torch.equal(fused.eval()(x), composed.eval()(x))
        fused.train()
        composed.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_the_memory_is_kept(dtype):
    norm, neuron = pair(torch.float32)
    x = torch.randn(2, 8, 6, 32, 32).to(dtype).requires_grad_()

    def kept(module):
        found = {}

        def pack(t):
            found[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            s = module(x)
        return sum(found.values()), s

    neuron.backend = "auto"
    fused, _ = kept(BatchNormLIF(norm, neuron))
    composed, _ = kept(Composed(norm, neuron))
    one = x.numel() * x.element_size()
    assert one <= fused < 1.01 * one
    assert 2 * one <= composed


def test_what_is_not_plain_training_is_the_two_modules():
    x = torch.randn(SHAPE, dtype=torch.float64)
    norm, neuron = pair(stateful=True, return_v=True)
    composed = Composed(*copy.deepcopy((norm, neuron)))
    for _ in range(2):
        for got, wanted in zip(BatchNormLIF(norm, neuron)(x), composed(x), strict=True):
            assert torch.equal(got, wanted)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Silent(FusedLIF):
    def forward(self, x):
        return 0 * super().forward(x)


def of_float(dtype=torch.float32):
    """A norm and a neuron for the compiled kernel."""
    norm, neuron = pair(dtype)
    neuron.backend = "auto"
    return norm, neuron


def shadowed(norm):
    norm.forward = lambda x: x + 1
    return norm


EXCHANGED = {
    "subclass": (lambda norm: Doubled(6), None),
    "forward of its own": (shadowed, None),
    "identity": (lambda norm: nn.Identity(), None),
    "group norm": (lambda norm: nn.GroupNorm(3, 6), None),
    "instance norm": (lambda norm: nn.InstanceNorm2d(6, affine=True), None),
    "parametrised": (lambda norm: spectral(norm), None),
    "neuron's subclass": (None, lambda neuron: Silent(0.7)),
    "no neuron": (None, lambda neuron: nn.ReLU()),
}


def spectral(norm):
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EXCHANGED)
def test_what_takes_the_place_of_a_part_is_called(name, dtype):
    fused = BatchNormLIF(*of_float(dtype))
    for part, exchange in zip(("norm", "neuron"), EXCHANGED[name], strict=True):
        if exchange:
            setattr(fused, part, exchange(getattr(fused, part)).to(dtype))
    composed = Composed(*copy.deepcopy((fused.norm, fused.neuron)))
    x, grad_s = torch.randn(2, *SHAPE, dtype=dtype)
    for got, wanted in zip(run(fused, x, grad_s), run(composed, x, grad_s), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(dict(fused.named_buffers()), dict(composed.named_buffers()))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("place", ["norm", "neuron", "everywhere"])
def test_hooks_fire_in_training(kind, place):
    fused = BatchNormLIF(*of_float())
    fired = []

    def hook(module, *args):
        fired.append(type(module))

    if place == "everywhere":
        register = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    else:
        register = getattr(getattr(fused, place), f"register_{kind}_hook")
    handle = register(hook)
    try:
        run(fused, torch.randn(SHAPE), torch.randn(SHAPE))
    finally:
        handle.remove()
    wanted = {"norm": {nn.BatchNorm2d}, "neuron": {FusedLIF}}
    assert set(fired) == wanted.get(place, {BatchNormLIF, nn.BatchNorm2d, FusedLIF})
    fired.clear()
    run(fused, torch.randn(SHAPE), torch.randn(SHAPE))
    assert fired == []


def test_a_hooks_result_is_taken():
    fused = BatchNormLIF(*of_float())
    fused.norm.register_forward_hook(lambda module, args, current: current - 100)
    assert not fused(torch.randn(SHAPE)).any()


def test_the_norm_checks_the_number_of_dimensions_in_training_too():
    fused = BatchNormLIF(*of_float())
    with pytest.raises(ValueError, match="expected 4D input"):
        fused(torch.randn(3, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("channels", [1, 5, 4096])
def test_the_norm_checks_the_number_of_channels(dtype, affine, channels):
    norm = nn.BatchNorm2d(6, affine=affine, dtype=dtype).requires_grad_(False)
    fused = BatchNormLIF(norm, FusedLIF(learn_threshold=False).to(dtype))
    with pytest.raises(RuntimeError, match=f"should contain {channels} elements not 6"):
        fused(torch.randn(2, 2, channels, 3, 3, dtype=dtype))


@pytest.mark.parametrize("eps", [0, -1.0])
def test_the_norm_checks_its_eps(eps):
    fused, composed = (
        kind(nn.BatchNorm2d(6, eps=eps), FusedLIF()) for kind in (BatchNormLIF, Composed)
    )
    x, found = torch.randn(SHAPE), []
    for module in (fused, composed):  # torch's versions differ
        try:
            found.append(module(x))
        except ValueError as error:
            found.append(str(error))
    assert torch.equal(*found) if torch.is_tensor(found[1]) else found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "names",
    [("running_mean", "running_var"), ("num_batches_tracked",)],
    ids=["no statistics", "no count"],
)
def test_a_norm_that_was_told_to_keep_nothing(dtype, names):
    norm, neuron = pair(dtype)
    for name in names:
        setattr(norm, name, None)
    fused, composed = BatchNormLIF(norm, neuron), Composed(*copy.deepcopy((norm, neuron)))
    x, grad_s = torch.randn(2, *SHAPE, dtype=dtype)
    s, grad_x, grads = run(fused, x, grad_s)
    wanted_s, wanted_x, wanted = run(composed, x, grad_s)
    assert torch.equal(s, wanted_s)
    torch.testing.assert_close((grad_x, grads), (wanted_x, wanted))
    torch.testing.assert_close(dict(norm.named_buffers()), dict(composed.norm.named_buffers()))


def test_the_gradient_of_the_threshold_is_as_exact_as_the_two_modules():
    """The root of the mean square error of many runs: of one, the two modules' may be 0 by luck."""
    errors = torch.zeros(2, 16, dtype=torch.float64)
    for seed in range(16):
        norm, neuron = of_float()
        torch.manual_seed(seed)
        shape = (5, 4, 6, 16, 16)
        x, grad_s = torch.randn(shape), torch.randn(shape) / 100
        modules = BatchNormLIF, Composed, Composed
        made = [kind(*copy.deepcopy((norm, neuron))) for kind in modules]
        exact = run(made.pop().double(), x.double(), grad_s.double())
        for i, module in enumerate(made):
            s, _, grads = run(module, x, grad_s)
            assert torch.equal(s.double(), exact[0])
            errors[i, seed] = grads[2].double().sub(exact[2][2]).item()
    fused, two = errors.square().mean(1).sqrt()
    assert fused < 1.2 * two


def test_layers_that_spike_are_named_once():
    pairs = [BatchNormLIF(nn.BatchNorm2d(6), neuron) for neuron in (FusedLIF(), nn.ReLU())]
    net = nn.Sequential(FusedLIF(), *pairs)
    assert dict(spiking_layers(net)) == {"0": net[0], "1": net[1]}


def test_wrong_arguments_are_named():
    norm, neuron = pair()
    with pytest.raises(TypeError, match="norm: expected a module, got type"):
        BatchNormLIF(nn.BatchNorm2d, neuron)
    with pytest.raises(TypeError, match="neuron: expected a module, got float"):
        BatchNormLIF(norm, 1.0)
    with pytest.raises(ValueError, match=r"x: expected shape \[T, B, C, ...\], got \(4, 6\)"):
        BatchNormLIF(norm, neuron)(torch.randn(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNormLIF(norm, neuron)(torch.randn(1, 1, 6, 1, 1, dtype=torch.float64))
