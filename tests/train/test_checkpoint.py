"""The state of an optimiser, kept in a file and given back."""

import pytest
import torch

from iirsnn import atomic_files
from iirsnn.train import checkpoint


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimizer_goes_on_as_if_it_had_not_been_stopped(tmp_path, kind):
    def make(seed):
        torch.manual_seed(seed)
        weight = torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)
        parameters = [torch.nn.Parameter(weight), torch.nn.Parameter(torch.randn(1))]
        groups = [{"params": [p]} for p in parameters]
        if kind == "adam":
            return parameters, torch.optim.Adam(groups, 1e-2, amsgrad=True)
        return parameters, torch.optim.SGD(groups, 1e-2, momentum=0.9, weight_decay=1e-2)

    def step(parameters, optimizer, seed):
        torch.manual_seed(seed)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()

    parameters, optimizer = make(0)
    for seed in range(3):
        step(parameters, optimizer, seed)
    tensors, scalars = checkpoint.pack_optimizer(optimizer)
    atomic_files.save(tmp_path / "o", tensors, {"optimizer": scalars})

    others, other = make(1)
    tensors, header = atomic_files.load(tmp_path / "o")
    checkpoint.unpack_optimizer(
        other, {"network.layers.0.weight": torch.zeros(1), **tensors}, header["optimizer"]
    )
    for p, q in zip(others, parameters, strict=True):
        p.data.copy_(q.data)
    for seed in range(3, 6):
        step(parameters, optimizer, seed)
        step(others, other, seed)
    for p, q in zip(others, parameters, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[q].items():
            assert torch.equal(other.state[p][name], value)
            assert other.state[p][name].stride() == value.stride(), "the memory format is kept"
