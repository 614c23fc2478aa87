"""Images as they come, for `iirsnn predict`: files that appear in a folder, paths on a stream."""

from __future__ import annotations

import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, TypeVar

from ..errors import IirsnnError, UsageError

#: Seconds between two looks at a folder, and those after which a file that cannot be read, and does
#: not change any more, is not one that is still being written.
POLL, PATIENCE = 0.02, 5.0

T = TypeVar("T")
_Stamp = tuple[int, int, int]


def appearing(
    folder: Path, suffixes: tuple[str, ...], read: Callable[[Path], T]
) -> Iterator[tuple[Path, T | IirsnnError]]:
    """Every file that is written into the folder from now on, once it is whole, as `read` reads it.

    "Now" is the call, not the first file that is asked for. A file that stays as it is for a moment
    and can be read is whole. One that cannot be read gets its error, after `PATIENCE` without a
    change. A file that is written anew is a new one. Hidden files, and those with other suffixes,
    are left alone. Never ends.

    Raises:
        UsageError: it is no folder, or is one no longer.
    """
    return _appearing(folder, suffixes, read, _files(folder, suffixes))


def _appearing(
    folder: Path,
    suffixes: tuple[str, ...],
    read: Callable[[Path], T],
    known: dict[Path, _Stamp],
) -> Iterator[tuple[Path, T | IirsnnError]]:
    """known: the files that are no new ones."""
    growing: dict[Path, tuple[_Stamp, float, bool]] = {}  # since when, and whether it was tried
    while True:
        time.sleep(POLL)
        now, found = time.monotonic(), _files(folder, suffixes)
        known = {path: stamp for path, stamp in known.items() if path in found}
        growing = {path: state for path, state in growing.items() if path in found}
        for path, stamp in found.items():
            if known.get(path) == stamp:
                continue
            before, since, tried = growing.get(path, (None, now, False))
            if before != stamp:
                growing[path] = (stamp, now, False)
                continue
            if tried and now - since < PATIENCE:
                continue
            given: T | IirsnnError
            try:
                given = read(path)
            except UsageError as error:  # whole, but not what is wanted
                given = error
            except IirsnnError as error:
                if now - since < PATIENCE:
                    growing[path] = (stamp, since, True)
                    continue
                given = error
            if _stamp(path) != stamp:  # written to while it was read
                continue
            known[path] = stamp
            del growing[path]
            yield path, given


def named(
    stream: TextIO | None, read: Callable[[Path], T]
) -> Iterator[tuple[Path, T | IirsnnError]]:
    """The files whose paths are the lines of a stream (None: closed), as `read` reads them."""
    for line in stream or ():
        path = Path(line.rstrip("\r\n"))
        if not line.strip():
            continue
        try:
            yield path, read(path)
        except IirsnnError as error:
            yield path, error


@contextmanager
def until_stopped() -> Iterator[None]:
    """Whatever runs here ends, without an error, at SIGINT (Ctrl-C) or SIGTERM."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)


class Latencies:
    """How long each of any number of images took, kept to a microsecond."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        self._counts[round(1e6 * seconds)] += 1

    def percentile(self, percent: float) -> float:
        """Seconds that so many per cent of the images took at most; there is at least one."""
        left = max(1, math.ceil(percent / 100 * self._counts.total()))
        for microseconds in sorted(self._counts):
            left -= self._counts[microseconds]
            if left <= 0:
                return microseconds / 1e6
        raise ValueError(f"percent: expected 0 to 100 of at least one image, got {percent}")

    def __str__(self) -> str:
        count = self._counts.total()
        if not count:
            return "no images"
        parts = ", ".join(f"p{p} {1e3 * self.percentile(p):.3f} ms" for p in (50, 95, 99))
        return f"{count} image{'s' if count > 1 else ''}: {parts}"


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[Path, _Stamp]:
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UsageError(f"--watch {folder}: expected a folder ({error.strerror})") from None
    chosen = [p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    stamps = ((path, _stamp(path)) for path in chosen)
    return {path: stamp for path, stamp in stamps if stamp is not None}


def _stamp(path: Path) -> _Stamp | None:
    """What changes with a file's content; None where there is none any more."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
