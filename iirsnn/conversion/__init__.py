"""ANN to SNN: fold BatchNorm, exchange ReLU for neurons, balance their thresholds; neurons of other
libraries to ours; networks as NIR and ONNX.

Not `iirsnn.convert`: that is the function, and importing a package binds its name in the parent.
"""

from .ann_to_snn import NeuronConfig, convert, to_spiking
from .batch_norm_folding import fold_batch_norm, folded
from .nir import from_nir, to_nir
from .onnx import to_onnx
from .replace import Replacement, Replacements, replace_neurons
from .thresholds import balance_thresholds

__all__ = [
    "NeuronConfig",
    "Replacement",
    "Replacements",
    "balance_thresholds",
    "convert",
    "fold_batch_norm",
    "folded",
    "from_nir",
    "replace_neurons",
    "to_nir",
    "to_onnx",
    "to_spiking",
]
