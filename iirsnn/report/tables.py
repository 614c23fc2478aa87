"""Tables on a console, whose numbers are never cut, and in Markdown; how both write large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


@dataclass
class Column:
    """A column of numbers, or with left=True of words."""

    header: str
    style: str = ""
    left: bool = False


def print_table(
    console: Console,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    total: bool = False,
) -> None:
    """Print a table; one that is too wide becomes several, each with the first column.

    A number is never cut; words are folded where they leave no room for one.

    Args:
        console: where to.
        title: above it.
        columns: one for each cell of a row.
        rows: the cells.
        total: whether the last row stands apart.
    """

    def table(shown: Sequence[int]) -> Table:
        made = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
        for index in shown:
            column = columns[index]
            made.add_column(
                column.header,
                justify="left" if column.left else "right",
                style=column.style,
                no_wrap=not column.left,
                overflow="fold",
            )
        for number, row in enumerate(rows):
            if total and number == len(rows) - 1:
                made.add_section()
            made.add_row(*(row[index] for index in shown))
        return made

    def fits(shown: Sequence[int]) -> bool:
        endless = console.options.update(max_width=10_000)
        return Measurement.get(console, endless, table(shown)).maximum <= console.width

    left = list(range(1, len(columns)))
    while left:
        shown = [0, left.pop(0)]
        while left and fits([*shown, left[0]]):
            shown.append(left.pop(0))
        console.print(table(shown))
        title = ""


#: (title, header, rows) of a table of words.
MarkdownTable = tuple[str, list[str], list[list[str]]]


def markdown_tables(tables: Sequence[MarkdownTable]) -> str:
    """The tables as Markdown, each below its title."""
    parts = []
    for title, header, rows in tables:
        lines = [header, ["---"] * len(header), *rows]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        parts.append(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join(parts)


def short(count: float) -> str:
    """A count in three digits and a unit: 15.5 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
