"""What `make` installs, with a pip that only writes down what it is asked for."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"

#: For `python -m venv FOLDER`: a python that has no torch, and that pip.
PYTHON = """#!/bin/sh
for folder; do :; done
mkdir -p "$folder/bin"
cat > "$folder/bin/python" <<end
#!/bin/sh
exit 1
end
cat > "$folder/bin/pip" <<end
#!/bin/sh
echo "\\$*" >> "$folder/asked"
case "\\$*" in *"$UNREACHABLE"*) exit 1 ;; esac
end
chmod +x "$folder/bin/python" "$folder/bin/pip"
"""


@pytest.fixture
def asked(tmp_path):
    """What pip is asked for by `make .venv/.torch`, where PATH has no more than `tools`."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name, text="#!/bin/sh\n"):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)

    for name in ("sh", "make", "uname", "touch", "mkdir", "chmod", "find", "cat"):
        (programs / name).symlink_to(shutil.which(name))
    program("python3", PYTHON)

    def asked(*settings, tools=(), unreachable="nothing", cuda_home="/nowhere"):
        for name in tools:
            program(name)
        folder = tmp_path / "venv"
        environment = {
            "PATH": str(programs),
            "CUDA_HOME": str(cuda_home),
            "UNREACHABLE": unreachable,
        }
        done = subprocess.run(
            ["make", f"VENV={folder}", *settings, f"{folder}/.torch"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (folder / ".torch").exists()
        lines = (folder / "asked").read_text(encoding="utf-8").splitlines()
        assert lines[0].endswith("setuptools wheel ninja pybind11")
        assert all(line.endswith("torch torchvision") for line in lines[1:])
        return [CPU_INDEX in line for line in lines[1:]], lines[-1]

    return asked


linux = pytest.mark.skipif(platform.system() != "Linux", reason="torch has CUDA on Linux alone")


@linux
def test_torch_comes_without_cuda_where_nothing_could_use_it(asked):
    assert asked()[0] == [True]


@linux
def test_the_package_index_serves_where_pytorchs_own_cannot_be_reached(asked):
    assert asked(unreachable=CPU_INDEX)[0] == [True, False]


@pytest.mark.parametrize("tool", ["nvidia-smi", "nvcc"])
def test_torch_comes_with_cuda_where_its_tools_are(asked, tool):
    assert asked(tools=[tool])[0] == [False]


def test_torch_comes_with_cuda_where_its_toolkit_is(asked, tmp_path):
    assert asked(cuda_home=tmp_path)[0] == [False]


def test_torch_flags_decide_alone(asked):
    found, command = asked("TORCH_FLAGS=--index-url https://example.org/wheels")
    assert found == [False]
    assert "--index-url https://example.org/wheels torch torchvision" in command
