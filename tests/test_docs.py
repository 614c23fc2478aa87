"""README.md and docs/: links lead somewhere, and every block of Python runs."""

import re
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

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


def blocks(page):
    return list(Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples())


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page in turn, as one program in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        block.evaluate()
