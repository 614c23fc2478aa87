"""Every data set is read from small files in its true on-disk format, written here."""

import gzip
import hashlib
import pickle
import random
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from iirsnn.errors import RunError, UsageError
from iirsnn.train import data_sets
from iirsnn.train.data import DataConfig, eval_batches, load, train_batches
from iirsnn.train.images import Augmented


@pytest.fixture(autouse=True)
def empty_places(tmp_path, monkeypatch):
    """No test sees the data of this machine or reaches a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data_sets, "_DEBIAN_FASHION_MNIST", tmp_path / "debian")
    closed = "http://127.0.0.1:9/"
    monkeypatch.setattr(FashionMNIST, "mirrors", [closed])
    for source in (CIFAR10, CIFAR100):
        monkeypatch.setattr(source, "url", closed + source.filename)


@pytest.fixture
def server(tmp_path):
    """The address of a web server of this process that serves `tmp_path`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as http:
        thread = threading.Thread(target=http.serve_forever, args=[0.01], daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def pixels(count, *shape):
    return np.random.default_rng(count).integers(256, size=(count, *shape), dtype=np.uint8)


def write_cifar(folder, source, classes, monkeypatch):
    """CIFAR's pickles; torchvision's tables of checksums are set to those of these files."""
    folder = folder / source.base_folder
    folder.mkdir(parents=True)
    label_key = "labels" if classes == 10 else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name, count):
        labels = [i % classes for i in range(count)]
        return [name, write(name, {"data": pixels(count, 3072), label_key: labels})]

    per_file = 2 * classes
    train = [batch(name, per_file + i) for i, (name, _) in enumerate(source.train_list)]
    test = [batch(name, classes) for name, _ in source.test_list]
    names = [f"class {i}" for i in range(classes)]
    meta = {**source.meta, "md5": write(source.meta["filename"], {source.meta["key"]: names})}
    monkeypatch.setattr(source, "train_list", train)
    monkeypatch.setattr(source, "test_list", test)
    monkeypatch.setattr(source, "meta", meta)
    return folder


def write_fashion_mnist(folder, monkeypatch, train=120, test=20):
    """The four idx files, gzipped; torchvision's checksums of a download are set to theirs."""
    folder.mkdir(parents=True)
    resources = []
    for part, count in (("train", train), ("t10k", test)):
        labels = bytes(i % 10 for i in range(count))
        images = struct.pack(">4i", 0x803, count, 28, 28) + pixels(count, 28, 28).tobytes()
        for kind, content in (
            ("images-idx3", images),
            ("labels-idx1", struct.pack(">2i", 0x801, count) + labels),
        ):
            file = folder / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(content))
            resources.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return folder


