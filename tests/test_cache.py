"""Where what can be made again is kept; and a user without a home, as in many containers."""

import os
import pwd
from pathlib import Path

import pytest
import torch

from iirsnn import FusedLIF, cache, use_spike_layers
from iirsnn.errors import RunError
from iirsnn.nn import events_or_dense
from iirsnn.train.data import DataConfig, load


@pytest.fixture
def no_home(monkeypatch, tmp_path):
    """No HOME, no entry in passwd, no name; the working folder is empty."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_folder_is_the_one_of_the_specification(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "iirsnn"
    monkeypatch.setenv("HOME", "/home/me")
    for ignored in ("", "relative", "./relative", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.folder() == Path("/home/me/.cache/iirsnn")


def test_a_user_without_a_home_has_none(no_home, monkeypatch):
    assert cache.folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache.folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_home))
    assert cache.folder() == no_home / "iirsnn"


def test_a_relative_folder_is_ignored_by_all_of_a_command(no_home, monkeypatch, iirsnn):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert iirsnn("env").code == 0
    assert "XDG_CACHE_HOME" not in os.environ


def test_spike_layers_do_without_a_home(no_home, monkeypatch):
    monkeypatch.delenv("IIRSNN_CALIBRATE", raising=False)
    assert events_or_dense.cache_path() is None
    model = torch.nn.Sequential(FusedLIF(), torch.nn.Linear(8, 4))
    use_spike_layers(model)
    model(torch.rand(2, 3, 8)).sum().backward()
    assert os.listdir(no_home) == []


def test_data_without_a_home_says_what_to_set(no_home):
    for name in ("cifar10", "imagenet"):
        with pytest.raises(RunError, match=r"expected data\.root, HOME or an absolute XDG_CACHE"):
            load(DataConfig(name), seed=0)
    assert len(load(DataConfig("digits"), seed=0).test) == 360


def test_training_does_without_a_home(no_home, iirsnn):
    settings = ["ann.epochs=1", "snn.epochs=1", "timesteps=[1]", "stages.T1.epochs=1"]
    settings += ["model.layers=[4,A]", "model.hidden=[8]", "data.batch_size=700"]
    settings += ["runtime.threads=1", "runtime.device=cpu"]
    result = iirsnn("train", "digits", *[a for s in settings for a in ("--set", s)])
    assert result.code == 0, result.err
    assert sorted(os.listdir(no_home)) == ["runs"]
