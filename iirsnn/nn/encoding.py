"""How an image becomes the input of a spiking network."""

from torch import Tensor


def direct(images: Tensor, timesteps: int) -> Tensor:
    """Direct encoding: the image itself is the input current of layer 1 at every timestep.

    The result is a view with stride 0 in time (for more than one timestep), so nothing is copied:
    layer 1 runs once for all timesteps, and the LIF kernels read its output in place.

    Args:
        images: [B, C, H, W], any shape and dtype.
        timesteps: T, at least 1.

    Returns:
        [T, B, C, H, W], the dtype and the memory of `images`; do not write to it.

    Raises:
        ValueError: `timesteps` is below 1.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps: expected an integer of at least 1, got {timesteps}")
    return images.expand(timesteps, *images.shape)
