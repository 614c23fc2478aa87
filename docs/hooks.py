"""What MkDocs runs to make a site of docs/ (`make docs`): nothing of it needs the network.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, the command line and the recipes are
described by the code itself, links out of docs/ lead to copies, and a public name without a
docstring, or without a place on the API page, fails the build. MkDocs is imported where it calls:
the tests do without it.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that are files beside docs/.
BESIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
#: Where a link to a folder leads.
FOLDERS = {"recipes": "reference/recipes.md", "docs": "index.md"}

_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Fail where a public name is not documented."""
    from mkdocs.exceptions import PluginError

    problems = undocumented((ROOT / "docs" / "api.md").read_text(encoding="utf-8"))
    if problems:
        raise PluginError("\n".join(["public names:", *problems]))


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages beside docs/, those made by the code, and whatever pages link to."""
    from mkdocs.structure.files import File

    for uri, source in BESIDE.items():
        files.append(
            File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8"))
        )
    files.append(File.generated(config, "reference/command_line.md", content=command_line()))
    files.append(File.generated(config, "reference/recipes.md", content=recipes()))
    for page in [file for file in files if file.is_documentation_page()]:
        for target, _ in _LINK.findall(page.content_string):
            path = repository_path(page.src_uri, target)
            uri = site_uri(path)
            if (ROOT / path).is_file() and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Links as the repository has them -> as the site has them."""
    here = page.file.src_uri

    def on_site(found: re.Match[str]) -> str:
        uri = site_uri(repository_path(here, found[1]))
        if files.get_file_from_path(uri) is None:  # a web address, code, or broken: as it is
            return found[0]
        return f"]({relpath(uri, dirname(here) or '.')}{found[2] or ''})"

    return _LINK.sub(on_site, markdown)


def repository_path(page: str, target: str) -> str:
    """What a link of a page of the site means, from the root of the repository."""
    source = BESIDE.get(page, f"docs/{page}")
    return normpath(join(dirname(source), target))


def site_uri(path: str) -> str:
    """Where on the site a path of the repository is."""
    for uri, source in BESIDE.items():
        if path == source:
            return uri
    if path in FOLDERS:
        return FOLDERS[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def public_names() -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of what users call: the names of iirsnn and of its rooms."""
    import iirsnn

    for name in iirsnn.__all__:
        found = getattr(iirsnn, name)
        if not inspect.ismodule(found):
            yield f"iirsnn.{name}", found
        elif name != "ops":  # its modules are for who writes kernels; PackedSpikes is in iirsnn
            for inner in getattr(found, "__all__", ["lif"]):
                if inner not in iirsnn.__all__:
                    yield f"iirsnn.{name}.{inner}", getattr(found, inner)


def undocumented(api: str) -> list[str]:
    """A line for each public name without a docstring or a place on the API page."""
    shown = set(re.findall(r"^::: (\S+)$", api, re.MULTILINE))
    problems = []
    for name, found in public_names():
        home = f"{found.__module__}.{found.__qualname__}"  # where a module has the name as well
        if not {name, home} & shown:
            problems.append(f"{name} has no place in docs/api.md")
        members = {name: found}
        if inspect.isclass(found):
            members |= {f"{name}.{key}": value for key, value in vars(found).items()}
        for member, value in members.items():
            last = member.rpartition(".")[2]
            if last.startswith("_") or (last in ("forward", "extra_repr") and member != name):
                continue  # torch's own names say what they do in the class
            if callable(value) or isinstance(value, (property, classmethod, staticmethod)):
                text = inspect.getdoc(value) or ""
                if not text or text.startswith(f"{last}("):  # a dataclass's own is its signature
                    problems.append(f"{member} has no docstring")
    return problems


def command_line() -> str:
    """The reference of the command line, from the commands' own help."""
    from typer.main import get_command

    from iirsnn.cli.commands import app

    parts = [
        "# Command line",
        "For anyone who types `iirsnn`: every command with its arguments and options. Made from "
        "the code when the site is built.",
    ]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        context = command.make_context(f"iirsnn {name}", [], resilient_parsing=True)
        parts += [f"## iirsnn {name}", textwrap.dedent(command.help or "")]
        usage = " ".join(command.collect_usage_pieces(context))
        parts.append(f"```\niirsnn {name} {usage}\n```")
        rows = [parameter.get_help_record(context) for parameter in command.params]
        shown = [row for row in rows if row is not None]
        parts.append(_table(("argument or option", "what it is"), shown))
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """The reference of the recipes: each section's keys and defaults, and the recipes that ship."""
    from iirsnn.train import recipe

    parts = [
        "# Recipes",
        "For anyone who writes a recipe: every key with its type and default. Made from the code "
        "when the site is built. On the command line a key is `--set section.key=value`.",
    ]
    whole = recipe.Recipe()
    parts += _section("The recipe", whole)
    for field in fields(whole):
        value = getattr(whole, field.name)
        if is_dataclass(value):
            parts += _section(f"`{field.name}`", value)
    parts.append("## Recipes that ship")
    for name in recipe.names():
        text = recipe.read("recipe", name)
        parts.append(f"### {name}\n\n```yaml\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _section(title: str, value: Any) -> list[str]:
    meanings = _attributes(inspect.getdoc(type(value)) or "")
    rows = []
    for field in fields(value):
        default = getattr(value, field.name)
        if field.default is MISSING and is_dataclass(default):
            continue  # a section of its own
        kind = getattr(field.type, "__name__", str(field.type)).replace(" | ", " or ")
        rows.append((field.name, f"`{kind}`", f"`{default!r}`", meanings.get(field.name, "")))
    summary = (inspect.getdoc(type(value)) or "").partition("\n\n")[0]
    return [f"## {title}", summary, _table(("key", "type", "default", "what it is"), rows)]


def _attributes(docstring: str) -> dict[str, str]:
    """{name: text} of a docstring's Attributes."""
    _, _, listed = docstring.partition("Attributes:\n")
    joined = re.sub(r"\n\s+", " ", textwrap.dedent(listed))
    return dict(re.findall(r"^\s*(\w+): (.+)$", joined, re.MULTILINE))


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
