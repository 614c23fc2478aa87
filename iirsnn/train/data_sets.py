"""The data sets by name: where each is looked for, fetched from, and how it is read."""

import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder

from .. import cache
from ..errors import RunError, UsageError, one_line
from .images import ImageFiles, ImageSet, MemoryImages

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _cache() -> Path:
    folder = cache.folder()
    if folder is None:
        raise RunError(
            "data: expected data.root, HOME or an absolute XDG_CACHE_HOME to say where it lies, "
            "got none of them"
        )
    return folder / "data"


@contextmanager
def _reading(what: str, root: Path, cure: str, *, download: bool = False) -> Iterator[None]:
    """Turn whatever a reader raises over a damaged file or a failed download into one line."""
    try:
        yield
    except Exception as error:  # from AssertionError over URLError to zlib.error
        reason = one_line(error) or type(error).__name__
        attempt = "fetched into" if download else "read from"
        raise RunError(f"{what}: cannot be {attempt} {root}: {reason}; {cure}") from error


def _digits(root: Path | None, download: bool) -> tuple[ImageSet, ImageSet, list[str]]:
    if root is not None:
        raise UsageError(f"data.root: expected none, since digits has no files, got {root}")
    digits = load_digits()
    images = MemoryImages(
        torch.from_numpy(digits.images).to(torch.uint8)[:, None],
        torch.from_numpy(digits.target),
        [0.3053],
        [0.3760],
        pad=1,
        flip=False,
        white=16,
    )
    # the set has no test split of its own: this one is the same for every seed
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0
    )
    return images.select(train), images.select(test), [str(name) for name in digits.target_names]


def _fashion_mnist(root: Path | None, download: bool) -> tuple[ImageSet, ImageSet, list[str]]:
    places = [root] if root else [_DEBIAN_FASHION_MNIST]
    if root is None and cache.folder() is not None:
        places.append(_cache())
    files = [file for file, _ in FashionMNIST.resources]
    cure = (
        f"install Debian's dataset-fashion-mnist or put {', '.join(files)} into {places[-1]} "
        "or the folder that data.root names"
    )
    for place in places:
        if all((place / file).is_file() for file in files):
            with _reading("fashion-mnist", place, cure), TemporaryDirectory() as folder:
                raw = Path(folder) / "FashionMNIST" / "raw"  # torchvision reads unpacked files only
                raw.mkdir(parents=True)
                for file in files:
                    (raw / Path(file).stem).write_bytes(
                        gzip.decompress((place / file).read_bytes())
                    )
                return _open_fashion_mnist(Path(folder))
        raw = place / "FashionMNIST" / "raw"
        if all((raw / Path(file).stem).is_file() for file in files):
            with _reading("fashion-mnist", place, cure):
                return _open_fashion_mnist(place)
    if root is None:
        _cache()  # or an error: the download goes there
    if not download:
        looked = " or ".join(map(str, places))
        raise RunError(f"fashion-mnist: not found in {looked}; set data.download=true or {cure}")
    with _reading("fashion-mnist", places[-1], cure, download=True):
        return _open_fashion_mnist(places[-1], download=True)


def _open_fashion_mnist(root: Path, download: bool = False) -> tuple[ImageSet, ImageSet, list[str]]:
    train, test = (
        MemoryImages(data.data[:, None], data.targets, [0.2860], [0.3530], pad=0, flip=True)
        for data in (FashionMNIST(root, train=part, download=download) for part in (True, False))
    )
    return train, test, FashionMNIST.classes


def _cifar(
    source: type[CIFAR10],
    mean: Sequence[float],
    std: Sequence[float],
    root: Path | None,
    download: bool,
) -> tuple[ImageSet, ImageSet, list[str]]:
    name, root = source.__name__.lower(), root or _cache()
    cure = f"unpack {source.filename} into {root} or the folder that data.root names"
    if not download and not (root / source.base_folder).is_dir():
        raise RunError(
            f"{name}: no folder {source.base_folder} in {root}; set data.download=true or {cure}"
        )
    with _reading(name, root, cure, download=download):
        parts = [source(root, train=part, download=download) for part in (True, False)]
        train, test = (
            MemoryImages(
                torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(data.targets),
                mean,
                std,
                pad=4,
                flip=True,
            )
            for data in parts
        )
    return train, test, parts[0].classes


def _imagenet(root: Path | None, download: bool) -> tuple[ImageSet, ImageSet, list[str]]:
    root = root or _cache() / "imagenet"
    cure = "set data.root to a folder of train/<class>/*.JPEG and val/<class>/*.JPEG"
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise RunError(f"imagenet: no folder {root / part}; it cannot be downloaded: {cure}")
    with _reading("imagenet", root, cure):
        train, test = (ImageFolder(root / part) for part in ("train", "val"))
        if train.classes != test.classes:
            raise ValueError("train/ and val/ hold different classes")
    train_set, test_set = (
        ImageFiles([file for file, _ in part.samples], torch.tensor(part.targets))
        for part in (train, test)
    )
    return train_set, test_set, train.classes


#: The data set of `iirsnn.train.image_folder`.
FOLDER = "folder"

#: The others: each takes (root or None, download) and returns (training set, test set, names).
DATA_SETS: dict[str, Callable[[Path | None, bool], tuple[ImageSet, ImageSet, list[str]]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_cifar, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": partial(_cifar, CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": _imagenet,
}
