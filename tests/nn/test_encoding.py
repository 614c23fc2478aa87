import pytest
import torch

from iirsnn.nn import direct


@pytest.mark.parametrize("timesteps", [2, 5])
def test_direct_repeats_the_image_without_a_copy(timesteps):
    images = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    current = direct(images, timesteps)
    assert current.shape == (timesteps, 4, 3, 5, 7)
    assert current.stride() == (0, *images.stride())
    assert current.data_ptr() == images.data_ptr()
    assert all(torch.equal(step, images) for step in current)


def test_direct_at_one_timestep_is_the_image():
    images = torch.randn(4, 9)
    current = direct(images, 1)
    assert current.shape == (1, 4, 9)
    assert current.data_ptr() == images.data_ptr()


def test_direct_passes_the_gradient_of_every_timestep():
    images = torch.randn(2, 3, requires_grad=True)
    (direct(images, 3) * torch.tensor([1.0, 2.0, 4.0])[:, None, None]).sum().backward()
    assert torch.equal(images.grad, torch.full((2, 3), 7.0))


@pytest.mark.parametrize("timesteps", [0, -1])
def test_direct_needs_a_timestep(timesteps):
    with pytest.raises(ValueError, match=f"timesteps: expected .* at least 1, got {timesteps}"):
        direct(torch.zeros(1, 1), timesteps)
