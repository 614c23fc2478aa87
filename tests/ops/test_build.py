"""What was built, how it is decided, and what happens where nothing can be built."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

import iirsnn
from iirsnn.ops import build

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("IIRSNN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "IIRSNN_JIT"):
        monkeypatch.delenv(name, raising=False)
    before = os.environ.get("TORCH_CUDA_ARCH_LIST")
    yield
    if before is None:
        os.environ.pop("TORCH_CUDA_ARCH_LIST", None)


def test_build_info_tells_the_build():
    info = importlib.import_module("iirsnn._C").build_info()
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["flags"].split(",") == build.CXX_FLAGS
    assert "-ffp-contract=off" in info["flags"]
    assert "fast-math" not in info["flags"]
    levels = ("portable", "avx2", "avx512")
    assert levels.index(info["cpu_capability"]) <= levels.index(info["compiled_capability"])
    assert bool(info["cuda_archs"]) == info["cuda"]


def test_env_report_names_versions_backends_and_reasons():
    report = iirsnn.env_report()
    for text in (torch.__version__, "backend cpu", "backend reference  yes", "cpu capability"):
        assert text in report
    line = next(line for line in report.splitlines() if line.startswith("backend cuda"))
    assert line.split(maxsplit=2)[2].startswith(("yes", "no: "))


@pytest.mark.parametrize("name", ["portable", "mmx"])
def test_the_instruction_set_can_be_chosen_from_outside(name):
    path = importlib.import_module("iirsnn._C").__file__
    code = (
        "import torch, importlib.util as u\n"
        f"spec = u.spec_from_file_location('_C', {path!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.build_info()['cpu_capability'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"IIRSNN_CPU_CAPABILITY": name},
        capture_output=True,
        text=True,
    )
    if name == "portable":
        assert done.stdout.strip() == "portable"
    else:
        assert "ValueError: IIRSNN_CPU_CAPABILITY: expected portable, avx2 or avx512" in done.stderr


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"cpu capability: expected .* got 'mmx'"):
        importlib.import_module("iirsnn._C").set_cpu_capability("mmx")


def test_what_stays_on_this_machine_is_compiled_for_it_and_what_may_leave_it_for_all(monkeypatch):
    monkeypatch.delenv("IIRSNN_CAPABILITIES", raising=False)
    macros = ["__x86_64__", "__AVX2__", "__F16C__", "__BMI__"]
    monkeypatch.setattr(
        build.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=" ".join(macros))
    )

    def chosen(*default):
        words = ("PORTABLE_ONLY", "NO_AVX512", "HIGHEST_ALONE")
        return [word for word in words if f"-DIIRSNN_{word}" in build.kernel_command(*default)]

    assert chosen() == ["NO_AVX512", "HIGHEST_ALONE"]
    assert chosen("usable") == ["NO_AVX512"]
    assert chosen("all") == []
    macros.remove("__F16C__")
    assert chosen("usable") == ["PORTABLE_ONLY"]
    monkeypatch.setenv("IIRSNN_CAPABILITIES", "all")
    assert chosen() == []
    macros[0] = "__aarch64__"
    monkeypatch.setenv("IIRSNN_CAPABILITIES", "native")
    assert chosen("all") == ["HIGHEST_ALONE"]
    monkeypatch.setenv("IIRSNN_CAPABILITIES", "avx2")
    with pytest.raises(RuntimeError, match="expected native, usable or all, got 'avx2'"):
        build.kernel_command()


CAPABILITY = """
#include <cstdio>
#include <exception>
#include "simd/versions.h"
struct Width {
  template <int kBytes>
  static void run() { std::printf("%d\\n", kBytes); }
};
int main() {
  try {
    iirsnn::run<Width>();
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""


@pytest.mark.parametrize(
    ("capabilities", "asked", "expected"),
    [
        ("usable", "portable", "16"),
        ("native", "portable", "{name} alone as compiled, got 'portable'"),
        ("native", "{name}", "{bytes}"),
        ("all", "", "{bytes}"),
    ],
)
def test_a_version_that_was_not_compiled_is_refused(tmp_path, capabilities, asked, expected):
    name = importlib.import_module("iirsnn._C").build_info()["cpu_capability"]
    if name == "portable" and capabilities == "native":
        pytest.skip("this processor has the portable version alone")
    facts = {"name": name, "bytes": {"portable": 16, "avx2": 32, "avx512": 64}[name]}
    (tmp_path / "main.cpp").write_text(CAPABILITY)
    sources = [tmp_path / "main.cpp", build.source_dir() / "simd" / "capability.cpp"]
    flags = [*build.kernel_flags(capabilities), f"-I{build.source_dir()}"]
    subprocess.run(["c++", *flags, *sources, "-o", tmp_path / "main"], check=True)
    env = os.environ | {"IIRSNN_CPU_CAPABILITY": asked.format(**facts)}
    done = subprocess.run([tmp_path / "main"], env=env, capture_output=True, text=True)
    assert expected.format(**facts) in done.stdout


def test_kernels_of_a_better_processor_say_so(tmp_path):
    if importlib.import_module("iirsnn._C").build_info()["cpu_capability"] == "avx512":
        pytest.skip("this processor has all instruction sets")
    (tmp_path / "main.cpp").write_text(CAPABILITY)
    sources = [tmp_path / "main.cpp", build.source_dir() / "simd" / "capability.cpp"]
    flags = [*build.kernel_flags("all"), "-DIIRSNN_HIGHEST_ALONE", f"-I{build.source_dir()}"]
    subprocess.run(["c++", *flags, *sources, "-o", tmp_path / "main"], check=True)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True)
    assert "got some for avx512 alone; compile anew" in done.stdout


def test_only_what_changed_is_compiled_again(tmp_path):
    source, header = tmp_path / "one.cpp", tmp_path / "one.h"
    source.write_text('#include "one.h"\nint one = ONE;\n')
    header.write_text("#define ONE 1\n")

    def made():
        (path,) = build.compile_objects([source], tmp_path / "made", ["c++"]).values()
        return path.stat().st_mtime_ns

    first = made()
    assert made() == first
    later = first / 1e9 + 5
    os.utime(header, (later, later))
    assert made() != first
    header.write_text("#error no\n")
    os.utime(header, (later + 5, later + 5))
    with pytest.raises(subprocess.CalledProcessError):
        made()


def test_cuda_is_decided_by_toolkit_and_torch(monkeypatch):
    home = cpp_extension.CUDA_HOME
    assert build.want_cuda("0") == (False, "IIRSNN_BUILD_CUDA=0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build.want_cuda("auto") == (False, "nvcc was not found (set CUDA_HOME)")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    assert build.want_cuda("auto") == (False, "this torch was built without CUDA")


def test_cuda_is_built_where_a_toolkit_is_found_without_asking_for_a_gpu(monkeypatch, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no include/cuda_runtime.h" in build.want_cuda("auto")[1]
    header = tmp_path / "include" / "cuda_runtime.h"
    header.parent.mkdir()
    header.touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    recipe = build.recipe("auto")
    assert recipe["cuda"]
    assert "-DIIRSNN_WITH_CUDA" in recipe["cxx"]
    assert any(source.endswith("lif_forward.cu") for source in recipe["sources"])
    assert "--fmad=false" in recipe["nvcc"]


def test_asking_for_cuda_in_vain_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"IIRSNN_BUILD_CUDA=1: expected .* without CUDA"):
        build.want_cuda("1")


def test_an_unknown_mode_is_an_error(monkeypatch):
    monkeypatch.setenv("IIRSNN_BUILD_CUDA", "yes")
    with pytest.raises(RuntimeError, match="IIRSNN_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"):
        build.cuda_mode()


def test_the_architecture_list_is_respected(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert build.cuda_archs() == "8.0;9.0+PTX"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert build.cuda_archs() == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def test_a_cpu_build_has_no_cuda_in_it():
    recipe = build.recipe("0")
    names = {Path(source).name for source in recipe["sources"]}
    assert names == {"module.cpp"}
    kernels = {path.name for path in build.kernel_sources()}
    assert {"lif_cpu.cpp", "capability.cpp", "engine.cpp"} <= kernels
    assert not kernels & {*names, "lif_torch.cpp", "spike_ops.cpp"}
    assert not any(name.endswith(".cu") for name in names)
    assert not any("CUDA" in flag for flag in recipe["cxx"])


@pytest.fixture
def not_compiled(monkeypatch, tmp_path):
    """As if iirsnn._C had not been built, with an empty cache."""
    monkeypatch.delitem(sys.modules, "iirsnn._C")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # without a GPU it does not compile for one, though a toolkit may be installed
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real, find = importlib.import_module, importlib.util.find_spec

    def import_module(name, *rest):
        if name == "iirsnn._C":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(build.importlib, "import_module", import_module)
    monkeypatch.setattr(
        build.importlib.util, "find_spec", lambda name: None if name == "iirsnn._C" else find(name)
    )


@pytest.fixture
def compiler(monkeypatch):
    """Stands for ours and for torch's, which is called so; what it makes is an empty file."""
    calls = []
    kernel = Path("kernel.o")
    monkeypatch.setattr(build, "compile_objects", lambda *_: {Path("a.cpp"): kernel})

    def load(**how):
        calls.append(how)
        file = Path(how["build_directory"]) / f"{how['name']}.so"
        file.touch()
        return SimpleNamespace(build_info=dict, __file__=str(file))

    monkeypatch.setattr(cpp_extension, "load", load)
    return calls


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "iirsnn" / "kernels").glob("*/*"))


def test_compiling_at_first_use_takes_the_same_recipe(not_compiled, compiler, tmp_path, capsys):
    assert build.load() is None
    recipe = build.recipe("0")
    assert compiler[0]["sources"] == recipe["sources"]
    assert compiler[0]["extra_cflags"] == recipe["cxx"]
    assert compiler[0]["extra_ldflags"] == ["kernel.o"]
    assert not compiler[0]["with_cuda"]
    lock, made = sorted(kept(tmp_path), key=lambda path: path.suffix)
    assert (lock.name, made.name) == ("lock", "iirsnn_C.so")
    assert sys.modules["iirsnn._C"].__file__ == str(made)
    said = "iirsnn: iirsnn._C is not compiled; compiling its kernels, a minute\n"
    assert capsys.readouterr().err == said


def test_what_was_compiled_is_kept(not_compiled, compiler, monkeypatch, capsys):
    assert build.load() is None
    del sys.modules["iirsnn._C"]
    capsys.readouterr()
    imported = []
    monkeypatch.setattr(
        build, "_import", lambda file: imported.append(file) or SimpleNamespace(build_info=dict)
    )
    assert build.load() is None
    assert len(compiler) == len(imported) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("macro", "flags"), [("__GNUC__", ["-fopenmp"]), ("__clang__", [])])
