"""The wheel of `make runtime-wheel`, in an environment that has nothing else but NumPy."""

import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.test_network import saved, vgg

WHEELS = sorted((Path(__file__).resolve().parents[2] / "dist").glob("iirsnn_runtime-*.whl"))

CODE = """
import importlib.util, sys
import numpy as np
import iirsnn.runtime
assert importlib.util.find_spec("torch") is None
network = iirsnn.runtime.load(sys.argv[1])
np.save(sys.argv[3], network(np.load(sys.argv[2])))
"""


@pytest.mark.skipif(not WHEELS, reason="no wheel in dist/: make runtime-wheel")
def test_the_wheel_runs_without_torch(tmp_path):
    model, x = vgg()
    net = saved(tmp_path / "net", model, x)
    np.save(tmp_path / "x.npy", x.numpy())
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
    arguments = [python, "-c", CODE, tmp_path / "net", tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run(arguments, check=True, cwd=tmp_path)
    assert np.array_equal(np.load(tmp_path / "y.npy"), net(x).numpy())
    assert WHEELS[-1].stat().st_size < 3e6
