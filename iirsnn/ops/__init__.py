"""What runs: importing this room defines the ops iirsnn::*, and loads their compiled kernels.

A program that torch.export wrote needs that before it can be loaded.
"""

from . import backend, batch_norm, lif, spike, state
from .packed import PackedSpikes

__all__ = ["PackedSpikes", "backend", "batch_norm", "lif", "spike", "state"]
