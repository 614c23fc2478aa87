"""Triton kernels, their launchers, and the ops iirsnn::triton_* made of them."""

from . import ops

__all__ = ["ops"]
