"""Files written whole or not at all: text, and tensors with a JSON header (safetensors)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from .errors import RunError

FORMAT = 1
_KEY = "iirsnn"


class Damaged(RunError):
    """A checkpoint that was not written whole, or has changed since."""


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
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checked = {"format": FORMAT, "crc32": _checksum(contiguous), **header}
    metadata = {_KEY: json.dumps(checked)}
    # safetensors' own save_file writes through a file of a random name, which a kill leaves behind
    write_atomically(
        path, lambda file: Path(file).write_bytes(to_bytes(contiguous, metadata)), previous
    )


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of a checkpoint.

    Raises:
        Damaged: truncated, changed since it was written, or no checkpoint at all.
        RunError: missing, or of another program or a newer version of this one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise RunError(f"checkpoint {path}: a safetensors file, but not one of iirsnn's")
            header = json.loads(metadata[_KEY])
            if header["format"] > FORMAT:
                raise RunError(
                    f"checkpoint {path}: expected format {FORMAT} or older, got {header['format']};"
                    " a newer iirsnn wrote it"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RunError(f"checkpoint {path}: no such file") from error
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"checkpoint {path}: truncated or no checkpoint ({error})") from error
    if "crc32" in header and header.pop("crc32") != _checksum(tensors):
        raise Damaged(f"checkpoint {path}: its content is not what was written")
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

    A file already at `path` is renamed to `previous` first, where that is given.

    Raises:
        RunError: it cannot be written; a file already at `path` is intact.
    """
    # one name for each file, so that what a kill leaves behind is overwritten, not collected
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(str(temporary))
        _sync(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(f"{path}: cannot be written ({error})") from error


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
