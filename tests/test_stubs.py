"""iirsnn/_C.pyi tells of what was built: the same names and parameters."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import iirsnn.ops.backend as backend

STUB = Path(backend.__file__).parents[1] / "_C.pyi"


def stubbed(body):
    """{name: parameters of a function, or names of a class} of a stub's statements."""
    found = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            nameless = [f"arg{index}" for index, _ in enumerate(node.args.posonlyargs)]
            names = [*nameless, *(argument.arg for argument in node.args.args)]
            found[node.name] = [name for name in names if name != "self"]
        elif isinstance(node, ast.ClassDef):
            found[node.name] = stubbed(node.body)
    return found


def built(scope):
    """The same of a module or class that pybind11 made: parameters are in its docstrings."""
    found = {}
    for name, value in vars(scope).items():
        if name.startswith("_") and name != "__init__":
            continue
        if inspect.ismodule(value) or inspect.isclass(value):
            found[name] = built(value)
        elif name == "__init__" and not value.__doc__.startswith("__init__(self: "):
            continue  # of a class that Python cannot make
        elif callable(value):
            signature = value.__doc__.splitlines()[0].partition("(")[2].rpartition(") ->")[0]
            while "[" in signature:
                signature = re.sub(r"\[[^\[\]]*\]", "", signature)
            names = re.findall(r"(?:^|, )(\w+)(?::|(?=,|$))", signature)
            found[name] = [each for each in names if each != "self"]
    return found


def test_the_stub_is_what_was_built():
    reason = backend.why_not("cpu", "cpu")
    if reason is not None:
        pytest.skip(f"no compiled extension: {reason}")
    module = importlib.import_module("iirsnn._C")
    assert stubbed(ast.parse(STUB.read_text(encoding="utf-8")).body) == built(module)