def write_imagenet(folder, train=5, test=2):
    for part, count in (("train", train), ("val", test)):
        for name in ("n01440764", "n01443537"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(pixels(count + i, 240, 300, 3)[i])
                image.save(folder / part / name / f"{name}_{i}.JPEG")
    return folder


def stack(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    return all(
        torch.equal(x, a) and torch.equal(y, b)
        for (x, y), (a, b) in zip(batches, others, strict=True)
    )


# the sources


def test_digits():
    splits = load(DataConfig(), seed=0)
    assert splits.classes == 10
    assert splits.class_names == list("0123456789")
    assert splits.image_shape == (1, 8, 8)
    assert len(splits.test) == 360
    assert len(splits.train) + len(splits.validation) == 1437
    image, label = splits.train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert type(label) is int
    images, labels = stack(eval_batches(splits.train, DataConfig()))
    assert labels.dtype == torch.int64
    raw = images * 0.3760 + 0.3053
    assert raw.min().item() == pytest.approx(0, abs=1e-6)
    assert raw.max().item() == pytest.approx(1)
    assert images.mean().item() == pytest.approx(0, abs=0.02)
    assert images.std().item() == pytest.approx(1, abs=0.02)


def test_digits_test_split_is_the_same_for_every_seed():
    config = DataConfig()
    tests = [eval_batches(load(config, seed).test, config) for seed in (0, 1)]
    assert same(*tests)


@pytest.mark.parametrize(
    ("source", "classes", "mean", "std"),
    [
        (CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        (CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    ],
)
def test_cifar(source, classes, mean, std, tmp_path, monkeypatch):
    write_cifar(tmp_path, source, classes, monkeypatch)
    config = DataConfig(source.__name__.lower(), str(tmp_path), download=False, validation=0.5)
    splits = load(config, seed=0)
    assert splits.image_shape == (3, 32, 32)
    assert splits.class_names == [f"class {i}" for i in range(classes)]
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
            v2.ToPureTensor(),
        ]
    )
    expected = source(tmp_path, train=False, transform=transform)
    assert len(splits.test) == len(expected) == classes
    for (image, label), (expected_image, expected_label) in zip(splits.test, expected, strict=True):
        assert torch.equal(image, expected_image)
        assert label == expected_label


def test_cifar_is_downloaded_into_the_cache(server, tmp_path, monkeypatch):
    folder = write_cifar(tmp_path / "origin", CIFAR10, 10, monkeypatch)
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    monkeypatch.setattr(CIFAR10, "url", f"{server}/{archive.name}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load(DataConfig("cifar10"), seed=0).test) == 10
    assert (tmp_path / "cache/iirsnn/data/cifar-10-batches-py/test_batch").is_file()
    assert len(load(DataConfig("cifar10", download=False), seed=0).test) == 10


@pytest.mark.parametrize("place", ["root", "debian", "torchvision"])
def test_fashion_mnist(place, server, tmp_path, monkeypatch):
    folder = write_fashion_mnist(tmp_path / "debian", monkeypatch)
    root = "" if place == "debian" else str(tmp_path / place)
    if place == "root":
        folder.rename(tmp_path / "root")
    elif place == "torchvision":
        monkeypatch.setattr(FashionMNIST, "mirrors", [f"{server}/debian/"])
        FashionMNIST(root, download=True)
    splits = load(DataConfig("fashion-mnist", root, download=False), seed=0)
    assert splits.image_shape == (1, 28, 28)
    assert splits.class_names[9] == "Ankle boot"
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (108, 12, 20)
    images, labels = stack(eval_batches(splits.test, DataConfig()))
    assert torch.allclose(images[:, 0] * 0.3530 + 0.2860, torch.tensor(pixels(20, 28, 28)) / 255)
    assert labels.tolist() == [i % 10 for i in range(20)]


def test_fashion_mnist_is_downloaded_into_the_cache(server, tmp_path, monkeypatch):
    write_fashion_mnist(tmp_path / "origin", monkeypatch)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{server}/origin/"])
    assert len(load(DataConfig("fashion-mnist"), seed=0).test) == 20
    assert (tmp_path / "cache/iirsnn/data/FashionMNIST/raw/t10k-images-idx3-ubyte").is_file()
    assert len(load(DataConfig("fashion-mnist", download=False), seed=0).test) == 20


def test_imagenet(tmp_path):
    write_imagenet(tmp_path)
    splits = load(DataConfig("imagenet", str(tmp_path), validation=0.2), seed=0)
    assert splits.image_shape == (3, 224, 224)
    assert splits.class_names == ["n01440764", "n01443537"]
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 4)
    image, label = splits.test[3]
    raw = Image.open(tmp_path / "val/n01443537/n01443537_1.JPEG")
    expected = tv.to_image(tv.center_crop(tv.resize(raw, 256), 224)).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    assert type(image) is torch.Tensor
    assert torch.allclose(image, (expected - mean) / std, atol=1e-5)
    assert label == 1


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


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "imagenet"])
def test_missing_data_says_where_it_looked_and_how_to_get_it(name, tmp_path):
    for root, place in ((str(tmp_path / "given"), "given"), ("", "cache/iirsnn/data")):
        with pytest.raises(
            RunError, match=f"{name}: .*{place}.*; .*data[.](root|download)"
        ) as error:
            load(DataConfig(name, root, download=False), seed=0)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_a_failed_download_is_one_line(name, tmp_path):
    with pytest.raises(
        RunError, match=f"{name}: cannot be fetched into {tmp_path}/cache.*refused.*; .*data.root"
    ) as error:
        load(DataConfig(name), seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "count"])
def test_a_damaged_fashion_mnist_file_is_one_line(damage, tmp_path, monkeypatch):
    folder = write_fashion_mnist(tmp_path / "debian", monkeypatch)
    file = folder / "train-labels-idx1-ubyte.gz"
    content = file.read_bytes()[:-9]
    if damage == "count":
        content = gzip.compress(struct.pack(">2i", 0x801, 3) + bytes(3))
    file.write_bytes(content)
    with pytest.raises(RunError, match=f"fashion-mnist: cannot be read from {folder}: ") as error:
        load(DataConfig("fashion-mnist"), seed=0)
    assert "\n" not in str(error.value)


def test_a_damaged_cifar_file_is_one_line(tmp_path, monkeypatch):
    folder = write_cifar(tmp_path, CIFAR10, 10, monkeypatch)
    (folder / "data_batch_2").write_bytes(b"")
    with pytest.raises(RunError, match=f"cifar10: cannot be read from {tmp_path}: .*corrupted"):
        load(DataConfig("cifar10", str(tmp_path), download=False), seed=0)


def test_imagenet_parts_must_hold_the_same_classes(tmp_path):
    write_imagenet(tmp_path)
    (tmp_path / "val/n01440764").rename(tmp_path / "val/n09999999")
    with pytest.raises(RunError, match="train/ and val/ hold different classes"):
        load(DataConfig("imagenet", str(tmp_path)), seed=0)


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
