"""README.md and docs/: links lead somewhere, Python runs, every public name is described."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from tests.conftest import command

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
#: Packages that only these pages need.
NEEDED = {"docs/replace_neurons.md": "spikingjelly"}

_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The page without its blocks of code."""
    return _FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What a link's # may name: headings in lower case, spaces as hyphens, as GitHub has them."""
    found = (re.sub(r"[^\w\- ]", "", h.lower()) for h in _HEADING.findall(prose(page)))
    return {heading.replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", LINKED, ids=name)
def test_links_and_images_exist(page):
    for target in _LINK.findall(prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name(page)}: {target} does not exist"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: {target} names no heading"


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for target in _LINK.findall(prose(PAGES[0]))}
    assert {name(page) for page in PAGES[1:]} <= linked


def test_the_readme_is_one_screen():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 120


def test_contributing_lists_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    inner = [*(ROOT / "iirsnn").iterdir(), *(ROOT / "csrc").iterdir()]
    outer = [ROOT / each for each in ("kernels", "recipes", "tests", "benchmarks", "docs")]
    rooms = [name(path) for path in (*inner, *outer) if path.is_dir() and path.name[0] != "_"]
    assert [room for room in rooms if f"`{room}/`" not in text] == []


def type_commands(block):
    """Each line of a tutorial's ```sh as a person would type it."""
    for line in block.parsed.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "iirsnn", line
        assert command(*arguments) == 0, line


def blocks(page):
    parsers = [PythonCodeBlockParser()]
    if page.parent.name == "tutorials":
        parsers.append(CodeBlockParser(language="sh", evaluator=type_commands))
    return list(Sybil(parsers=parsers).parse(page).examples())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_python_goes_by_another_name(page):
    """A block of another language is not run."""
    languages = re.findall(r"^``` *(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(languages) <= {"python", "sh", "console", "cpp"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page in turn, as one program in an empty folder."""
    if name(page) in NEEDED:
        needed = NEEDED[name(page)]
        pytest.importorskip(needed, reason=f"needs {needed}, which `make test` installs")
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        block.evaluate()


def hooks():
    """docs/hooks.py, which MkDocs runs."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_described():
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert hooks().undocumented(api) == []


def test_a_name_that_is_not_described_is_seen(monkeypatch):
    class Bare:
        def method(self):
            pass

    site = hooks()
    monkeypatch.setattr(site, "public_names", lambda: [("iirsnn.Bare", Bare)])
    assert site.undocumented("::: iirsnn.Other") == [
        "iirsnn.Bare has no place in docs/api.md",
        "iirsnn.Bare has no docstring",
        "iirsnn.Bare.method has no docstring",
    ]


def test_links_on_the_site():
    site = hooks()
    assert site.repository_path("tutorials/a.md", "../../results/r.json") == "results/r.json"
    assert site.repository_path("index.md", "docs/install.md") == "docs/install.md"
    for path, uri in (
        ("docs/tutorials/a.md", "tutorials/a.md"),
        ("CONTRIBUTING.md", "contributing.md"),
        ("recipes", "reference/recipes.md"),
        ("results/r.json", "repository/results/r.json"),
    ):
        assert site.site_uri(path) == uri


def test_pages_made_by_the_code():
    page = hooks().command_line()
    for each in ("train", "evaluate", "report", "compare", "reproduce", "deploy", "predict"):
        assert f"## iirsnn {each}\n" in page
    assert "| --resume RUN | Go on with a run that was stopped. |" in page
    page = hooks().recipes()
    assert "| epochs | `int` | `1` | passes over the training set. |" in page
    assert "| cutout | `int` | `0` | side of a square at a random place" in page
    assert "### fashion-mnist-plus" in page
