"""The wheel of `make runtime-wheel`, in an environment that has nothing else but NumPy."""

import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

from iirsnn import runtime
from iirsnn.train import data, recipe
from tests.conftest import command

WHEELS = sorted((Path(__file__).resolve().parents[2] / "dist").glob("iirsnn_runtime-*.whl"))

CODE = """
import importlib.util, sys
import numpy as np
import iirsnn.runtime
assert importlib.util.find_spec("torch") is None
network = iirsnn.runtime.load(sys.argv[1])
found = [network.classify(pixels) for pixels in np.load(sys.argv[2])]
np.savez(sys.argv[3], logits=[each.logits for each in found], names=[each.name for each in found])
"""


@pytest.mark.skipif(not WHEELS, reason="no wheel in dist/: make runtime-wheel")
def test_the_wheel_classifies_the_test_digits_without_torch(tmp_path, finished):
    assert command("deploy", finished, "-o", tmp_path / "net") == 0
    stored = recipe.load(str(finished / "recipe.yaml"))
    test = data.load(stored.data, stored.seed).test
    pixels = (test.pixels[:, 0, :, :, None].float() * 255 / 16).round().byte().numpy()
    np.save(tmp_path / "x.npy", pixels)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    # NumPy is this environment's; nothing else of it is seen
    for name in ("numpy", "numpy.libs"):
        found = Path(np.__file__).parent.parent / name
        if found.exists():
            (site / name).symlink_to(found)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", WHEELS[-1]],
        check=True,
    )
    arguments = [python, "-c", CODE, tmp_path / "net", tmp_path / "x.npy", tmp_path / "y.npz"]
    subprocess.run(arguments, check=True, cwd=tmp_path)
    made = np.load(tmp_path / "y.npz")
    here = [runtime.load(tmp_path / "net").classify(each) for each in pixels]
    assert np.array_equal(made["logits"], [each.logits for each in here])
    assert made["names"].tolist() == [each.name for each in here]
    right = made["names"] == np.array(test.labels.tolist(), str)
    assert right.mean() > 0.7  # a run of seconds; one of ten by chance
    assert WHEELS[-1].stat().st_size < 3e6
