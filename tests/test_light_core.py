"""What `import iirsnn` and the command line load: each in a process of its own."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest

import iirsnn
from iirsnn.cli import EXTRA
from tests.test_architecture import EXTRAS

HEAVY = {*EXTRAS, "torch._dynamo"}


def fresh(code, *arguments, **environment):
    """A process that runs `code` with `sys.argv = ["iirsnn", *arguments]`."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def loaded_by(code, *arguments):
    """The modules in sys.modules at the end of such a process; it may exit."""
    listing = "import atexit, json, sys\natexit.register(lambda: print(json.dumps([*sys.modules])))"
    done = fresh(f"{listing}\n{code}", *arguments)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1])), done.stdout


def test_importing_the_package_loads_nothing_else():
    loaded, _ = loaded_by("import iirsnn")
    assert loaded & {"torch", "numpy", *HEAVY} == set()


def test_the_public_names_load_torch_and_no_extra():
    loaded, _ = loaded_by("from iirsnn import *")
    assert {"torch", "iirsnn.nn", "iirsnn.event.network"} <= loaded
    assert loaded & HEAVY == set()


def test_public_names_are_listed_and_load():
    assert set(iirsnn.__all__) <= set(dir(iirsnn))
    assert all(getattr(iirsnn, name) is not None for name in iirsnn.__all__)
    with pytest.raises(AttributeError, match="module 'iirsnn' has no attribute 'nothing'"):
        _ = iirsnn.nothing


def test_convert_is_the_function_whatever_was_imported():
    code = "import iirsnn.conversion.ann_to_snn, iirsnn.train.pipeline"
    assert fresh(f"{code}\nassert callable(iirsnn.convert)").returncode == 0


MAIN = "from iirsnn.cli import main\nmain()"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_and_version_load_no_torch(arguments):
    loaded, said = loaded_by(MAIN, *arguments)
    assert "Usage:" in said or re.match(r"iirsnn \d+\.\d+", said)
    assert loaded & ({"torch", "numpy", *HEAVY} - {"typer", "rich"}) == set()


def without(*packages):
    """Code that makes these packages look not installed, and runs the command line."""
    return f"import sys\nsys.modules |= dict.fromkeys({packages})\n{MAIN}"


@pytest.mark.parametrize("package", ["typer", "rich", "omegaconf", "sklearn"])
def test_train_without_the_extra_says_what_to_install(package, tmp_path):
    done = fresh(without(package), "train", "digits", "--out", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: iirsnn train needs the package {package}, which is not installed: "
        "pip install 'iirsnn[train]'\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--version"], "iirsnn "), (["env"], "backend reference  yes")]
)
def test_a_core_installation_tells_what_it_is(arguments, said):
    done = fresh(without(*sorted(EXTRA)), *arguments)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_the_extra_is_what_the_command_line_says_it_is():
    modules = {"pillow": "PIL", "scikit-learn": "sklearn"}
    required = importlib.metadata.requires("iirsnn")
    names = {re.match(r"[\w-]+", line)[0] for line in required if 'extra == "train"' in line}
    assert {modules.get(name, name) for name in names} == EXTRA == EXTRAS
    core = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert core == {"torch", "numpy", "safetensors"}
