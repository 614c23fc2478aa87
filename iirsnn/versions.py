"""Versions of packages."""

from importlib.metadata import PackageNotFoundError, version


def installed(package: str) -> str:
    """The version of a package, or that it is not installed: this one may run from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
