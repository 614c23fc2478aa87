"""Every data set is read from small files in its true on-disk format."""

import gzip
import hashlib
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from iirsnn.errors import RunError
from iirsnn.train.data import DataConfig, eval_batches, load
from tests.train.data_files import (
    pixels,
    same,
    stack,
    write_cifar,
    write_fashion_mnist,
    write_imagenet,
)

pytestmark = pytest.mark.usefixtures("empty_places")


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


# errors


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
