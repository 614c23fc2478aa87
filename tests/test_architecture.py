"""Imports run downwards only, and what a network needs to run imports nothing of the extras."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: From top to bottom; a room imports from itself and from the lines below its own. A name stands
#: for the module and all that is in it, the longest one counts. The kernels are made to the schemas
#: of `ops`, and `ops.backend` chooses between them: so `ops` is two lines.
LINES = [
    ["iirsnn.__main__"],
    ["iirsnn.cli"],
    ["iirsnn.report"],
    ["iirsnn.train"],
    ["iirsnn.event", "iirsnn.measure"],
    ["iirsnn.conversion"],
    ["iirsnn.models"],
    ["iirsnn.nn"],
    ["iirsnn.functional"],
    ["iirsnn.ops"],
    ["iirsnn.kernels"],
    ["iirsnn.ops.batch_norm", "iirsnn.ops.spike"],
    ["iirsnn.ops.lif"],
    ["iirsnn.ops.compiled"],
    ["iirsnn._C"],
    ["iirsnn.ops.reference"],
    ["iirsnn.ops.surrogates"],
    ["iirsnn.runtime"],
    ["iirsnn.atomic_files", "iirsnn.cache", "iirsnn.versions"],
    ["iirsnn.errors"],
]
LINE_OF = {name: number for number, line in enumerate(LINES) for name in line}
TRAIN = LINE_OF["iirsnn.train"]

#: Packages of the extra [train].
EXTRAS = {
    "torchvision",
    "filelock",
    "omegaconf",
    "rich",
    "typer",
    "matplotlib",
    "sklearn",
    "PIL",
}


def room_of(module):
    """The longest name in LINES that `module` is or is in; None for iirsnn itself and others."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((name for name in names if name in LINE_OF), None)


def modules():
    """(dotted name, file) of every module of the package."""
    for folder, package in (("iirsnn", "iirsnn"), ("kernels", "iirsnn.kernels")):
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


NAMES = {name for name, _ in modules()} | {"iirsnn._C"}


def imports(name, file):
    """(module, line) of every import in a file, wherever it stands, and of importlib's by a string.

    `from package import module` is an import of the module.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            found = [each if each in NAMES else base for each in whole]
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("import_module")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found = [node.args[0].value]
        else:
            continue
        for each in found:
            yield each, node.lineno


def upward(name, file):
    """The imports of a module that lead upwards, or to a room that is in no line."""
    room = room_of(name)
    for module, line in imports(name, file):
        if not module.startswith("iirsnn"):
            continue
        other = room_of(module)
        same = other == room or module == room
        if other is None or not (same or LINE_OF[other] > LINE_OF[room]):
            yield f"{file.relative_to(ROOT)}:{line} imports {module}"


FILES = [(name, file) for name, file in modules() if name != "iirsnn"]


@pytest.mark.parametrize(("name", "file"), FILES, ids=[name for name, _ in FILES])
def test_imports_run_downwards(name, file):
    assert room_of(name) is not None, f"{name} is in no room of LINES"
    assert list(upward(name, file)) == []


@pytest.mark.parametrize(("name", "file"), FILES, ids=[name for name, _ in FILES])
def test_nothing_below_train_imports_an_extra(name, file):
    if LINE_OF[room_of(name)] <= TRAIN:
        return
    taken = {module.split(".")[0] for module, _ in imports(name, file)}
    # image files are what needs Pillow; who classifies one imports this module, nobody else
    assert taken & EXTRAS == ({"PIL"} if name == "iirsnn.runtime.image_files" else set())


@pytest.mark.parametrize(("name", "file"), FILES, ids=[name for name, _ in FILES])
def test_the_runtime_imports_neither_torch_nor_what_does(name, file):
    if room_of(name) not in ("iirsnn.runtime", "iirsnn.errors"):
        return
    taken = {module for module, _ in imports(name, file)}
    assert {module.split(".")[0] for module in taken} & {"torch", "safetensors"} == set()
    assert {m for m in taken if m.startswith("iirsnn")} <= {
        m for m in NAMES if room_of(m) in ("iirsnn.runtime", "iirsnn.errors")
    }


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("from ..train import data", "iirsnn.train.data"),
        ("from ..train.data import load", "iirsnn.train.data"),
        ("def f():\n    import iirsnn.cli.deploy", "iirsnn.cli.deploy"),
        ("import importlib\nimportlib.import_module('iirsnn.report')", "iirsnn.report"),
    ],
)
def test_an_upward_import_is_seen(tmp_path, monkeypatch, text, seen):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    file = tmp_path / "neuron.py"
    file.write_text(text)
    (line,) = upward("iirsnn.nn.neuron", file)
    assert line.endswith(f"imports {seen}")
