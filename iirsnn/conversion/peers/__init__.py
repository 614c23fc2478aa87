"""Neurons of other libraries: one module a library, imported where a model uses that library.

Each knows its neurons (`is_neuron`), the subclass that takes the place of each (`FUSED`) and how to
run one over time whatever its signature (`unroll`). A subclass changes the forward pass and nothing
else, so parameters, state_dict, state, call signature and the library's own reset stay.
"""
