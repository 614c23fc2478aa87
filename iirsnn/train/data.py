"""Data sets, their splits and their batches, exactly repeatable from any batch on.

The order of an epoch depends on (seed, epoch) alone and the augmentation of an image on
(seed, epoch, index) alone; neither depends on the number of workers or on where an epoch starts,
and no random state of the process is touched.
"""

import gzip
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST, ImageFolder
from torchvision.transforms import v2

from ..errors import RunError, UsageError, check_choice, one_line

Sample = tuple[Tensor, int]  # image float32 [C, H, W], label

_ORDER, _AUGMENTATION, _CUTOUT = 0, 1, 2  # what an epoch draws, each from a stream of its own


@dataclass
class DataConfig:
    """The data section of a recipe.

    Attributes:
        name: digits, fashion-mnist, cifar10, cifar100 or imagenet.
        root: folder of the data; "" is the data set's default place.
        download: fetch what is missing.
        validation: fraction of the training set that is held out for every choice.
        train_images: use so many training images only, as many of each class; 0 for all.
        augment: random crops, mirroring and cutout of training images.
        pad: border that crops reach into; None for the data set's own.
        flip: mirror half of the images; None for the data set's own.
        cutout: side of a square at a random place that is set to the mean (DeVries and Taylor,
            arXiv 1708.04552); 0 for none.
        workers: processes that load; 0 loads in the main one.
    """

    name: str = "digits"
    root: str = ""
    download: bool = True
    validation: float = 0.1
    train_images: int = 0
    augment: bool = True
    pad: int | None = None
    flip: bool | None = None
    cutout: int = 0
    workers: int = 0
    batch_size: int = 64
    test_batch_size: int = 256


class DamagedImage(RunError):
    """An image file that cannot be decoded.

    A loader re-raises the error of a worker with the worker's whole traceback as its message; the
    line that names the file is the last one, and the only one kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rsplit("DamagedImage: ", 1)[-1].strip())


class ImageSet(Dataset[Sample], ABC):
    """Labelled images as the network sees them, not augmented: (float32 [C, H, W], int label)."""

    labels: Tensor  # int64 [N]
    image_shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    @abstractmethod
    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """The samples of a batch; loaders call this rather than `__getitem__`."""

    @abstractmethod
    def select(self, indices: np.ndarray) -> "ImageSet":
        """The set of these images alone."""

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Tensor:
        """An epoch's random choices, int64: row i [N, ...] is all that augments image i."""

    @abstractmethod
    def augmented(self, indices: list[int], draws: Tensor) -> list[Sample]:
        """The samples augmented by their rows of `draw`."""


class MemoryImages(ImageSet):
    """Images that fit in memory, augmented a batch at a time by shifts (and flips).

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: one per channel, of pixels scaled to [0, 1].
        pad: black border from which a window of the image's size is cropped at random.
        flip: whether half of the images are mirrored.
        white: the pixel value that is scaled to 1.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        pad: int,
        flip: bool,
        white: int = 255,
    ) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
        self.pixels, self.labels = pixels, labels
        self.pad, self.flip, self.white = pad, flip, white
        self.normalise = v2.Normalize(mean, std, inplace=True)
        channels, height, width = pixels.shape[1:]
        self.image_shape = (channels, height, width)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return self._samples(self.pixels[indices], indices)

    def select(self, indices: np.ndarray) -> "MemoryImages":
        return MemoryImages(
            self.pixels[indices],
            self.labels[indices],
            self.normalise.mean,
            self.normalise.std,
            pad=self.pad,
            flip=self.flip,
            white=self.white,
        )

    def draw(self, rng: np.random.Generator) -> Tensor:
        """[N, 3]: first row and first column of the window, and whether it is mirrored."""
        corners = rng.integers(2 * self.pad + 1, size=(len(self), 2))
        mirrored = rng.integers(1 + self.flip, size=(len(self), 1))
        return torch.from_numpy(np.hstack([corners, mirrored]))

    def augmented(self, indices: list[int], draws: Tensor) -> list[Sample]:
        channels, height, width = self.image_shape
        top, left, mirrored = draws[:, :, None].unbind(1)  # [B, 1] each
        rows = top + torch.arange(height)  # [B, H]
        columns = torch.arange(width)
        columns = left + torch.where(mirrored.bool(), columns.flip(0), columns)  # [B, W]
        bordered = F.pad(self.pixels[indices], [self.pad] * 4)
        batch = torch.arange(len(indices))[:, None, None, None]
        channel = torch.arange(channels)[:, None, None]
        window = bordered[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
        return self._samples(window, indices)

    def _samples(self, pixels: Tensor, indices: list[int]) -> list[Sample]:
        images = self.normalise(pixels.float().mul_(1 / self.white))
        return list(zip(images, self.labels[indices].tolist(), strict=True))


class ImageFiles(ImageSet):
    """Image files, read when asked for and augmented one by one by torchvision's transforms."""

    image_shape = (3, 224, 224)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, files: Sequence[str], labels: Tensor, loader: Callable) -> None:
        self.files, self.labels, self.loader = files, labels, loader
        crop = [v2.Resize(256), v2.CenterCrop(224)]
        random_crop = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        finish = [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(self.mean, self.std),
            v2.ToPureTensor(),
        ]
        self.transform = v2.Compose([*crop, *finish])
        self.random_transform = v2.Compose([*random_crop, *finish])

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [(self.transform(self._open(i)), int(self.labels[i])) for i in indices]

    def select(self, indices: np.ndarray) -> "ImageFiles":
        return ImageFiles([self.files[i] for i in indices], self.labels[indices], self.loader)

    def draw(self, rng: np.random.Generator) -> Tensor:
        """[N]: the seed of torch's generator, from which the transforms of an image draw."""
        return torch.from_numpy(rng.integers(2**32, size=len(self)))

    def augmented(self, indices: list[int], draws: Tensor) -> list[Sample]:
        samples = []
        state = torch.get_rng_state()
        try:
            for index, seed in zip(indices, draws.tolist(), strict=True):
                # torch.manual_seed would reseed the accelerators too
                torch.default_generator.manual_seed(seed)
                image = self.random_transform(self._open(index))
                samples.append((image, int(self.labels[index])))
        finally:
            torch.set_rng_state(state)
        return samples

    def _open(self, index: int):
        file = self.files[index]
        try:
            return self.loader(file)
        except (OSError, SyntaxError) as error:  # Pillow calls a broken PNG a SyntaxError
            raise DamagedImage(f"cannot read the image {file}: {error}") from None


