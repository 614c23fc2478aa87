"""Layers around the neurons on a device: spike layers, and a training step as a CUDA graph."""

import copy

import pytest
import torch
from torch import nn

from iirsnn import FusedLIF, SpikeAvgPool2d, SpikeConv2d
from iirsnn.nn.neuron import neurons
from tests.gpu.device import ON_A_DEVICE
from tests.spiking_step import network, training_step

pytestmark = ON_A_DEVICE


@pytest.fixture(autouse=True)
def the_same_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def images_and_labels():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 16, 16, generator=generator)
    return images.cuda(), torch.tensor([1, 3, 5, 7], device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["bits", "counts"])
def test_spike_layers_have_the_bits_of_torchs(pool, layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 2, 16, 12, 12, device="cuda", dtype=dtype, requires_grad=True)
    s = FusedLIF().cuda()(x).flatten(0, 1).to(memory_format=layout)
    s = SpikeAvgPool2d(2)(s) if pool else s
    ours = SpikeConv2d(16, 24, 3, padding=1).to("cuda", dtype, memory_format=layout)
    torchs = nn.Conv2d(16, 24, 3, padding=1).to("cuda", dtype, memory_format=layout)
    torchs.load_state_dict(ours.state_dict())
    grad = torch.randn(torchs(s).shape, device="cuda", dtype=dtype)
    found = [
        (out, *torch.autograd.grad(out, [s, *layer.parameters()], grad, retain_graph=True))
        for layer in (ours, torchs)
        for out in [layer(s)]
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert ours.decision.kept == ("counts" if pool else "bits")


def test_a_training_step_never_waits_for_the_device():
    step = training_step(network().cuda(), *images_and_labels())
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_of_a_training_step_train_and_carry_the_state():
    torch.manual_seed(0)
    captured = network().cuda()
    called = copy.deepcopy(captured)
    images, labels = images_and_labels()
    step, other = (training_step(model, images, labels) for model in (captured, called))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    other()
    for _ in range(4):
        graph.replay()
        torch.testing.assert_close(loss, other(), rtol=1e-3, atol=1e-4)
    states = [[n.state for n in neurons(model) if n.stateful] for model in (captured, called)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)
    assert all(bool(state.any()) for state in states[0])
