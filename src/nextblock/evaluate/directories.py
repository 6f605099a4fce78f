"""Directories that results go to: made, or refused in words where they cannot be."""

from __future__ import annotations

from pathlib import Path

from nextblock.atomic import mark_output
from nextblock.errors import UsageError

__all__ = ["make_directory"]


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there; `ValueError` where that cannot be.

    A new one is marked, so that a search for images passes it by.
    """
    try:
        if not path.is_dir():
            path.mkdir(parents=True)
            mark_output(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be made a directory ({error.strerror}); give another --out"
        ) from error
