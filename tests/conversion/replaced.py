"""What every replaced neuron has to satisfy, beside the check that `replace_neurons` makes."""

import copy

import torch

from iirsnn import replace_neurons

#: Of a gradient or membrane in float32, relative to the largest: T <= 10 roundings, and sums of
#: some 1,000 terms for a parameter.
TOLERANCE = 1e-5


def exchanged(module):
    """A copy of `module`, replaced, and nothing left."""
    other = copy.deepcopy(module)
    table = replace_neurons(other, strict=True)
    assert table.rows
    return other


def current(*shape, lattice=False):
    """Currents [T, B, ...]; on a lattice of 1/4, a membrane often is the threshold itself."""
    x = 0.4 + torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return (4 * x).round() / 4 if lattice else x


def assert_same(run, original, other, x):
    """Spikes equal, states and gradients to within rounding.

    run(module, x): spikes, then states. Gradients are those of x and of all parameters.
    """
    results = []
    for module in (original, other):
        leaf = x.clone().requires_grad_()
        outputs = run(module, leaf)
        rng = torch.Generator().manual_seed(2)
        loss = sum((out * torch.randn(out.shape, generator=rng)).sum() for out in outputs)
        wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        results.append([*outputs, *grads])
    (s, *values), (s_other, *values_other) = results
    assert torch.equal(s, s_other)
    assert 0.05 < (s != 0).float().mean() < 0.95
    for value, value_other in zip(values, values_other, strict=True):
        assert (value is None) == (value_other is None)
        if value is not None:
            scale = value.abs().max().item() or 1.0
            torch.testing.assert_close(value_other, value, rtol=0, atol=TOLERANCE * scale)


def ten_steps(optimizer, loss_of):
    """The losses of ten training steps, float [10]; loss_of() makes the loss of a step."""
    found = []
    for _ in range(10):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)
