"""Labelled images, in memory or in files, and their augmentation, exactly repeatable.

The augmentation of an image depends on (seed, epoch, index) alone, and touches no random state of
the process.
"""

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..runtime.image_files import Preparation, open_image, to_array

Sample = tuple[Tensor, int]  # image float32 [C, H, W], label

#: What an epoch draws, each from a stream of its own.
ORDER, _AUGMENTATION, _CUTOUT, _ERASING = 0, 1, 2, 3


class ImageSet(Dataset[Sample], ABC):
    """Labelled images as the network sees them, not augmented: (float32 [C, H, W], int label)."""

    labels: Tensor  # int64 [N]
    preparation: Preparation  # of image files, to be like these

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.preparation.size

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
    def checksum(self) -> int:
        """Of what tells the images, in their order, from others."""

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
        fit, resize: how they were made of image files, see `Preparation`.
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
        fit: str = "crop",
        resize: int = 0,
    ) -> None:
        if len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
        self.pixels, self.labels = pixels, labels
        self.pad, self.flip, self.white = pad, flip, white
        channels, height, width = pixels.shape[1:]
        size = (channels, height, width)
        self.preparation = Preparation(size, tuple(mean), tuple(std), fit, resize)

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return self._samples(self.pixels[indices], indices)

    def select(self, indices: np.ndarray) -> "MemoryImages":
        how = self.preparation
        return self._like(self.pixels[indices], self.labels[indices], how.mean, how.std)

    def checksum(self) -> int:
        return zlib.crc32(self.pixels.contiguous().numpy().data)

    def normalised_by(self, mean: Sequence[float], std: Sequence[float]) -> "MemoryImages":
        """The same images with another normalisation."""
        return self._like(self.pixels, self.labels, mean, std)

    def _like(
        self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> "MemoryImages":
        return MemoryImages(
            pixels,
            labels,
            mean,
            std,
            pad=self.pad,
            flip=self.flip,
            white=self.white,
            fit=self.preparation.fit,
            resize=self.preparation.resize,
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
        images = torch.from_numpy(self.preparation.normalised(pixels.numpy(), self.white))
        return list(zip(images, self.labels[indices].tolist(), strict=True))


class ImageFiles(ImageSet):
    """Image files, read when asked for and augmented one by one by torchvision's transforms."""

    preparation = Preparation(
        (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), resize=256
    )

    def __init__(self, files: Sequence[str], labels: Tensor) -> None:
        self.files, self.labels = files, labels
        self.random_crop = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [
            (torch.from_numpy(self.preparation.input(self.files[i])), int(self.labels[i]))
            for i in indices
        ]

    def select(self, indices: np.ndarray) -> "ImageFiles":
        return ImageFiles([self.files[i] for i in indices], self.labels[indices])

    def checksum(self) -> int:
        """Of the names alone: to read all files would take hours."""
        names = "\n".join("/".join(Path(file).parts[-2:]) for file in self.files)
        return zlib.crc32(os.fsencode(names))

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
                crop = self.random_crop(open_image(self.files[index], self.image_shape[0]))
                image = torch.from_numpy(self.preparation.normalised(to_array(crop)))
                samples.append((image, int(self.labels[index])))
        finally:
            torch.set_rng_state(state)
        return samples


class Augmented(Dataset[Sample]):
    """The augmented images of one epoch.

    Args:
        images: not augmented.
        seed, epoch: that all choices depend on, beside an image's index.
        cutout: side of a square that is set to the mean; it may reach over the border.
        erasing: probability of a rectangle inside the image that is set to the mean.
    """

    def __init__(
        self, images: ImageSet, seed: int, epoch: int, *, cutout: int = 0, erasing: float = 0.0
    ) -> None:
        self.images = images
        self.draws = images.draw(random_stream(seed, epoch, _AUGMENTATION))
        self.boxes: list[np.ndarray] = []  # [N, 4] each: top, left, bottom, right
        _, *size = images.image_shape
        if cutout:
            rng = random_stream(seed, epoch, _CUTOUT)
            corners = rng.integers(size, size=(len(images), 2)) - cutout // 2
            self.boxes.append(np.hstack([corners.clip(min=0), corners + cutout]))
        if erasing:
            rng = random_stream(seed, epoch, _ERASING)
            self.boxes.append(_rectangles(rng, len(images), np.array(size), erasing))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        samples = self.images.augmented(indices, self.draws[indices])
        for boxes in self.boxes:
            for (image, _), (top, left, bottom, right) in zip(samples, boxes[indices], strict=True):
                image[:, top:bottom, left:right] = 0
        return samples


def _rectangles(
    rng: np.random.Generator, count: int, size: np.ndarray, probability: float
) -> np.ndarray:
    """int [count, 4]: top, left, bottom, right of each; empty where none is to be erased.

    size: height and width of an image.
    """
    area = rng.uniform(0.02, 1 / 3, count) * size.prod()
    ratio = np.exp(rng.uniform(-1, 1, count) * np.log(0.3))  # height / width
    sides = np.sqrt(np.stack([area * ratio, area / ratio], 1)).round().astype(int).clip(1, size)
    sides[rng.random(count) >= probability] = 0
    corners = rng.integers(size - sides + 1)
    return np.hstack([corners, corners + sides])


def random_stream(seed: int, epoch: int, purpose: int) -> np.random.Generator:
    """What an epoch draws for one purpose: ORDER and others."""
    return np.random.default_rng([seed, epoch, purpose])
