"""Anyone's images: a folder of class folders, decoded once and kept in memory.

DIR/train/CLASS/..., DIR/val/CLASS/..., DIR/test/CLASS/...   val/ or test/ may be missing
DIR/CLASS/...                                                split here, the same for every seed

Images are found at any depth of a class folder. Hidden files and folders are left out, and so is a
symbolic link to what lies in DIR anyway.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
import warnings
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .. import atomic_files, cache
from ..errors import RunError, UsageError
from ..runtime.image_files import SUFFIXES, DamagedImage, Preparation
from .images import MemoryImages

_FORMAT = 1  # of the cache; another one when an image gives other pixels than before
_NOT_CLASSES = ("__MACOSX",)  # what macOS puts into archives


class Parts(NamedTuple):
    """The images of a folder, not yet normalised; validation is None where train is to be split."""

    train: MemoryImages
    validation: MemoryImages | None
    test: MemoryImages
    class_names: list[str]


def read(
    root: Path, test_fraction: float | None, preparation: Preparation, *, skip: bool = False
) -> Parts:
    """The images of a folder.

    Args:
        root: DIR above.
        test_fraction: of the images, stratified by class; None is 0.2 for a folder without test
            images of its own.
        preparation: how each is brought to its size; mean and std are not used.
        skip: leave out images that cannot be read, with one warning that says how many.

    Raises:
        RunError: no such folder, no images, an empty class, or images that cannot be read.
        UsageError: a test_fraction that is not in (0, 1) or that the folder has no use for; images
            that do not fit into memory.
    """
    root = root.absolute()
    subfolders = _subfolders(root)
    own = {"train", "val", "test"} & set(subfolders)
    if "train" not in own or len(own) == 1:
        fraction = 0.2 if test_fraction is None else test_fraction
        if not 0 < fraction < 1:
            raise UsageError(f"data.test: expected between 0 and 1, got {fraction}")
        found = _classes(root, subfolders, root)
        every = _images(root, found, preparation, skip)
        rows = np.arange(len(every))
        labels = every.labels.numpy()
        try:
            train, test = train_test_split(
                rows, test_size=fraction, stratify=labels, random_state=0
            )
        except ValueError as error:
            raise UsageError(f"data.test={fraction}: {error}") from None
        return Parts(every.select(np.sort(train)), None, every.select(np.sort(test)), list(found))
    others = sorted(set(subfolders) - own)
    if others:
        raise RunError(
            f"folder {root}: expected train/, val/ and test/ alone, or class folders alone, "
            f"got {', '.join(sorted(own))} beside {', '.join(others[:3])}"
        )
    if test_fraction is not None:
        raise UsageError(
            f"data.test: expected null, since {root} has test images of its own, "
            f"got {test_fraction}"
        )
    found_by_part = {
        part: _classes(root / part, _subfolders(root / part), root) for part in sorted(own)
    }
    names = list(found_by_part["train"])
    for part, found in found_by_part.items():
        if list(found) != names:
            differing = sorted(set(found) ^ set(names))
            raise RunError(
                f"folder {root}: expected the same classes in train/ and {part}/, "
                f"but {differing[0]} is in one of them alone"
            )
    parts = {part: _images(root, found, preparation, skip) for part, found in found_by_part.items()}
    # the set that is left for the end: with train/ and val/ alone, as ImageNet has them, val/
    test_part = parts.pop("test", None) or parts.pop("val")
    return Parts(parts["train"], parts.get("val"), test_part, names)


def _subfolders(root: Path) -> dict[str, Path]:
    """The visible folders in a folder, in the order of their names."""
    try:
        entries = list(root.iterdir())
    except OSError as error:
        raise RunError(f"folder {root}: cannot be read ({error.strerror})") from error
    found: dict[str, Path] = {}
    for path in entries:
        if path.name.startswith(".") or path.name in _NOT_CLASSES or not path.is_dir():
            continue
        # the same letters on every system: macOS writes them in another form
        name = os.fsencode(unicodedata.normalize("NFC", path.name)).decode("utf-8", "replace")
        if name in found:
            raise RunError(f"folder {root}: two folders are named {name}")
        found[name] = path
    return dict(sorted(found.items()))


def _classes(root: Path, subfolders: dict[str, Path], top: Path) -> dict[str, list[Path]]:
    """The image files of each class."""
    found = {name: _image_files(path, top) for name, path in subfolders.items()}
    if len(found) < 2:
        raise RunError(
            f"folder {root}: expected a folder for each of two or more classes, "
            f"got {len(found)}{''.join(f' ({name})' for name in found)}"
        )
    for name, files in found.items():
        if not files:
            raise RunError(
                f"folder {root}: class {name} has no image in it "
                f"(expected files named {', '.join('*' + suffix for suffix in SUFFIXES)})"
            )
    return found


def _image_files(folder: Path, top: Path) -> list[Path]:
    """The visible images below a folder, in the order of their paths."""
    real_top, seen, files = os.path.realpath(top), set(), []
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:  # a link to a folder above itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_elsewhere(os.path.join(here, name), real_top)
        ]
        files += [
            Path(here, name)
            for name in names
            if not name.startswith(".")
            and name.lower().endswith(SUFFIXES)
            and not _is_elsewhere(os.path.join(here, name), real_top)
        ]
    return sorted(files, key=os.fsencode)


def _is_elsewhere(path: str, real_top: str) -> bool:
    """Whether a path is a link to what is found in the folder itself."""
    return os.path.islink(path) and os.path.realpath(path).startswith(real_top + os.sep)


def _images(
    root: Path, found: dict[str, list[Path]], preparation: Preparation, skip: bool
) -> MemoryImages:
    """The images of all classes; labels are places in `found`.

    Raises:
        DamagedImage: a file that cannot be read, or with `skip` a class of none but such.
    """
    files = [file for each in found.values() for file in each]
    labels = [label for label, each in enumerate(found.values()) for _ in each]
    channels = preparation.size[0]
    pixels, damage = _pixels(root, files, preparation)
    images = MemoryImages(
        pixels,
        torch.tensor(labels),
        [0.0] * channels,
        [1.0] * channels,
        pad=max(1, preparation.size[1] // 8),
        flip=True,
        fit=preparation.fit,
        resize=preparation.resize,
    )
    if not damage:
        return images
    first, rest = damage[min(damage)], len(damage) - 1
    left = [index for index in range(len(files)) if index not in damage]
    if not skip or len({labels[index] for index in left}) < len(found):
        raise DamagedImage(first + (f"; {rest} more cannot be read either" if rest else ""))
    warnings.warn(f"{len(damage)} of {len(files)} images are left out: {first}", stacklevel=2)
    return images.select(np.array(left))


def _pixels(
    root: Path, files: Sequence[Path], preparation: Preparation
) -> tuple[Tensor, dict[int, str]]:
    """uint8 [N, C, H, W], and why which of them could not be read.

    Decoded once, then read from the cache while no file has changed.
    """
    shape = (len(files), *preparation.size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = int(np.prod(shape, dtype=np.int64))
    if needed > memory // 2:
        raise UsageError(
            f"folder {root}: expected images that take at most half of the memory, "
            f"{memory / 2e9:.1f} GB, got {needed / 1e9:.1f} GB; set data.image_size to less"
        )
    cached = _cached(root, files, preparation)
    damage: dict[int, str] = {}
    if cached is not None:
        with suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            with np.load(cached, allow_pickle=False) as stored:
                pixels = torch.from_numpy(stored["pixels"])
                damage = dict(json.loads(str(stored["damage"])))
            if pixels.shape == shape and pixels.dtype == torch.uint8:
                return pixels, damage
    pixels = torch.zeros(shape, dtype=torch.uint8)
    damage = {}

    def decode(index: int) -> None:
        try:
            pixels[index] = torch.from_numpy(preparation.pixels(files[index]))
        except DamagedImage as error:
            damage[index] = str(error)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(decode, range(len(files))))
    if cached is not None:
        with suppress(OSError, RunError):  # a cache that cannot be written is none
            cached.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_atomically(cached, lambda name: _save(name, pixels, damage))
    return pixels, damage


def _save(name: str, pixels: Tensor, damage: dict[int, str]) -> None:
    with open(name, "wb") as file:
        np.savez(file, pixels=pixels.numpy(), damage=np.array(json.dumps(sorted(damage.items()))))


def _cached(root: Path, files: Sequence[Path], preparation: Preparation) -> Path | None:
    """Where the pixels of these files are kept: under another name once one has changed."""
    folder = cache.folder()
    if folder is None:
        return None
    facts = hashlib.sha256(
        repr((_FORMAT, preparation.size, preparation.fit, preparation.resize)).encode()
    )
    for file in files:
        try:
            status = file.stat()
        except OSError as error:
            raise DamagedImage(f"image {file}: cannot be read ({error.strerror})") from None
        facts.update(os.fsencode(file) + b"\0")
        facts.update(repr((status.st_size, status.st_mtime_ns)).encode())
    return folder / "data" / f"folder-{facts.hexdigest()[:16]}.npz"
