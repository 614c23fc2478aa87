"""A network in memory, and what its calls give."""

from __future__ import annotations

import functools
import os
import threading
from ctypes import c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RunError, UsageError
from .engine import Call, Engine
from .library import check, library

if TYPE_CHECKING:  # the first answer does not wait for what only some programs need
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Classification:
    """The class of an image.

    Attributes:
        index: of the largest logit.
        name: of the class; its number where the file names none.
        probability: softmax of its logit.
        logits: float32 [classes].
    """

    index: int
    name: str
    probability: float
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer did in a call, summed over its images and timesteps; see csrc/event/iirsnn.h.

    Attributes:
        kind, name: of the layer.
        shape: (channels, rows, columns) of what it gives.
        neurons: of one image; 0 without neurons.
        spikes: that they gave.
        additions: of weights and counts.
        multiplications: of real values, those of the image among them.
        weight_bytes, spike_bytes, value_bytes: read and written.
        milliseconds: wall-clock time.
    """

    kind: str
    name: str
    shape: tuple[int, int, int]
    neurons: int
    spikes: int
    additions: int
    multiplications: int
    weight_bytes: int
    spike_bytes: int
    value_bytes: int
    milliseconds: float


class Network:
    """A deployed network; made by `load`.

    Any number of threads may call one at once. It survives a fork, and cannot be pickled: a process
    loads its own.

    Attributes:
        image_shape: (channels, height, width).
        classes: logits of an image.
        class_names: of the classes; None where the file has none.
        timesteps: T.
        layers: how many there are.
        weight_bytes: in memory.
        threads: that a call may use; 0: as many as there are cores.
    """

    def __init__(self, content: bytes | str | os.PathLike[str], threads: int = 0) -> None:
        """content: of a file, or the file's path. Raises UsageError for threads that are none."""
        self._engine = Engine(content)
        facts = self._engine.facts
        self.image_shape: tuple[int, int, int] = (facts.channels, facts.height, facts.width)
        self.classes, self.timesteps, self.layers = facts.classes, facts.timesteps, facts.layers
        self.weight_bytes: int = facts.weight_bytes
        handle = self._engine.handle
        names = [library().iirsnn_class_name(handle, index) for index in range(self.classes)]
        self.class_names = None if None in names else [name.decode() for name in names]
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise UsageError(f"threads: expected an integer of at least 0, got {threads!r}")
        self.threads = threads
        self._last = threading.local()

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.image_shape))
        return f"Network({shape}, {self.classes} classes, T={self.timesteps})"

    def __reduce__(self) -> Any:
        raise TypeError("a runtime.Network cannot be pickled; load its file in each process")

    def __call__(self, images: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """images: floating [B, C, H, W], as training saw them -> logits float32 [B, classes].

        Raises:
            UsageError: another shape or dtype, or values that are not finite.
        """
        images = np.asarray(images)
        if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
            got = f"{images.dtype} {list(images.shape)}"
            raise UsageError(f"images: expected floating [B, C, H, W], got {got}")
        if images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UsageError(f"images: expected [B, {expected}], got {list(images.shape)}")
        images = np.ascontiguousarray(images, np.float32)
        logits = np.empty((len(images), self.classes), np.float32)
        self._last.call = None  # its memory is for this call
        self._last.call = self._engine.run(
            images.ctypes.data, len(images), logits.ctypes.data, self.threads
        )
        return logits

    def prepare(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [H, W, C] -> an image float32 [C, H, W] as training saw it.

        Raises:
            UsageError: another size or dtype, or a file that does not say how images are made.
        """
        pixels = np.asarray(pixels)
        if pixels.ndim != 3 or pixels.dtype != np.uint8:
            got = f"{pixels.dtype} {list(pixels.shape)}"
            raise UsageError(f"pixels: expected uint8 [H, W, C], got {got}")
        pixels = np.ascontiguousarray(pixels)
        image = np.empty(self.image_shape, np.float32)
        at = (each.ctypes.data_as(c_void_p) for each in (pixels, image))
        check(library().iirsnn_prepare(self._engine.handle, next(at), *pixels.shape, next(at)))
        return image

    def classify(self, image: NDArray[np.uint8] | str | os.PathLike[str]) -> Classification:
        """The class of one image.

        Args:
            image: uint8 [H, W, C] of the network's own size, or the path of an image file, which is
                read as training read them (needs Pillow).

        Raises:
            UsageError: another size or dtype, a file that does not say how images are made, or no
                Pillow.
            RunError: an image file that cannot be read.
        """
        if isinstance(image, (str, os.PathLike)):
            prepared = self._preparation.input(image)
        else:
            prepared = self.prepare(image)
        logits = self(prepared[None])[0]
        odds = np.exp(logits - logits.max())
        index = int(logits.argmax())
        name = self.class_names[index] if self.class_names else str(index)
        return Classification(index, name, float(odds[index] / odds.sum()), logits)

    @functools.cached_property
    def _preparation(self) -> Any:
        try:
            from .image_files import Preparation
        except ModuleNotFoundError as error:
            raise UsageError(
                f"image files need Pillow, which is not installed ({error}); "
                "expected a uint8 array [H, W, C] without it"
            ) from error
        import json

        notes = library().iirsnn_image_notes(self._engine.handle)
        try:
            return Preparation.from_json(notes and json.loads(notes), self.image_shape)
        except UsageError as error:
            raise UsageError(f"network: {error}") from None

    def statistics(self) -> list[LayerStatistics]:
        """What each layer did in this thread's last call.

        Raises:
            RunError: this thread has made no call yet.
        """
        found = []
        for layer in self._last_call("statistics").layers():
            channels, height, width = (layer.pop(key) for key in ("channels", "height", "width"))
            found.append(LayerStatistics(shape=(channels, height, width), **layer))
        return found

    def call_bytes(self) -> int:
        """Of the memory, beside the weights, that this thread's last call worked in.

        Raises:
            RunError: this thread has made no call yet.
        """
        return self._last_call("call_bytes").memory()

    def _last_call(self, what: str) -> Call:
        call: Call | None = getattr(self._last, "call", None)
        if call is None:
            raise RunError(f"{what}: expected a call of the network by this thread first")
        return call


def load(path: str | os.PathLike[str], *, threads: int = 0) -> Network:
    """The network in a file that `iirsnn deploy` or `EventNetwork.save` wrote.

    Args:
        path: of the file.
        threads: that a call may use; 0: as many as there are cores.

    Raises:
        RunError: missing, truncated, damaged, of a newer or older format, or no such network.
        UsageError: threads is no integer of at least 0.
    """
    return Network(path, threads)
