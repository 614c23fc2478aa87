"""The command line: iirsnn train | evaluate | report | compare | reproduce | deploy | ..."""

from __future__ import annotations

import io
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

from ..errors import IirsnnError
from ..train.stopping import Stopped
from ..versions import installed
from . import ending

_PACKAGE = Path(__file__).resolve().parent.parent

#: Modules of the packages that the extra [train] brings.
EXTRA = frozenset(
    {
        "PIL",
        "filelock",
        "matplotlib",
        "omegaconf",
        "rich",
        "sklearn",
        "torchvision",
        "typer",
    }
)


_show_as_python_does = warnings.showwarning


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What this package warns of is a line for whoever runs a command, without its source."""
    if Path(filename).is_relative_to(_PACKAGE):
        print(f"warning: {message}", file=file or sys.stderr)
    else:
        _show_as_python_does(message, category, filename, lineno, file, line)


def main() -> None:
    """Run the command line; an error the user can mend is one line, without a traceback."""
    if not os.path.isabs(os.environ.get("XDG_CACHE_HOME", "/")):
        del os.environ["XDG_CACHE_HOME"]  # to be ignored, which matplotlib does not know
    # Threads that spin while they wait take the core from the one that is waited for, once another
    # process is busy. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # names of files may be bytes of no encoding, or of characters that the terminal's has not
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    warnings.showwarning = _show_warning
    try:
        _run(sys.argv[1:])
    except Stopped as stopped:
        if ending.is_main():
            print(stopped)
        ending.leave(0)
    except (IirsnnError, OSError) as error:  # OSError: a full disk, a folder taken away
        if ending.speaks():
            print(f"error: {error}", file=sys.stderr)
        ending.leave(getattr(error, "exit_code", 1))
    except Exception:
        if ending.speaks():  # a fault of ours: the traceback, once
            raise
        ending.leave(1)


def _run(arguments: list[str]) -> None:
    """Run one command. Without the extra [train] there are `env` and `--version`.

    Raises:
        IirsnnError: the command needs a package that is not installed.
    """
    try:
        from .commands import app

        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRA:
            raise
        if arguments == ["--version"]:
            print(f"iirsnn {installed('iirsnn')}")
        elif arguments == ["env"]:
            from ..ops.environment import env_report

            print(env_report())
        else:
            command = " ".join(["iirsnn", *arguments[:1]])
            raise IirsnnError(
                f"{command} needs the package {missing}, which is not installed: "
                "pip install 'iirsnn[train]'"
            ) from error
