"""BatchNormLIF against nn.BatchNorm2d and FusedLIF one after the other."""

import copy

import pytest
import torch
from torch import nn

from iirsnn import BatchNormLIF, FusedLIF
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


def test_wrong_arguments_are_named():
    norm, neuron = pair()
    with pytest.raises(TypeError, match=r"norm: expected nn\.BatchNorm1d, 2d or 3d, got LayerNorm"):
        BatchNormLIF(nn.LayerNorm(6), neuron)
    with pytest.raises(TypeError, match="neuron: expected a FusedLIF, got ReLU"):
        BatchNormLIF(norm, nn.ReLU())
    with pytest.raises(ValueError, match=r"x: expected shape \[T, B, C, ...\], got \(4, 6\)"):
        BatchNormLIF(norm, neuron)(torch.randn(4, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match="more than one value per channel"):
        BatchNormLIF(norm, neuron)(torch.randn(1, 1, 6, dtype=torch.float64))
