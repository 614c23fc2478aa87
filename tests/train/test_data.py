"""Splits of a data set and their batches: seeded, augmented, the same however they are loaded."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as tv

from iirsnn.errors import RunError, UsageError
from iirsnn.train.data import DataConfig, eval_batches, load, train_batches
from iirsnn.train.images import Augmented
from tests.train.data_files import (
    same,
    stack,
    write_cifar,
    write_fashion_mnist,
    write_imagenet,
)

pytestmark = pytest.mark.usefixtures("empty_places")


# splits


def test_validation_is_disjoint_stratified_and_seeded(tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path / "debian", monkeypatch, train=300)
    config = DataConfig("fashion-mnist", validation=0.2)
    splits = load(config, seed=3)
    assert torch.bincount(splits.train.labels).tolist() == [24] * 10
    assert torch.bincount(splits.validation.labels).tolist() == [6] * 10
    every = [
        image.numpy().tobytes() for part in (splits.train, splits.validation) for image, _ in part
    ]
    assert len(set(every)) == 300
    assert same(
        eval_batches(load(config, 3).validation, config), eval_batches(splits.validation, config)
    )
    other = load(config, 4).validation
    assert not same(eval_batches(other, config), eval_batches(splits.validation, config))


def test_fewer_training_images_are_stratified_and_leave_the_other_splits_alone(
    tmp_path, monkeypatch
):
    write_fashion_mnist(tmp_path / "debian", monkeypatch, train=300)
    config = DataConfig("fashion-mnist", train_images=50)
    fewer, every = load(config, seed=3), load(DataConfig("fashion-mnist"), seed=3)
    assert torch.bincount(fewer.train.labels).tolist() == [5] * 10
    whole = {image.numpy().tobytes() for image, _ in every.train}
    assert {image.numpy().tobytes() for image, _ in fewer.train} < whole
    assert same(eval_batches(fewer.validation, config), eval_batches(every.validation, config))


def test_splits_are_ordinary_data_sets():
    splits = load(DataConfig(), seed=0)
    images, labels = next(iter(DataLoader(splits.test, batch_size=5)))
    part, part_labels = next(iter(DataLoader(Subset(splits.test, [4, 2]), batch_size=2)))
    assert torch.equal(part, images[[4, 2]])
    assert torch.equal(part_labels, labels[[4, 2]])
    with pytest.raises(IndexError):
        splits.test[360]


# batches


@pytest.fixture(params=["digits", "fashion-mnist", "imagenet"])
def small(request, tmp_path, monkeypatch):
    """A data set and its configuration, with 5 batches or more in an epoch."""
    config = DataConfig(request.param, batch_size=256)
    if request.param == "fashion-mnist":
        write_fashion_mnist(tmp_path / "debian", monkeypatch)
        config.batch_size = 10
    elif request.param == "imagenet":
        config.root, config.validation, config.batch_size = str(tmp_path), 0.2, 2
        write_imagenet(tmp_path, train=7)
    return load(config, seed=0), config


def test_epochs_repeat_and_differ(small):
    splits, config = small
    epoch = list(train_batches(splits, config, seed=7, epoch=1))
    assert len(epoch) >= 5
    assert same(epoch, train_batches(splits, config, seed=7, epoch=1))
    assert not same(epoch, train_batches(splits, config, seed=7, epoch=2))
    assert not same(epoch, train_batches(splits, config, seed=8, epoch=1))


def test_workers_change_nothing(small):
    splits, config = small
    epoch = list(train_batches(splits, config, seed=7, epoch=1))
    test = list(eval_batches(splits.test, config))
    config.workers = 2
    assert same(epoch, train_batches(splits, config, seed=7, epoch=1))
    assert same(test, eval_batches(splits.test, config))


@pytest.mark.parametrize("start", [1, 4, 100])
def test_start_batch_continues_the_epoch(small, start, monkeypatch):
    splits, config = small
    epoch = list(train_batches(splits, config, seed=7, epoch=1))
    loaded = []
    augmented = type(splits.train).augmented
    monkeypatch.setattr(
        type(splits.train),
        "augmented",
        lambda self, indices, draws: loaded.extend(indices) or augmented(self, indices, draws),
    )
    assert same(epoch[start:], train_batches(splits, config, seed=7, epoch=1, start_batch=start))
    assert len(loaded) == sum(len(labels) for _, labels in epoch[start:])


def test_augmentation_depends_on_the_image_not_on_its_batch(small):
    splits, _ = small
    epoch = Augmented(splits.train, seed=7, epoch=1)
    together = epoch.__getitems__([5, 2, 0])
    for index, (image, label) in zip([5, 2, 0], together, strict=True):
        alone, alone_label = epoch[index]
        assert torch.equal(alone, image)
        assert alone_label == label


def test_no_random_state_is_disturbed(small):
    splits, config = small
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(train_batches(splits, config, seed=7, epoch=1))
    list(eval_batches(splits.test, config))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]


def test_global_seeds_change_nothing(small):
    splits, config = small
    torch.manual_seed(0)
    epoch = list(train_batches(splits, config, seed=7, epoch=1))
    torch.manual_seed(1)
    assert same(epoch, train_batches(splits, config, seed=7, epoch=1))


def test_shifts_and_flips_are_torchvisions_crop_and_flip(tmp_path, monkeypatch):
    write_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    train = load(DataConfig("cifar10", str(tmp_path)), seed=0).train
    epoch = Augmented(train, seed=0, epoch=0)
    for index, (image, _) in enumerate(epoch):
        top, left, mirrored = epoch.draws[index].tolist()
        window = tv.crop(tv.pad(train.pixels[index], 4), top, left, 32, 32)
        window = tv.horizontal_flip(window) if mirrored else window
        assert np.array_equal(image, train.preparation.normalised(window.numpy()))
    assert set(epoch.draws[:, 2].tolist()) == {0, 1}
    assert set(epoch.draws[:, :2].flatten().tolist()) == set(range(9))


@pytest.mark.parametrize("side", [1, 4, 5])
def test_cutout_erases_a_square_at_a_random_place(side):
    splits = load(DataConfig(), seed=0)
    config = DataConfig(batch_size=2000)
    images, _ = next(iter(train_batches(splits, config, seed=1, epoch=0)))
    config.cutout = side
    cut, _ = next(iter(train_batches(splits, config, seed=1, epoch=0)))
    assert torch.equal(cut[images == cut], images[images == cut])
    erased = (cut == 0).squeeze(1)  # the mean: no pixel has that value
    assert torch.equal(erased, (images != cut).squeeze(1))
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.sum((1, 2)), rows * columns)  # a rectangle, a square but for borders
    assert rows.max() == columns.max() == side
    assert rows.min() >= (side + 1) // 2 - (side % 2 == 0)
    assert erased.any(0).all()


def test_a_recipe_may_set_its_own_shifts_and_mirroring():
    chosen = load(DataConfig(pad=0, flip=True), seed=0)
    plain = load(DataConfig(augment=False), seed=0)
    config = DataConfig(batch_size=2000)
    images, _ = next(iter(train_batches(chosen, config, seed=1, epoch=0)))
    config.augment = False
    expected, _ = next(iter(train_batches(plain, config, seed=1, epoch=0)))
    same = (images == expected).flatten(1).all(1)
    mirrored = (images == expected.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 0.4 < mirrored.float().mean() < 0.6


def test_a_set_with_crops_of_its_own_takes_no_others(tmp_path):
    write_imagenet(tmp_path, train=7)
    config = DataConfig("imagenet", root=str(tmp_path), validation=0.2, pad=4)
    with pytest.raises(UsageError, match=r"data\.pad: expected null, since imagenet has"):
        load(config, seed=0)


def test_digits_are_shifted_by_one_pixel_and_never_mirrored():
    draws = Augmented(load(DataConfig(), seed=0).train, seed=0, epoch=0).draws
    assert set(draws[:, :2].flatten().tolist()) == {0, 1, 2}
    assert draws[:, 2].max() == 0


def test_an_epoch_without_augmentation_holds_every_image_once():
    config = DataConfig(augment=False)
    splits = load(config, seed=0)
    images, _ = stack(train_batches(splits, config, seed=0, epoch=0))
    ordered, _ = stack(eval_batches(splits.train, config))
    assert not torch.equal(images, ordered)
    assert sorted(x.numpy().tobytes() for x in images) == sorted(
        x.numpy().tobytes() for x in ordered
    )


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(107, [107]), (100, [100, 8]), (108, [108]), (200, [108]), (1, [1] * 108)],
)
def test_only_a_last_batch_of_one_is_left_out(batch_size, sizes, tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path / "debian", monkeypatch)
    config = DataConfig("fashion-mnist", batch_size=batch_size)
    splits = load(config, seed=0)
    batches = train_batches(splits, config, seed=0, epoch=0)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)


# errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "mnist"}, "expected one of digits, fashion-mnist, cifar10, cifar100, imagenet"),
        ({"validation": 0.0}, "data.validation: expected between 0 and 1, got 0.0"),
        ({"validation": 1.0}, "data.validation: expected between 0 and 1, got 1.0"),
        ({"validation": 0.001}, "data.validation=0.001: .*number of classes"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers"),
        ({"train_images": -1}, "data.train_images: expected at least 0, got -1"),
        ({"train_images": 9}, "data.train_images: expected 0 for all, or from 10 to 1283, got 9"),
        ({"train_images": 1284}, "data.train_images: .* got 1284"),
        ({"pad": -1}, "data.pad: expected at least 0, got -1"),
        ({"cutout": -1}, "data.cutout: expected at least 0, got -1"),
        ({"root": "/data"}, "data.root: expected none, since digits has no files, got /data"),
        ({"root": "~nobody-here/x"}, "data.root: ~nobody-here/x: "),
        ({"image_size": 64}, "data.image_size: expected 0, since digits has .* got 64"),
        ({"gray": True}, "data.gray: expected False, since digits"),
        ({"fit": "whole"}, "data.fit: expected crop, since digits"),
        ({"test": 0.5}, "data.test: expected None, since digits"),
    ],
)
def test_a_value_out_of_range_is_a_usage_error(change, message):
    with pytest.raises(UsageError, match=message) as error:
        load(DataConfig(**change), seed=0)
    assert "\n" not in str(error.value)


def test_a_seed_out_of_range_is_a_usage_error():
    with pytest.raises(UsageError, match="seed: expected from 0 to"):
        load(DataConfig(), seed=-1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_from_a_worker_too(workers, tmp_path):
    write_imagenet(tmp_path)
    file = tmp_path / "val/n01440764/n01440764_0.JPEG"
    file.write_bytes(file.read_bytes()[:100])
    config = DataConfig("imagenet", str(tmp_path), validation=0.2, workers=workers)
    splits = load(config, seed=0)
    with pytest.raises(RunError, match=f"^image {file}: cannot be read ") as error:
        list(eval_batches(splits.test, config))
    assert "\n" not in str(error.value)
