"""`make wheel`: sdist and wheel, each installed outside the checkout, run what they should hold."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = next((ROOT / "iirsnn").glob("_C.*.so"), None)
LIBRARY = ROOT / "iirsnn" / "runtime" / "libiirsnn.so"

pytestmark = pytest.mark.skipif(
    EXTENSION is None, reason="needs the compiled extension in the checkout: make test"
)

#: What an installation runs, in a folder of its own: kernels, and what ships beside the modules.
RUN = """
import sys
from pathlib import Path
import torch, iirsnn
from iirsnn.ops import build
from iirsnn.train import recipe

home = Path(iirsnn.__file__).parent
assert home.is_relative_to(sys.prefix), home
x = torch.randn(3, 2, 17)
for backend in BACKENDS:
    spikes = iirsnn.functional.lif(x, leak=0.9, backend=backend)
    assert torch.equal(spikes, iirsnn.functional.lif(x, leak=0.9, backend="reference"))
assert "digits" in recipe.names() and "fashion-mnist" in recipe.names("tables")
assert recipe.load("digits").timesteps == [5, 4, 3, 2, 1]
assert all((home / "csrc" / name).is_file() for name in CSRC), CSRC
assert all(Path(source).is_file() for source in build.recipe("0")["sources"])
assert (home / "kernels" / "lif.py").is_file() and (home / "py.typed").is_file()
assert (home / "_C.pyi").is_file()
"""
ENGINE = """
from torch import nn
from iirsnn.event import EventNetwork

ann = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
images = torch.rand(5, 1, 8, 8)
snn = iirsnn.convert(ann, images, timesteps=1).eval()
with torch.no_grad():
    torch.testing.assert_close(EventNetwork.from_model(snn)(images), snn(images))
"""


def sources():
    """What csrc/ holds, relative to it."""
    kept = (".h", ".cpp", ".cu", ".map")
    found = (ROOT / "csrc").rglob("*")
    names = [str(p.relative_to(ROOT / "csrc")) for p in found if p.suffix in kept]
    return sorted([*names, "event/sources.txt"])


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """What `make wheel` writes: sdist and wheel, made with this environment."""
    folder = tmp_path_factory.mktemp("dist")
    settings = [f"DIST={folder}", f"VENV={sys.prefix}", f"--old-file={sys.prefix}/.torch"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment["IIRSNN_CAPABILITIES"] = "usable"  # what is compiled already, as `make test` does
    done = subprocess.run(
        ["make", "wheel", *settings], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = [Path(name) for name in done.stdout.splitlines()[-2:]]
    assert sorted(made) == sorted(folder.iterdir())
    return made


def installed(package, folder):
    """The python of an environment over this one's packages, with the package installed in it."""
    venv.create(folder, with_pip=False)
    home = next((folder / "lib").glob("python*/site-packages"))
    base = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (home / "base.pth").write_text("\n".join(base) + "\n", encoding="utf-8")
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--force-reinstall", package],
        env=os.environ | {"CXX": "none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return python


def check(python, code, folder):
    environment = os.environ | {"IIRSNN_JIT": "0"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    command = [python.parent / "iirsnn", "env"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_sdist_holds_every_source(packages):
    with tarfile.open(packages[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"csrc/{source}" for source in sources()} <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "iirsnn/_C.pyi"} <= names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")} <= names


def test_an_installed_sdist_runs(packages, tmp_path):
    """With the library and the extension of the checkout, in place of another compilation."""
    python = installed(packages[0], tmp_path / "venv")
    home = next((tmp_path / "venv" / "lib").glob("python*/site-packages/iirsnn"))
    shutil.copy(EXTENSION, home)
    shutil.copy(LIBRARY, home / "runtime")
    code = f"BACKENDS, CSRC = ['reference', 'cpu'], {sources()}\n{RUN}{ENGINE}"
    assert "backend cpu        yes" in check(python, code, tmp_path)


@pytest.mark.slow  # the same once more, where there is no compiler
def test_an_installed_sdist_runs_as_pure_python(packages, tmp_path):
    python = installed(packages[0], tmp_path / "venv")
    code = f"BACKENDS, CSRC = ['reference'], {sources()}\n{RUN}"
    said = check(python, code, tmp_path)
    assert "backend reference  yes" in said
    assert "backend cpu        no" in said


def test_an_installed_wheel_runs(packages, tmp_path):
    assert packages[1].stem.endswith(sysconfig.get_platform().replace("-", "_"))
    python = installed(packages[1], tmp_path / "venv")
    code = f"BACKENDS, CSRC = ['reference', 'cpu'], {sources()}\n{RUN}{ENGINE}"
    assert "backend cpu        yes" in check(python, code, tmp_path)
