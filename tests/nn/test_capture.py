"""What the capture of a CUDA graph forbids, looked for without a GPU: a training step on "meta".

There every value is unknown, so that what asks for one raises; and a mode watches each op for what
waits for the device or moves memory between devices. Kernels are the Triton twins, or the compiled
ops, by what they promise. tests/gpu captures the same step on a device.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import iirsnn
from iirsnn import FusedLIF
from iirsnn.ops import backend as backends
from tests.spiking_step import network, training_step

aten = torch.ops.aten
#: Ops whose result's size, or whose result on the host, depends on values.
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
}


class Watch(TorchDispatchMode):
    """Raises at an op that a capture would refuse."""

    ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        assert func.overloadpacket not in WAITING, func
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        # a number of 0 dimensions is handed to a kernel by value, unless it is copied
        copies = func.overloadpacket in (aten.copy_, aten._to_copy, aten._copy_from)
        devices = {t.device.type for t in tensors if t.dim() or copies}
        assert len(devices) < 2, (func, devices)
        return out


@pytest.fixture(params=["compiled", "triton"])
def kernels(request, monkeypatch):
    """Whose ops are called."""
    if request.param == "triton":
        reason = backends.why_not("triton", "cuda")
        if reason is not None:
            pytest.skip(reason)
        monkeypatch.setattr(backends, "_resolve", lambda name, device: "triton")
    elif not backends.has_kernels("cpu"):
        pytest.skip("iirsnn._C is not compiled")
    return request.param


def test_a_training_step_can_be_captured(kernels):
    with torch.device("meta"):
        model = network()
        images, labels = torch.empty(2, 3, 16, 16), torch.empty(2, dtype=torch.long)
    step = training_step(model, images, labels)
    step()  # before a capture, as everywhere
    states = [neuron.state for neuron in iirsnn.nn.neuron.neurons(model) if neuron.stateful]
    with Watch() as watch:
        step()
    assert watch.ops > 100
    kept = [m.decision.kept for m in model.modules() if getattr(m, "decision", None)]
    assert kept == ["bits", "counts", "bits"]
    after = [neuron.state for neuron in iirsnn.nn.neuron.neurons(model) if neuron.stateful]
    assert len(states) == 1
    assert all(a is b for a, b in zip(states, after, strict=True))


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: float(x.sum()),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3).to("meta"),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_is_forbidden_is_seen(forbidden):
    x = torch.empty(3, device="meta")
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Watch():
        forbidden(x)


def test_a_state_stays_where_it_is():
    """What a replay reads and writes is one piece of memory, whatever is called in between."""
    neuron = FusedLIF(stateful=True)
    neuron(torch.rand(3, 4))
    where = neuron.state.data_ptr()
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            neuron(torch.rand(2, 4, requires_grad=True))
        assert neuron.state.data_ptr() == where
    neuron.reset_state()
    neuron(torch.rand(1, 4))
    assert neuron.state.data_ptr() == where
