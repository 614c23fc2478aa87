"""Tables and pictures as one HTML file that asks for nothing else: no script, no network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from .tables import Column

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }}
section {{ overflow-x: auto; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd; }}
th {{ vertical-align: bottom; font-weight: 600; white-space: pre-line; }}
td.strong {{ font-weight: 600; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; height: auto; }}
figcaption, p {{ color: #555; font-size: .9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def render(
    *,
    title: str,
    tables: Iterable[tuple[str, Sequence[Column], Sequence[Sequence[str]]]],
    notes: Iterable[str],
    pictures: Mapping[str, Path],
) -> str:
    """The text of the file.

    Args:
        title: of the page.
        tables: (title, columns, rows) of each.
        notes: a paragraph each, below the tables.
        pictures: PNG files by what they show.
    """
    parts = [_table(*table) for table in tables]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    for caption, file in pictures.items():
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def _table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column.header)}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, columns, row))}</tr>" for row in rows)
    return (
        f"<section><h2>{escape(title)}</h2>\n<table><thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></section>"
    )


def _cell(column: Column, text: str) -> str:
    strong = ' class="strong"' if column.style else ""
    return f"<td{strong}>{escape(text)}</td>"
