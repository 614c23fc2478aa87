"""The splits of a data set and their batches, exactly repeatable from any batch on.

The order of an epoch depends on (seed, epoch) alone and the augmentation of an image on
(seed, epoch, index) alone; neither depends on the number of workers or on where an epoch starts,
and no random state of the process is touched.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import BatchSampler, DataLoader

from ..errors import RunError, UsageError, check_choice
from ..runtime.image_files import FITS, Preparation
from . import image_folder
from .data_sets import DATA_SETS, FOLDER
from .images import ORDER, Augmented, ImageSet, MemoryImages, Sample, random_stream


@dataclass
class DataConfig:
    """The data section of a recipe.

    Attributes:
        name: digits, fashion-mnist, cifar10, cifar100, imagenet, or folder (anyone's images: see
            `iirsnn.train.image_folder`).
        root: folder of the data; "" is the data set's default place.
        image_size: of folder, the side in pixels that images are brought to.
        gray: of folder, one channel instead of three.
        fit: of folder, crop (the middle of an image, in full height or width) or whole (all of it,
            with white at two sides).
        test: of folder, the fraction that is held out for the test where DIR has no test images of
            its own; null is 0.2.
        unreadable: of folder, error or skip: what an image that cannot be read is.
        download: fetch what is missing.
        validation: fraction of the training set that is held out for every choice.
        train_images: use so many training images only, as many of each class; 0 for all.
        augment: random crops, mirroring, cutout and erasing of training images.
        pad: border that crops reach into; None for the data set's own.
        flip: mirror half of the images; None for the data set's own.
        cutout: side of a square at a random place that is set to the mean (DeVries and Taylor,
            arXiv 1708.04552); 0 for none.
        erasing: probability that a rectangle of random size, shape and place is set to the mean
            (Zhong et al., arXiv 1708.04896: 2 % to a third of the area, sides 0.3 to 1 and less).
        workers: processes that load; 0 loads in the main one.
        batch_size: images of a step, of all processes together.
        test_batch_size: images of a forward pass in validation and test.
    """

    name: str = "digits"
    root: str = ""
    image_size: int = 0
    gray: bool = False
    fit: str = "crop"
    test: float | None = None
    unreadable: str = "error"
    download: bool = True
    validation: float = 0.1
    train_images: int = 0
    augment: bool = True
    pad: int | None = None
    flip: bool | None = None
    cutout: int = 0
    erasing: float = 0.0
    workers: int = 0
    batch_size: int = 64
    test_batch_size: int = 256


@dataclass
class Splits:
    """The three parts of a data set, none of them augmented (`train_batches` does that)."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    class_names: list[str]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.train.image_shape

    def description(self) -> dict[str, Any]:
        """JSON values that tell whether data is the same: names, numbers, how images are made."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        counts = {
            name: torch.bincount(part.labels, minlength=self.classes).tolist()
            for name, part in parts.items()
        }
        return {
            "class_names": self.class_names,
            "images": self.train.preparation.as_json(),
            "images_by_class": counts,
            "checksums": {name: part.checksum() for name, part in parts.items()},
        }


def load(config: DataConfig, seed: int) -> Splits:
    """Open a data set and hold out its validation split, stratified by class and fixed by `seed`.

    Raises:
        UsageError: an unknown data set or a value out of range.
        RunError: the data is missing, damaged or could not be fetched.
    """
    check_choice("data.name", config.name, (*DATA_SETS, FOLDER))
    if not 0 < config.validation < 1:
        raise UsageError(f"data.validation: expected between 0 and 1, got {config.validation}")
    if min(config.batch_size, config.test_batch_size) < 1 or config.workers < 0:
        raise UsageError(
            "data: expected batch_size and test_batch_size of at least 1 and workers of at least "
            f"0, got {config.batch_size}, {config.test_batch_size} and {config.workers}"
        )
    for name in ("train_images", "pad", "cutout"):
        value = getattr(config, name)
        if value is not None and value < 0:
            raise UsageError(f"data.{name}: expected at least 0, got {value}")
    if not 0 <= config.erasing <= 1:
        raise UsageError(f"data.erasing: expected from 0 to 1, got {config.erasing}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed: expected from 0 to {2**32 - 1}, got {seed}")
    root = _root(config.root)
    train: ImageSet
    validation: ImageSet | None = None
    test: ImageSet
    if config.name == FOLDER:
        train, validation, test, class_names = image_folder.read(
            *_folder_arguments(config, root), skip=config.unreadable == "skip"
        )
    else:
        _require_defaults(config)
        train, test, class_names = DATA_SETS[config.name](root, config.download)
    for name, value in (("pad", config.pad), ("flip", config.flip)):
        if value is None:
            continue
        if not isinstance(train, MemoryImages):
            raise UsageError(
                f"data.{name}: expected null, since {config.name} has crops of its own"
            )
        setattr(train, name, value)
    kept = np.arange(len(train))
    if validation is None:
        try:
            kept, held_out = train_test_split(
                kept,
                test_size=config.validation,
                stratify=train.labels.numpy(),
                random_state=seed,
            )
        except ValueError as error:  # too few images for one of each class on both sides
            raise UsageError(f"data.validation={config.validation}: {error}") from None
        validation = train.select(np.sort(held_out))
    if config.train_images:
        kept = _fewer(kept, train.labels.numpy(), config.train_images, seed)
    train = train.select(np.sort(kept))
    splits = Splits(train, validation, test, class_names)
    return _normalised(splits) if config.name == FOLDER else splits


def _root(root: str) -> Path | None:
    try:
        return Path(root).expanduser() if root else None
    except RuntimeError as error:  # ~ of a user without a home
        raise UsageError(f"data.root: {root}: {error}") from None


def _folder_arguments(
    config: DataConfig, root: Path | None
) -> tuple[Path, float | None, Preparation]:
    if root is None:
        raise UsageError("data.root: expected the folder of the images, got none")
    check_choice("data.fit", config.fit, FITS)
    check_choice("data.unreadable", config.unreadable, ("error", "skip"))
    side = config.image_size
    if not 1 <= side <= 4096:
        raise UsageError(f"data.image_size: expected from 1 to 4096 pixels, got {side}")
    size = (1 if config.gray else 3, side, side)
    resize = side if config.fit == "crop" else 0
    return root, config.test, Preparation(size, (), (), config.fit, resize)


def _require_defaults(config: DataConfig) -> None:
    """Settings of `folder` alone are not given to another data set, where they would do nothing."""
    for name in ("image_size", "gray", "fit", "test", "unreadable"):
        default, value = getattr(DataConfig, name), getattr(config, name)
        if value != default:
            raise UsageError(
                f"data.{name}: expected {default}, since {config.name} has images of its own kind, "
                f"got {value}"
            )


def _normalised(splits: Splits) -> Splits:
    """All parts by the mean and standard deviation of the training images' channels."""
    parts = splits.train, splits.validation, splits.test
    train, validation, test = (part for part in parts if isinstance(part, MemoryImages))
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in train.pixels.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        share = counts / counts.sum()
        mean.append(float((share * levels).sum()))
        std.append(float((share * (levels - mean[-1]) ** 2).sum().sqrt()))
    if min(std) == 0:
        raise RunError("data: expected training images that differ, got one value in all pixels")
    train, validation, test = (p.normalised_by(mean, std) for p in (train, validation, test))
    return Splits(train, validation, test, splits.class_names)


