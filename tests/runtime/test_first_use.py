"""Where the engine was not compiled at installation, its first use compiles it, and keeps it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iirsnn.errors import RunError
from iirsnn.runtime import library
from tests.runtime.test_network import saved, vgg

INSTALLED = Path(library.__file__).with_name(library.NAME)

#: A compiler that writes down what it is asked for; its library is the one that is installed.
COMPILER = f"""#!/bin/sh
[ "$1" = --version ] && echo "c++ 1" && exit
while [ "$1" != -o ]; do shift; done
echo "$2" >> "$COMPILED"
case "$2" in *.so) cp "{INSTALLED}" "$2" ;; *) : > "$2" ;; esac
"""


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """No library beside the module, an empty cache, and the compiler above; what it has made."""
    monkeypatch.setattr(library, "NAME", "libnone.so")
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    for name in ("IIRSNN_JIT", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COMPILED", str(tmp_path / "compiled"))
    return lambda: (tmp_path / "compiled").read_text().splitlines()


def test_it_is_compiled_once_and_kept(not_installed, tmp_path, capfd):
    file = library._file()
    assert file.parent.parent == tmp_path / "cache" / "iirsnn" / "kernels"
    assert file.read_bytes() == INSTALLED.read_bytes()
    assert (
        capfd.readouterr().err == "iirsnn: libiirsnn.so is not compiled; compiling it, a minute\n"
    )
    made = not_installed()
    assert {Path(name).name.split(".")[0] for name in made} >= {"event-engine", "file-json"}
    assert library._file() == file
    assert not_installed() == made
    assert sorted(path.name for path in file.parent.iterdir()) == ["libiirsnn.so", "lock"]


def test_another_compiler_has_a_folder_of_its_own(not_installed, monkeypatch, tmp_path):
    first = library._file()
    (tmp_path / "c++").write_text(COMPILER.replace("c++ 1", "c++ 2"))
    assert library._file() != first


def test_it_takes_no_torch(not_installed, tmp_path):
    model, x = vgg()
    net = saved(tmp_path / "net", model, x)
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys, numpy, iirsnn.runtime\n"
        "iirsnn.runtime.library.NAME = 'libnone.so'\n"
        "network = iirsnn.runtime.load(sys.argv[1])\n"
        "numpy.save(sys.argv[3], network(numpy.load(sys.argv[2])))\n"
        "assert not {'torch', 'iirsnn.ops'} & {*sys.modules}\n"
    )
    files = [tmp_path / name for name in ("net", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    assert np.array_equal(np.load(files[2]), net(x).numpy())


def test_it_can_be_told_not_to_compile(not_installed, monkeypatch):
    monkeypatch.setenv("IIRSNN_JIT", "0")
    with pytest.raises(RunError, match=r"libiirsnn\.so is not compiled and IIRSNN_JIT=0"):
        library._file()


def test_no_compiler(not_installed, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RunError, match=r"there is no C\+\+ compiler \(no-such-compiler\)"):
        library._file()


def test_a_compiler_that_fails(not_installed, tmp_path):
    (tmp_path / "c++").write_text('#!/bin/sh\n[ "$1" = --version ] || exit 1\n')
    with pytest.raises(RunError, match="and compiling it now failed: Command"):
        library._file()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_no_folder(not_installed, monkeypatch):
    monkeypatch.setattr("iirsnn.cache.folder", lambda: None)
    with pytest.raises(RunError, match="set HOME or XDG_CACHE_HOME"):
        library._file()


@pytest.mark.slow  # compiles the engine
def test_by_the_compiler_of_this_machine(not_installed, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "c++")
    test_it_takes_no_torch(not_installed, tmp_path)
    assert list((tmp_path / "cache").rglob("libiirsnn.so"))
