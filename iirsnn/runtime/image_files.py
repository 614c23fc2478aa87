"""Image files as a network takes them: one way for training, `iirsnn predict` and the runtime.

Needs Pillow, which `[train]` brings.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from ..errors import RunError, UsageError, one_line

#: Files by these names are images; Pillow is kept from guessing at anything else (PostScript runs).
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

#: What lies behind transparent pixels and around images that are fitted whole: white.
BACKGROUND = 255

FITS = ("crop", "whole")

# Pillow warns of bombs; catching warnings is for one thread at a time
_OPENING = threading.Lock()


class DamagedImage(RunError):
    """An image file that cannot be decoded, or whose pixels have no known meaning.

    A loader re-raises the error of a worker with the worker's whole traceback as its message; the
    line that names the file is the last one, and the only one kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DamagedImage: ", 1)[-1].strip())


@dataclass(frozen=True)
class Preparation:
    """How an image file becomes a network's input; kept in deployed networks as JSON.

    Attributes:
        size: (C, H, W) of the input; C is 1 (gray) or 3 (RGB).
        mean, std: one per channel, of pixels scaled to [0, 1].
        fit: crop (the image fills the input, the middle is kept) or whole (all of it is in the
            input, with `BACKGROUND` at two sides).
        resize: with crop, the length of the image's shorter side, of which the middle is taken; 0:
            files must have the input's size.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "crop"
    resize: int = 0

    def pixels(self, path: str | os.PathLike[str]) -> NDArray[np.uint8]:
        """An image file as uint8 [C, H, W].

        Raises:
            DamagedImage: see `open_image`.
            UsageError: of another size, where it must have the input's.
        """
        return to_array(self.fitted(open_image(path, self.size[0]), path))

    def input(self, path: str | os.PathLike[str]) -> NDArray[np.float32]:
        """An image file as the network takes it, float32 [C, H, W]; raises as `pixels` does."""
        return self.normalised(self.pixels(path))

    def normalised(self, pixels: NDArray[Any], white: int = 255) -> NDArray[np.float32]:
        """Numbers [..., C, H, W] -> float32; the pixel value `white` is scaled to 1."""
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        return (pixels.astype(np.float32) * np.float32(1 / white) - mean) / std

    def fitted(self, image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
        """The image in the input's size. Crops before it scales: a thin image stays small."""
        _, height, width = self.size
        if self.fit == "whole":
            scale = min(width / image.width, height / image.height)
            inner = (
                max(1, round(image.width * scale)),
                max(1, round(image.height * scale)),
            )
            canvas = Image.new(image.mode, (width, height), (BACKGROUND,) * len(image.mode))
            place = (width - inner[0]) // 2, (height - inner[1]) // 2
            canvas.paste(image.resize(inner, Image.Resampling.BILINEAR), place)
            return canvas
        if not self.resize:
            if (image.height, image.width) != (height, width):
                raise UsageError(
                    f"image {os.fspath(path)}: expected {height} x {width} pixels, "
                    f"got {image.height} x {image.width}"
                )
            return image
        short = min(image.width, image.height)
        scaled = [int(self.resize * side / short) for side in (image.width, image.height)]
        left, top = (round((a - b) / 2) for a, b in zip(scaled, (width, height), strict=True))
        x, y = image.width / scaled[0], image.height / scaled[1]
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        return image.resize((width, height), Image.Resampling.BILINEAR, box=box)

    def as_json(self) -> dict[str, Any]:
        """JSON values for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, notes: Any, size: tuple[int, int, int]) -> Preparation:
        """What `as_json` gave, for inputs of a size.

        Raises:
            UsageError: notes that do not say how, naming the value at fault.
        """
        if not isinstance(notes, Mapping):
            raise UsageError("says nothing about its images; expected a file that deploy wrote")
        channels = size[0]
        if channels not in (1, 3):
            raise UsageError(f"expected a network for images of 1 or 3 channels, got {channels}")
        values = {}
        for name in ("mean", "std"):
            given = notes.get(name)
            if (
                not isinstance(given, (list, tuple))
                or len(given) != channels
                or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in given)
            ):
                raise UsageError(f"notes: {name}: expected {channels} finite numbers, got {given}")
            values[name] = tuple(map(float, given))
        if min(values["std"]) <= 0:
            raise UsageError(f"notes: std: expected positive numbers, got {notes['std']}")
        fit, resize = notes.get("fit", "crop"), notes.get("resize", 0)
        if fit not in FITS:
            raise UsageError(f"notes: fit: expected one of {', '.join(FITS)}, got {fit!r}")
        if not isinstance(resize, int) or (resize and resize < max(size[1:])):
            raise UsageError(
                f"notes: resize: expected 0 or at least {max(size[1:])}, got {resize!r}"
            )
        return cls(size, values["mean"], values["std"], fit, resize)


def open_image(path: str | os.PathLike[str], channels: int) -> Image.Image:
    """The first image of a file, upright: mode L for 1 channel, RGB for 3.

    16-bit pixels are rounded to 8 bits, transparent ones composited on `BACKGROUND`, and EXIF
    orientation is applied. Colour profiles are not.

    Raises:
        DamagedImage: naming the file: missing, empty, cut off, no image, of more pixels than Pillow
            takes for a bomb (89 million), or 32-bit integer or floating-point pixels, of which
            nothing says what is white.
    """
    name = os.fspath(path)
    try:
        with Path(path).open("rb") as stream:
            if not stream.read(1):
                raise DamagedImage(f"image {name}: is empty (0 bytes)")
            stream.seek(0)
            with _opened(stream) as image:
                _correct_key(image)
                image.load()  # which turns a TIFF file, and takes its orientation away
                turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
                coloured = _coloured(image, name).convert("L" if channels == 1 else "RGB")
        return coloured if turn is None else coloured.transpose(turn)
    except DamagedImage:
        raise
    except FileNotFoundError:
        raise DamagedImage(f"image {name}: no such file") from None
    except Image.UnidentifiedImageError:
        raise DamagedImage(f"image {name}: cannot be read (no image of a known kind)") from None
    except Exception as error:  # Pillow's readers raise anything over damaged files
        reason = one_line(error) or type(error).__name__
        raise DamagedImage(f"image {name}: cannot be read ({reason})") from None


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """An image of mode L or RGB as uint8 [C, H, W]."""
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _opened(stream: IO[bytes]) -> Image.Image:
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(stream, formats=_FORMATS)


def _correct_key(image: Image.Image) -> None:
    """Scale the transparent gray of a PNG file as Pillow will scale its pixels of 2 or 4 bits."""
    key, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    if image.format == "PNG" and isinstance(key, int) and tiles:
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(tiles[0].args, 1)


def _coloured(image: Image.Image, name: str) -> Image.Image:
    """An image without transparency, in a mode that `convert` makes L or RGB of."""
    # Pillow gives the 16 bits of a PGM file as mode I, scaled to the whole range
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return _eight_bits(image)
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise DamagedImage(
            f"image {name}: expected 8 or 16 bits a channel, got {kind} pixels, "
            "of which nothing says what is white"
        )
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    behind = Image.new("RGBA", image.size, (BACKGROUND,) * 3 + (255,))
    return Image.alpha_composite(behind, image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray pixels (12 in some TIFF files) as mode L, rounded to the nearest."""
    bits, inverted = 16, False
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]
        inverted = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
    white = 2**bits - 1
    pixels = np.asarray(image).astype(np.int64)
    gray = (2 * 255 * pixels + white) // (2 * white)
    if inverted:
        gray = 255 - gray
    if "transparency" in image.info:
        gray[pixels == image.info["transparency"]] = BACKGROUND
    return Image.fromarray(gray.astype(np.uint8))
