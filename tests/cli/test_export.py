"""export: files of other formats give the classes of the trained network."""

import nir
import onnxruntime
import pytest
import torch

from iirsnn import from_nir
from iirsnn.train.pipeline import Pipeline, open_data
from iirsnn.train.run_folder import RunFolder
from tests.conftest import assert_one_line


@pytest.fixture
def trained(finished):
    """All test images, and the class of each at T = 1 and 2."""
    folder = RunFolder.read(finished)
    pipeline = Pipeline(folder, open_data(folder.recipe))
    test = pipeline.splits.test
    images = torch.stack([image for image, _ in test.__getitems__(list(range(len(test))))])
    with torch.no_grad():
        return images, {t: pipeline.trained(f"T{t}").eval()(images).argmax(1) for t in (1, 2)}


@torch.no_grad()
def test_onnx_gives_the_class_of_every_test_image(iirsnn, finished, trained, tmp_path):
    images, classes = trained
    result = iirsnn("export", finished, "--format", "onnx")
    assert result.code == 0, result.err
    assert "Written: net.onnx" in result.out
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (logits,) = session.run(None, {"images": images.numpy()})
    assert torch.equal(torch.from_numpy(logits).argmax(1), classes[1])


@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_nir_gives_the_class_of_every_test_image(iirsnn, finished, trained, stage, tmp_path):
    images, classes = trained
    out = tmp_path / "digits.nir"
    assert iirsnn("export", finished, "--format", "nir", "--stage", stage, "-o", out).code == 0
    back = from_nir(nir.read(str(out)), stage).eval()
    same = float((back(images).argmax(1) == classes[stage]).float().mean())
    assert same == 1 if stage == 1 else same > 0.99  # leak goes through tau in float32


def test_what_is_there_is_not_written_over(iirsnn, finished, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"mine")
    result = iirsnn("export", finished)
    assert_one_line(result, 2, "--out net.onnx: is there already; --force writes over it")
    assert (tmp_path / "net.onnx").read_bytes() == b"mine"
    assert iirsnn("export", finished, "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format: expected one of nir, onnx, got 'tflite'"),
        (["--stage", 2], "--stage: expected 1 for ONNX, which has no time, got 2"),
        (["--format", "nir", "--stage", 9], "--stage: expected one of"),
    ],
)
def test_bad_arguments_are_one_line(iirsnn, finished, arguments, message):
    assert_one_line(iirsnn("export", finished, *arguments), 2, message)