class Augmented(Dataset[Sample]):
    """The augmented images of one epoch; `cutout` is the side of the square that is erased."""

    def __init__(self, images: ImageSet, *, seed: int, epoch: int, cutout: int = 0) -> None:
        self.images, self.cutout = images, cutout
        self.draws = images.draw(_rng(seed, epoch, _AUGMENTATION))
        _, height, width = images.image_shape
        centres = _rng(seed, epoch, _CUTOUT).integers((height, width), size=(len(images), 2))
        self.corners = centres - cutout // 2

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        samples = self.images.augmented(indices, self.draws[indices])
        if self.cutout:
            for (image, _), (top, left) in zip(samples, self.corners[indices], strict=True):
                bottom, right = top + self.cutout, left + self.cutout
                image[:, max(top, 0) : bottom, max(left, 0) : right] = 0
        return samples


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


def load(config: DataConfig, seed: int) -> Splits:
    """Open a data set and hold out its validation split, stratified by class and fixed by `seed`.

    Raises:
        UsageError: an unknown data set or a value out of range.
        RunError: the data is missing, damaged or could not be fetched.
    """
    check_choice("data.name", config.name, _SOURCES)
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
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed: expected from 0 to {2**32 - 1}, got {seed}")
    root = Path(config.root).expanduser() if config.root else None
    train, test, class_names = _SOURCES[config.name](root, config.download)
    for name, value in (("pad", config.pad), ("flip", config.flip)):
        if value is None:
            continue
        if not isinstance(train, MemoryImages):
            raise UsageError(
                f"data.{name}: expected null, since {config.name} has crops of its own"
            )
        setattr(train, name, value)
    try:
        kept, held_out = train_test_split(
            np.arange(len(train)),
            test_size=config.validation,
            stratify=train.labels.numpy(),
            random_state=seed,
        )
    except ValueError as error:  # too few images for one of each class on both sides
        raise UsageError(f"data.validation={config.validation}: {error}") from None
    if config.train_images:
        kept = _fewer(kept, train.labels.numpy(), config.train_images, seed)
    return Splits(train.select(np.sort(kept)), train.select(np.sort(held_out)), test, class_names)


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
    order = _rng(seed, epoch, _ORDER).permutation(len(splits.train))
    parts, start = [], 0
    for size in batch_sizes(len(order), config.batch_size):
        first, last = part(size, share)
        parts.append(order[start + first : start + max(last, first + 1)].tolist())
        start += size
    return DataLoader(
        Augmented(splits.train, seed=seed, epoch=epoch, cutout=config.cutout)
        if config.augment
        else splits.train,
        batch_sampler=parts[start_batch:],
        **_loader_options(config),
    )


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


def _rng(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, purpose])


# Sources: each takes (root or None, download) and returns (training set, test set, class names).

_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iirsnn" / "data"


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
    places = [root] if root else [_DEBIAN_FASHION_MNIST, _cache()]
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
        ImageFiles([file for file, _ in part.samples], torch.tensor(part.targets), part.loader)
        for part in (train, test)
    )
    return train_set, test_set, train.classes


_SOURCES: dict[str, Callable[[Path | None, bool], tuple[ImageSet, ImageSet, list[str]]]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": partial(_cifar, CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": partial(_cifar, CIFAR100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": _imagenet,
}
