"""A network in the library's memory, and what its calls did: under `Network` and `EventNetwork`."""

from __future__ import annotations

import os
from ctypes import POINTER, byref, c_int64, c_uint64, c_void_p
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError
from .library import Facts, Layer, NoNetwork, check, library

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAMES = [name for name, *_ in Layer._fields_]
_VALUES = attrgetter(*_NAMES)


class Engine:
    """A network that any number of threads may run.

    Attributes:
        handle: of iirsnn.h.
        facts: of the network.
    """

    def __init__(self, content: bytes | str | os.PathLike[str]) -> None:
        """content: of a file, or the file's path.

        Raises:
            RunError: there is no such file, or it holds no network (NoNetwork).
        """
        handle, facts = c_void_p(), Facts()
        if isinstance(content, bytes):
            check(library().iirsnn_load_memory(content, len(content), byref(handle)))
        else:
            path = os.fspath(content)
            if not Path(path).is_file():
                raise RunError(f"network {path}: no such file")
            try:
                check(library().iirsnn_load_file(os.fsencode(path), byref(handle)))
            except NoNetwork as error:
                raise NoNetwork(error.reason.removeprefix(f"{path}: "), path) from None
        self.handle = handle
        check(library().iirsnn_describe(handle, byref(facts)))
        self.facts = facts

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            library().iirsnn_release(self.handle)

    def run(self, images: int, count: int, logits: int, threads: int) -> Call:
        """Addresses of float32 [count, C, H, W] and [count, classes], both contiguous.

        Raises:
            UsageError: values that are not finite.
        """
        call = c_void_p()
        check(library().iirsnn_run(self.handle, images, count, threads, logits, byref(call)))
        return Call(call, count, self.facts)


class Call:
    """What a call did; it keeps its network."""

    def __init__(self, handle: c_void_p, images: int, facts: Facts) -> None:
        self.handle, self.images, self.facts = handle, images, facts

    def __del__(self) -> None:
        library().iirsnn_free_call(self.handle)

    def layer(self, index: int) -> Layer:
        found = Layer()
        check(library().iirsnn_layer_of(self.handle, index, byref(found)))
        return found

    def layers(self) -> list[dict[str, Any]]:
        """The fields of iirsnn_layer, one dict a layer."""
        found = []
        for index in range(self.facts.layers):
            layer = self.layer(index)
            values = dict(zip(_NAMES, _VALUES(layer), strict=True))
            found.append({**values, "kind": layer.kind.decode(), "name": layer.name.decode()})
        return found

    def memory(self) -> int:
        """Bytes that it worked in, beside the weights: spikes, real values, sums."""
        found = c_int64()
        check(library().iirsnn_memory_of(self.handle, byref(found)))
        return found.value

    def spikes(self, index: int) -> NDArray[np.uint8]:
        """Of a layer with neurons: 0 and 1, [B, T, H, W, C]."""
        layer, words = self.layer(index), POINTER(c_uint64)()
        check(library().iirsnn_spikes_of(self.handle, index, byref(words)))
        shape = (self.images, self.facts.timesteps, layer.height, layer.width)
        if not self.images:
            return np.zeros((*shape, layer.channels), np.uint8)
        all_words = np.ctypeslib.as_array(words, (*shape, -(-layer.channels // 64)))
        # little-endian words: byte k of a word holds channels 8k to 8k + 7
        bits = np.unpackbits(all_words.view(np.uint8), axis=-1, bitorder="little")
        return bits[..., : layer.channels]