def test_openmp_is_that_of_the_compiler_that_torch_was_built_by(monkeypatch, macro, flags):
    done = SimpleNamespace(stdout=f"#define {macro} 12\n")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: done)
    assert build._openmp() == flags


@pytest.mark.parametrize("what", ["torch", "flags", "source", "compiler"])
def test_another_torch_source_flag_or_compiler_has_a_folder_of_its_own(
    what, not_compiled, monkeypatch, tmp_path
):
    def file():
        return build._compiled_file(build.recipe("0"), "c++")

    first = file()
    assert first == file()
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "2.10.0")
    elif what == "flags":
        monkeypatch.setattr(build, "CXX_FLAGS", ["-O1"])
    elif what == "compiler":
        done = SimpleNamespace(stdout=b"c++ 99")
        monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: done)
    else:
        shutil.copytree(build.source_dir(), tmp_path / "csrc")
        monkeypatch.setattr(build, "source_dir", lambda: tmp_path / "csrc")
        assert file() == first
        with (tmp_path / "csrc" / "lif" / "lif_step.h").open("a") as header:
            header.write("// changed")
    assert file() != first


def test_an_extension_for_another_torch_is_compiled_anew(
    not_compiled, compiler, monkeypatch, tmp_path, capsys
):
    old = tmp_path / "_C.so"
    old.write_bytes(b"\x7fELF iirsnn for torch 2.9.1\0 the rest")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=old))
    assert build.load() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"iirsnn: iirsnn._C was compiled for torch 2.9.1, not for {torch.__version__}; "
        "compiling its kernels, a minute"
    )


