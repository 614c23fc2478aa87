"""What tests of training share."""

import pytest
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

from iirsnn import atomic_files
from iirsnn.train import data_sets


@pytest.fixture
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
def no_waiting_for_disks(monkeypatch):
    """What is durable is of no interest here, only what is written, and in which order."""
    monkeypatch.setattr(atomic_files, "_sync", lambda path: None)
