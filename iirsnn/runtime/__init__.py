"""Runs a deployed network: NumPy arrays in and out, no torch.

    network = iirsnn.runtime.load("net.iirsnn")
    logits = network(images)                      # float32 [B, C, H, W] -> [B, classes]
    network.classify("image.png").name

The engine is a library of its own (csrc/event/iirsnn.h), the same that `EventNetwork` runs on, so
the bits are the same. It adds the weight rows of the spikes that there are, and uses as many
threads as it is told to.
"""

from .network import Classification, LayerStatistics, Network, load

__all__ = ["Classification", "LayerStatistics", "Network", "load"]
