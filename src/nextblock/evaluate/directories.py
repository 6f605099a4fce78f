"""Directories that results go to: made, or refused in words where they cannot be."""

from __future__ import annotations

from pathlib import Path

__all__ = ["make_directory"]


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there; `ValueError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be made a directory ({error.strerror}); give another --out"
        ) from error
