"""PackedSpikes: bits, layouts, dtypes."""

import math

import pytest
import torch

from iirsnn import PackedSpikes
from iirsnn.functional import lif

BACKENDS = ["cpu", "reference"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("timesteps", [1, 3])
@pytest.mark.parametrize("neurons", [1, 7, 63, 64, 65, 511, 512, 513, 20001])
def test_unpacks_to_the_spikes(neurons, timesteps, dtype):
    x = (torch.randn(timesteps, neurons) + 0.5).to(dtype)
    packed = lif(x, packed=True)
    assert packed.bits.dtype == torch.uint8
    assert packed.bits.shape == (timesteps, 8 * math.ceil(neurons / 64))
    assert packed.shape == x.shape
    s = packed.unpack(dtype)
    assert s.dtype == dtype
    assert torch.equal(s, lif(x))
    for other in DTYPES:
        assert torch.equal(packed.unpack(other).to(dtype), s)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_are_in_memory_order_and_padded_with_zero(backend):
    x = torch.full((2, 1, 70), 2.0)
    x[0, 0, 1] = 0.0
    bits = lif(x, packed=True, backend=backend).bits
    assert bits[0].tolist() == [0b11111101, *[255] * 7, 0b111111, *[0] * 7]


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_comes_back_channels_last(backend):
    x = torch.randn(2, 3, 5, 4, 4).movedim(2, -1).contiguous().movedim(-1, 2)
    packed = lif(x, packed=True, backend=backend)
    contiguous = lif(x.contiguous(), packed=True, backend=backend)
    assert not torch.equal(packed.bits, contiguous.bits)
    assert packed.unpack(backend=backend).stride() == x.stride()
    assert torch.equal(packed.unpack(backend=backend), contiguous.unpack(backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_current_that_is_the_same_at_every_timestep(backend):
    x = torch.randn(2, 40).expand(3, 2, 40)
    assert torch.equal(lif(x, packed=True, backend=backend).unpack(), lif(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_membrane_comes_along(backend):
    x = torch.randn(4, 100)
    packed, v = lif(x, packed=True, return_v=True, backend=backend)
    s_ref, v_ref = lif(x, return_v=True, backend="reference")
    assert torch.equal(packed.unpack(), s_ref)
    assert torch.equal(v, v_ref)


def test_an_empty_timestep():
    packed = lif(torch.empty(3, 0, 4), packed=True)
    assert packed.bits.shape == (3, 0)
    assert packed.unpack().shape == (3, 0, 4)


def test_packed_is_a_thirty_second_of_the_bytes():
    x = torch.randn(1, 64, 1024)
    assert lif(x, packed=True).bits.numel() * 32 == x.numel() * x.element_size()


def test_moves_between_devices():
    moved = lif(torch.randn(2, 70), packed=True).to("meta")
    assert isinstance(moved, PackedSpikes)
    assert moved.bits.device.type == "meta"
    assert moved.unpack().shape == (2, 70)


def test_a_gradient_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="packed: expected no gradient to be asked for"):
        lif(x, packed=True)
    with torch.no_grad():
        lif(x, packed=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_refused(backend):
    x = torch.randn(3, 2000)
    x[1, 1999] = math.nan
    with pytest.raises(ValueError, match="packed: expected a current without NaN"):
        lif(x, packed=True, backend=backend)


def test_compares_as_an_object():
    """Not bit by bit: `packed.bits` is a tensor to compare."""
    packed = lif(torch.randn(2, 70), packed=True)
    assert packed == packed
    assert packed != lif(torch.randn(2, 70), packed=True)
    assert packed != "bits"
    assert len({packed, packed}) == 1
