"""Anyone's images: how a folder is read, split and normalised, and what is refused."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from iirsnn.errors import RunError, UsageError
from iirsnn.train import image_folder
from iirsnn.train.data import DataConfig, eval_batches, load, train_batches
from iirsnn.train.images import MemoryImages


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, value, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


def write_classes(root, counts):
    value = 0
    for name, count in counts.items():
        for i in range(count):
            write(root / name / f"{i:02}.png", value)
            value += 1
    return root


def config(root, **changes):
    return DataConfig("folder", str(root), **{"image_size": 8, "validation": 0.25, **changes})


def counts(images, classes):
    return torch.bincount(images.labels, minlength=classes).tolist()


def contents(images):
    return {image.numpy().tobytes() for image in images.pixels}


def test_one_folder_is_split_by_class_and_the_test_is_the_same_for_every_seed(tmp_path):
    root = write_classes(tmp_path / "x", {"b b": 20, "äöü": 40})
    splits = load(config(root), seed=0)
    assert splits.class_names == ["b b", "äöü"]
    assert splits.image_shape == (3, 8, 8)
    parts = splits.train, splits.validation, splits.test
    assert [counts(part, 2) for part in parts] == [[12, 24], [4, 8], [4, 8]]
    assert len(set.union(*map(contents, parts))) == 60
    other = load(config(root), seed=1)
    assert contents(other.test) == contents(splits.test)
    assert contents(other.validation) != contents(splits.validation)
    assert counts(load(config(root, test=0.5), 0).test, 2) == [10, 20]


def test_a_folder_with_its_own_splits(tmp_path):
    for part, count in (("train", 8), ("val", 3), ("test", 2)):
        write_classes(tmp_path / "x" / part, {"a": count, "b": count})
    splits = load(config(tmp_path / "x"), seed=0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [16, 6, 4]
    (tmp_path / "x" / "val").rename(tmp_path / "val")
    splits = load(config(tmp_path / "x"), seed=0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [12, 4, 4]
    (tmp_path / "x" / "test").rename(tmp_path / "test")
    (tmp_path / "val").rename(tmp_path / "x" / "val")
    splits = load(config(tmp_path / "x"), seed=0)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [12, 4, 6]


def test_a_class_may_be_named_train(tmp_path):
    root = write_classes(tmp_path / "x", {"car": 10, "train": 10})
    assert load(config(root), seed=0).class_names == ["car", "train"]


def test_training_images_have_mean_0_and_deviation_1(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 20, "b": 20})
    splits = load(config(root, augment=False, batch_size=100), seed=0)
    ((images, _),) = train_batches(
        splits, config(root, augment=False, batch_size=100), seed=0, epoch=0
    )
    means, deviations = images.mean((0, 2, 3)), images.std((0, 2, 3), correction=0)
    assert torch.allclose(means, torch.zeros(3), atol=1e-5)
    assert torch.allclose(deviations, torch.ones(3), atol=1e-5)
    assert splits.test.preparation == splits.train.preparation
    file = sorted((root / "a").iterdir())[0]
    seen = torch.from_numpy(splits.test.preparation.input(file))
    every = [x for part in (splits.train, splits.validation, splits.test) for x, _ in part]
    assert any(torch.equal(seen, x) for x in every)


def test_gray_on_request(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    splits = load(config(root, gray=True, fit="whole"), seed=0)
    assert splits.image_shape == (1, 8, 8)
    assert splits.train.preparation.fit == "whole"


def test_what_is_not_an_image_of_a_class_is_left_out(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    (root / "a" / "notes.txt").write_text("no image")
    (root / "a" / ".hidden.png").write_bytes(b"damaged")
    (root / "a" / "._00.png").write_bytes(b"what macOS leaves")
    (root / "__MACOSX" / "a").mkdir(parents=True)
    write(root / ".thumbnails" / "t.png", 99)
    write(root / "b" / ".cache" / "c.png", 98)
    write(root / "stray.png", 97)
    write(root / "b" / "deeper" / "still" / "DEEP.JPG", 96)
    (root / "b" / "loop").symlink_to(root / "b")
    (root / "a" / "alias.png").symlink_to(root / "b" / "00.png")  # it is in b
    splits = load(config(root), seed=0)
    assert splits.class_names == ["a", "b"]
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 17


def test_links_to_other_places_are_followed(tmp_path):
    write_classes(tmp_path / "elsewhere", {"a": 8, "b": 8})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "one").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "x" / "two").mkdir()
    for file in (tmp_path / "elsewhere" / "b").iterdir():
        (tmp_path / "x" / "two" / file.name).symlink_to(file)
    splits = load(config(tmp_path / "x"), seed=0)
    assert sum(map(len, (splits.train, splits.validation, splits.test))) == 16


def test_class_names_in_the_form_of_other_systems_are_the_same(tmp_path):
    for part, form in (("train", "NFC"), ("test", "NFD")):
        write_classes(tmp_path / "x" / part, {unicodedata.normalize(form, "ü"): 8, "z": 8})
    assert load(config(tmp_path / "x"), seed=0).class_names == ["z", "ü"]


def test_a_class_name_that_is_not_utf_8_can_be_printed(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8})
    odd = os.fsdecode(os.fsencode(root) + b"/caf\xe9")
    os.mkdir(odd)
    for i in range(8):
        os.link(root / "a" / f"{i:02}.png", f"{odd}/{i}.png")
    assert load(config(root), seed=0).class_names == ["a", "caf\ufffd"]


def test_pixels_are_decoded_once_while_no_file_changes(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    first = load(config(root), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(image_folder.Preparation, "pixels", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(load(config(root), seed=0).train.pixels, first.train.pixels)
    write(root / "a" / "00.png", 1234)
    changed = load(config(root), seed=0)
    parts = [[s.train, s.validation, s.test] for s in (first, changed)]
    old, new = (set.union(*map(contents, each)) for each in parts)
    assert len(old - new) == len(new - old) == 1


@pytest.mark.parametrize("damage", [b"", b"short", b"\x93NUMPY" + bytes(100)])
def test_a_damaged_cache_is_made_anew(damage, tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    first = load(config(root), seed=0)
    (cached,) = (tmp_path / "cache" / "iirsnn" / "data").iterdir()
    good = cached.read_bytes()
    cached.write_bytes(damage)
    assert torch.equal(load(config(root), seed=0).train.pixels, first.train.pixels)
    assert cached.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    assert isinstance(load(config(root), seed=0).train, MemoryImages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": ""}, "data.root: expected the folder of the images, got none"),
        ({"image_size": 0}, "data.image_size: expected from 1 to 4096 pixels, got 0"),
        ({"image_size": 5000}, "data.image_size: .* got 5000"),
        ({"fit": "best"}, "data.fit: expected one of crop, whole, got 'best'"),
        ({"test": 1.0}, "data.test: expected between 0 and 1, got 1.0"),
        ({"test": 0.01}, r"data.test=0\.01: "),
        ({"validation": 0.01}, r"data.validation=0\.01: "),
    ],
)
def test_a_value_out_of_range_is_one_line(change, message, tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    changed = config(root)
    for name, value in change.items():
        setattr(changed, name, value)
    with pytest.raises(UsageError, match=message) as error:
        load(changed, seed=0)
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_data_set(tmp_path):
    def refused(root, message):
        with pytest.raises(RunError, match=message) as error:
            load(config(root), seed=0)
        assert "\n" not in str(error.value)

    refused(tmp_path / "none", "folder .*none: cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "expected a folder for each of two or more classes, got 0")
    one = write_classes(tmp_path / "one", {"a": 8})
    refused(one, "expected a folder for each of two or more classes, got 1 \\(a\\)")
    (one / "b").mkdir()
    refused(one, "class b has no image in it")
    mixed = write_classes(
        tmp_path / "mixed", {"train/a": 8, "train/b": 8, "test/a": 3, "test/c": 3}
    )
    refused(mixed, "the same classes in train/ and test/, but b is in one of them alone")
    (mixed / "unlabelled").mkdir()
    refused(mixed, "train/, val/ and test/ alone.*got test, train beside unlabelled")
    black = tmp_path / "black"
    for name in ("a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2", "b/3"):
        (black / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(black / f"{name}.png")
    refused(black, "expected training images that differ")


def test_own_test_images_are_not_split_again(tmp_path):
    root = write_classes(tmp_path / "x", {"train/a": 8, "train/b": 8, "test/a": 3, "test/b": 3})
    with pytest.raises(UsageError, match=r"data\.test: expected null, since .* got 0\.2"):
        load(config(root, test=0.2), seed=0)


def test_damaged_images_are_one_line(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    (root / "a" / "03.png").write_bytes(b"")
    (root / "b" / "01.png").write_bytes((root / "b" / "01.png").read_bytes()[:60])
    with pytest.raises(RunError, match=r"^image .*/a/03\.png: is empty .*; 1 more cannot be read"):
        load(config(root), seed=0)


def test_images_that_do_not_fit_into_memory_are_one_line(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    monkeypatch.setattr(image_folder.os, "sysconf", lambda name: 50)
    with pytest.raises(UsageError, match=r"at most half of the memory.*data\.image_size"):
        load(config(root), seed=0)


def test_batches_do_not_depend_on_workers(tmp_path):
    root = write_classes(tmp_path / "x", {"a": 8, "b": 8})
    one, two = config(root, batch_size=4), config(root, batch_size=4, workers=1)
    splits = load(one, seed=0)
    for first, second in (
        (train_batches(splits, one, seed=0, epoch=0), train_batches(splits, two, seed=0, epoch=0)),
        (eval_batches(splits.test, one), eval_batches(splits.test, two)),
    ):
        for (a, i), (b, j) in zip(first, second, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(i, j)
