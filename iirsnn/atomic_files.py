"""Files written whole or not at all: text, and tensors with a JSON header (safetensors)."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as deserialized
from safetensors.torch import save as serialized
from torch import Tensor

from .errors import RunError

FORMAT = 2  # 1: a checksum of the tensors alone, in the header
_KEY = "iirsnn"
#: Stands before the checksum of all bytes of a file, eight digits that count as eight zeros there.
_CHECKSUM, _ZEROS = b'"crc32":"', b"00000000"


class Damaged(RunError):
    """A checkpoint that was not written whole, or has changed since."""


def make_folder(path: Path) -> None:
    """A folder for output, and those above it, where they are not there yet.

    Raises:
        RunError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"output folder {path}: cannot be made ({error.strerror})") from error


def save(
    path: Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    *,
    previous: Path | None = None,
) -> None:
    """Write a checkpoint atomically: after a crash at any moment the old or the new file is there.

    Args:
        path: of the file; its folder exists.
        tensors: by name; any device and layout.
        header: JSON values.
        previous: what a file already at `path` becomes, else it is replaced. A crash may leave
            that file alone, without one at `path`.

    Raises:
        RunError: the file cannot be written (a full disk, no permission); the old ones are intact.
    """
    content = to_bytes(tensors, header)
    # safetensors' own save_file writes through a file of a random name, which a kill leaves behind
    write_atomically(path, lambda file: Path(file).write_bytes(content), previous)


def to_bytes(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """What `save` writes into a file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: json.dumps({"format": FORMAT, **header}), "crc32": _ZEROS.decode()}
    return sealed(serialized(contiguous, metadata))


def sealed(content: bytes) -> bytes:
    """The bytes of a file, with their right checksum in its place."""
    at = content.index(_CHECKSUM) + len(_CHECKSUM)
    digits = b"%08x" % _checksum_of_file(content)
    return content[:at] + digits + content[at + len(digits) :]


def from_bytes(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header that `to_bytes` took. Raises as `load` does."""
    with _reading("checkpoint"):
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        header = _header(metadata, content, "checkpoint")
        return _whole(deserialized(content), header, "checkpoint")


def load(path: Path, kind: str = "checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a checkpoint, or of what errors call its `kind`.

    Raises:
        Damaged: truncated, changed since it was written, or no checkpoint at all.
        RunError: missing, or of another program or a newer version of this one.
    """
    name = f"{kind} {path}"
    with _reading(name, kind), safe_open(path, framework="pt") as file:
        with path.open("rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _header(file.metadata() or {}, content, name)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _whole(tensors, header, name)


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of a file that `save` wrote, whatever its tensors; None of any other file."""
    try:
        with _reading(f"file {path}"), safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
    except RunError:
        return None
    return header if isinstance(header, dict) else None


@contextmanager
def _reading(name: str, kind: str = "checkpoint") -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{name}: no such file") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{name}: truncated or no {kind} ({error})") from error


def _header(metadata: Mapping[str, str], content: bytes | mmap.mmap, name: str) -> dict[str, Any]:
    if _KEY not in metadata:
        raise RunError(f"{name}: a safetensors file, but not one of iirsnn's")
    wanted = metadata.get("crc32")
    if wanted is not None and int(wanted, 16) != _checksum_of_file(content):
        raise Damaged(f"{name}: its content is not what was written")
    header = json.loads(metadata[_KEY])
    if type(header["format"]) is not int:
        raise Damaged(f"{name}: expected a format, got {header['format']!r:.60}")
    if header["format"] > FORMAT:
        raise RunError(
            f"{name}: expected format {FORMAT} or older, got {header['format']};"
            " a newer iirsnn wrote it"
        )
    if wanted is None and header["format"] > 1:
        raise Damaged(f"{name}: expected a checksum, got none")
    return header


def _whole(
    tensors: dict[str, Tensor], header: dict[str, Any], name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    # of format 1
    if "crc32" in header and header.pop("crc32") != _checksum(tensors):
        raise Damaged(f"{name}: its content is not what was written")
    return tensors, header


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; see `save`."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file and make it durable; a crash may leave a part of the line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    _sync(path)


def write_atomically(path: Path, write: Callable[[str], Any], previous: Path | None = None) -> None:
    """Call `write` with a temporary name in the same folder, make it durable, then rename it.

    A file already at `path` is renamed to `previous` first, where that is given. Where several
    processes or threads write the same file, one waits for the other.

    Raises:
        RunError: it cannot be written; a file already at `path` is intact.
    """
    # one name for each file, so that what a kill leaves behind is overwritten, not collected
    temporary = path.parent / f".{path.name}.tmp"  # with_name refuses "."
    try:
        if path.exists() and not path.is_file():  # a device would be replaced by a file
            raise OSError("expected a file or nothing there, got a folder or a device")
        with _alone(temporary):
            try:
                write(str(temporary))
                _sync(temporary)
                if previous is not None and path.exists():
                    os.replace(path, previous)
                os.replace(temporary, path)
            except OSError:
                with suppress(OSError):
                    temporary.unlink()
                raise
        _sync(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error})") from error


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Make the file, and hold its lock; a file system without locks gives none."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except PermissionError:  # what another user's process left behind when it was killed
            if not os.path.lexists(path):
                raise
            path.unlink(missing_ok=True)
            continue
        try:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:  # the one that was waited for has renamed it, else it is still there
                held = os.path.samestat(os.stat(path), os.fstat(descriptor))
            except FileNotFoundError:
                held = False
            if held:
                yield
                return
        finally:
            with suppress(OSError):  # a child that was forked meanwhile has the descriptor too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _checksum_of_file(content: bytes | mmap.mmap) -> int:
    at = content.find(_CHECKSUM) + len(_CHECKSUM)
    with memoryview(content) as view:
        value = zlib.crc32(_ZEROS, zlib.crc32(view[:at]))
        return zlib.crc32(view[at + len(_ZEROS) :], value)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