def _fewer(indices: np.ndarray, labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` of the indices, stratified by label."""
    classes = len(np.unique(labels))
    if not classes <= count <= len(indices) - classes:
        raise UsageError(
            f"data.train_images: expected 0 for all, or from {classes} to "
            f"{len(indices) - classes}, got {count}"
        )
    chosen, _ = train_test_split(
        indices, train_size=count, stratify=labels[indices], random_state=seed
    )
    return chosen


def batch_sizes(images: int, batch_size: int) -> list[int]:
    """The sizes of the batches of an epoch over so many training images.

    The last batch may be smaller; it is left out if it would hold a single image, of which batch
    normalisation cannot make sense.
    """
    full, rest = divmod(images, batch_size)
    return [batch_size] * full + ([rest] if rest > 1 else [])


def part(size: int, share: tuple[int, int]) -> tuple[int, int]:
    """From where to where a batch of `size` images is that of process `rank` of `count`."""
    rank, count = share
    return rank * size // count, (rank + 1) * size // count


def train_batches(
    splits: Splits,
    config: DataConfig,
    *,
    seed: int,
    epoch: int,
    start_batch: int = 0,
    share: tuple[int, int] = (0, 1),
) -> DataLoader[Sample]:
    """The batches of an epoch, shuffled and augmented, from `start_batch` on.

    Yields (images float32 [B, C, H, W], labels int64 [B]). For share=(rank, count) each of `count`
    processes gets its part of every batch, see `part`; one whose part is empty gets an image that
    it has to leave out.
    """
    order = random_stream(seed, epoch, ORDER).permutation(len(splits.train))
    parts, start = [], 0
    for size in batch_sizes(len(order), config.batch_size):
        first, last = part(size, share)
        parts.append(order[start + first : start + max(last, first + 1)].tolist())
        start += size
    return DataLoader(
        Augmented(splits.train, seed, epoch, cutout=config.cutout, erasing=config.erasing)
        if config.augment
        else splits.train,
        batch_sampler=parts[start_batch:],
        **_loader_options(config),
    )


def eval_rounds(dataset: ImageSet, config: DataConfig, count: int) -> int:
    """The most batches of `eval_batches` that any of `count` processes has."""
    return -(-len(dataset) // (config.test_batch_size * count))


def eval_batches(
    dataset: ImageSet, config: DataConfig, share: tuple[int, int] = (0, 1)
) -> DataLoader[Sample]:
    """The batches of a split in its own order: (images [B, C, H, W], labels [B]).

    For share=(rank, count) they are dealt to `count` processes, each image to one of them.
    """
    rank, count = share
    batches = list(BatchSampler(range(len(dataset)), config.test_batch_size, drop_last=False))
    return DataLoader(dataset, batch_sampler=batches[rank::count], **_loader_options(config))


def _loader_options(config: DataConfig) -> dict:
    # without a generator of its own, a loader draws from the global one on every epoch
    return {
        "num_workers": config.workers,
        "generator": torch.Generator(),
        "pin_memory": torch.cuda.is_available(),
    }
