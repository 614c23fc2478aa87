"""Tables on a narrow console: whatever its width, every number is there, whole."""

import io

import pytest
from rich.console import Console

from iirsnn.report.tables import Column, print_table, short

COLUMNS = [Column("layer", left=True), *(Column(f"column\n{n}") for n in range(9))]
ROWS = [[f"block.{row}", *(f"{1000 * row + n}.5 M" for n in range(9))] for row in range(3)]


def printed(width, columns=COLUMNS, rows=ROWS, **options):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(console, "A title", columns, rows, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [24, 40, 60, 80, 200])
def test_no_number_is_cut_and_each_part_names_its_rows(width):
    text = printed(width)
    assert all(len(line) <= width for line in text.splitlines())
    words = text.split()
    for row in ROWS:
        assert all(words.count(cell.split()[0]) == 1 for cell in row[1:])
    parts = text.count("layer")
    assert all(text.count(row[0]) == parts for row in ROWS)
    assert text.count("A title") == 1
    assert (parts > 1) == (width < 100)


def test_long_names_give_way_to_numbers():
    rows = [["a-name-of-many-letters" * 3, "93.51 ± 0.12"]]
    text = printed(40, [Column("", left=True), Column("accuracy")], rows)
    assert "93.51 ± 0.12" in text
    assert "…" not in text


def test_a_total_stands_apart():
    plain, apart = printed(200).splitlines(), printed(200, total=True).splitlines()
    assert len(apart) == len(plain) + 1


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (15.47e9, "15.5 G"), (123.4e12, "123 T")],
)
def test_short_numbers(count, text):
    assert short(count) == text
