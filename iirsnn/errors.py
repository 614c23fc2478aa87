"""The errors a user may see: each is one clear line, with the exit code of the command line."""

from collections.abc import Collection
from numbers import Integral


class IirsnnError(Exception):
    """Base of all errors that are the user's to mend; the command line prints them as one line."""

    exit_code = 1


class UsageError(IirsnnError, ValueError):
    """What was asked for cannot be: an unknown name or key, a value out of range (exit code 2)."""

    exit_code = 2


class RunError(IirsnnError, RuntimeError):
    """What was asked for failed: a missing file, a damaged checkpoint, a loss not finite."""


class Lost(RunError):
    """Another process of this run is gone, so this one cannot go on either."""


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raises UsageError, naming the argument or key, unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_timesteps(timesteps: object) -> None:
    """Raises UsageError unless it is an integer of at least 1."""
    if isinstance(timesteps, bool) or not isinstance(timesteps, Integral) or timesteps < 1:
        raise UsageError(f"timesteps: expected an integer of at least 1, got {timesteps!r}")


def one_line(error: BaseException) -> str:
    """The message of an error, whatever it looks like."""
    return " ".join(str(error).split())
