"""Versions of what has made something, to be written down beside it."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

import ecgscale


def package_version(package: str) -> str | None:
    """Version of a package, None where it is not there.

    Also of one that is only on PYTHONPATH, about which no metadata is installed: our own always, others once imported.
    """
    if package == ecgscale.__name__:
        return ecgscale.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        own: str | None = getattr(sys.modules.get(package), "__version__", None)
        return own


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of Python and of those of the packages that are there."""
    of_packages = {package: package_version(package) for package in packages}
    return {"python": platform.python_version()} | {name: one for name, one in of_packages.items() if one is not None}
