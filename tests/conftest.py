"""Fixtures that several rooms share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("ECGSCALE_SHARED", Path(__file__).parents[2] / "shared"))


def shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{name} of the shared reference material is absent (ECGSCALE_SHARED={SHARED})")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real ECG recordings; the test is skipped where they are absent."""
    return shared_folder("data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """Numbers of the reference implementation; the test is skipped where they are absent."""
    return shared_folder("reference")
