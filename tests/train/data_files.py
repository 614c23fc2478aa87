"""Small data sets in their true on-disk formats, and batches compared."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST


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