def test_an_extension_that_cannot_be_imported_is_compiled_anew(
    not_compiled, compiler, monkeypatch, capsys
):
    def import_module(name):
        raise ImportError("_C.so: undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(build.importlib, "import_module", import_module)
    assert build.load() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "not for this torch (_C.so: undefined symbol: _ZN3c10); compiling" in line


def test_the_extension_says_which_torch_it_is_for():
    module = importlib.import_module("iirsnn._C")
    assert torch.__version__.startswith(module.build_info()["torch"])
    said = f"iirsnn for torch {module.build_info()['torch']}".encode()
    assert said in Path(module.__file__).read_bytes()


def test_a_killed_compilation_does_not_stop_the_next(not_compiled, compiler, tmp_path):
    file = build._compiled_file(build.recipe("0"), cpp_extension.get_cxx_compiler())
    code = (
        "import time, importlib.util as u; from pathlib import Path\n"
        f"spec = u.spec_from_file_location('build', {build.__file__!r})\n"
        "build = u.module_from_spec(spec); spec.loader.exec_module(build)\n"
        f"folder = Path({str(file.parent)!r}); folder.mkdir(parents=True)\n"
        "with build._alone(folder):\n"
        "    (folder / 'tmpold').mkdir(); (folder / 'tmpold' / 'lock').touch()\n"
        "    print('compiling', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert build.load() is None
    assert file.is_file()


def test_first_use_without_a_compiler_gives_the_reason(not_compiled, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler (no-such-compiler)" in build.load()


def test_first_use_without_a_home_gives_the_reason(not_compiled, monkeypatch):
    monkeypatch.setattr("iirsnn.cache.folder", lambda: None)
    assert "there is no folder to compile in: set HOME or XDG_CACHE_HOME" in build.load()


def test_first_use_that_fails_to_compile_gives_the_reason(not_compiled, monkeypatch, tmp_path):
    def load(**how):
        raise RuntimeError("Error building extension\nlong log")

    monkeypatch.setattr(build, "compile_objects", lambda *_: {})
    monkeypatch.setattr(cpp_extension, "load", load)
    assert build.load().endswith("compiling it now failed: Error building extension")
    assert [path.name for path in kept(tmp_path)] == ["lock"]


def test_first_use_can_be_told_not_to_compile(not_compiled, monkeypatch):
    monkeypatch.setenv("IIRSNN_JIT", "0")
    assert build.load() == "iirsnn._C is not compiled and IIRSNN_JIT=0"


def setup_says(tmp_path, **environment):
    """What `setup.py --version` prints, in an environment of its own."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch')\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_setup_without_torch_installs_pure_python_and_says_so(tmp_path, no_torch):
    code, said = setup_says(tmp_path, **no_torch)
    assert code == 0
    assert "torch is not installed" in said
    assert "installing pure Python, which compiles itself at first use" in said


def test_setup_without_a_compiler_installs_pure_python_and_says_so(tmp_path):
    code, said = setup_says(tmp_path, CXX="no-such-compiler")
    assert code == 0
    assert "there is no C++ compiler (no-such-compiler); installing pure Python" in said


def test_setup_asked_for_cuda_in_vain_fails_loudly(tmp_path, no_torch):
    code, said = setup_says(tmp_path, **no_torch, IIRSNN_BUILD_CUDA="1")
    assert code != 0
    assert "IIRSNN_BUILD_CUDA=1: expected a CUDA build to be possible, but torch is not" in said


def test_a_compiler_that_fails_leaves_pure_python_and_says_so(tmp_path):
    copy = tmp_path / "copy"
    for name in ("csrc", "iirsnn", "kernels", "recipes"):
        left_out = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    failing = tmp_path / "c++"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build"],
        env=os.environ | {"CXX": str(failing), "CC": str(failing), "IIRSNN_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
        cwd=copy,
    )
    assert done.returncode == 0, done.stderr
    assert "warning: iirsnn: the C++ kernels do not compile (" in done.stderr
    assert "installing pure Python, which compiles itself at first use" in done.stderr
    assert not list(copy.rglob("*.so"))
    assert len(list((copy / "build").rglob("module.cpp"))) == 1  # to be compiled at first use
    asked = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        env=os.environ | {"CXX": str(failing), "CC": str(failing), "IIRSNN_BUILD_CUDA": "0"},
        capture_output=True,
        cwd=copy,
    )
    assert asked.returncode != 0
