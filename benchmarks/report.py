"""What is done with results files: named, shown, compared.

python benchmarks/report.py name                    this machine's committed results
python benchmarks/report.py report FILE.json        FILE.md and FILE-*.png beside it
python benchmarks/report.py check NEW.json ...      exit code 1 where iirsnn lost in each
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plots import plot_density, plot_lif, plot_steps
from record import chosen, default_file, load
from regressions import check
from tables import table


def report(path: Path) -> list[Path]:
    """Writes FILE.md and the plots that FILE.json has groups for."""
    results = load(path)
    markdown = path.with_suffix(".md")
    markdown.write_text(table(results), encoding="utf-8")
    written = [markdown]
    for suffix, plot, wanted in (
        ("lif", plot_lif, {"subject": "lif"}),
        ("train", plot_steps, {"subject": "train_step", "sweep": False}),
        ("density", plot_density, {"subject": "train_step", "sweep": True}),
    ):
        if chosen(results, **wanted):
            written.append(path.with_name(f"{path.stem}-{suffix}.png"))
            plot(results, written[-1])
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="Tables, plots and comparison of results.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("name", help="print this machine's committed results file")
    reporting = commands.add_parser("report", help="write FILE.md and plots")
    reporting.add_argument("file", type=Path, nargs="?", help="default: this machine's")
    checking = commands.add_parser("check", help="compare ratios; exit code 1 on a loss")
    checking.add_argument("file", type=Path, nargs="+", help="of new runs; the least ratio counts")
    checking.add_argument("--committed", type=Path, help="default: this machine's")
    options = parser.parse_args()
    if options.command == "name":
        print(default_file())
        return 0
    if options.command == "check":
        return check(options.committed or default_file(), *options.file)
    for written in report(options.file or default_file()):
        print(f"wrote {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
