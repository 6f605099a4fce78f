"""Writing files and directories so that they are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["WriteError", "remove", "write_aside", "write_text"]


class WriteError(RuntimeError):
    """A file could not be written; the message says why and what to do."""


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write a file or directory to, flush it to disk, and move it into place.

    Whatever goes wrong, `target` is either as it was before or complete. (A directory that is replaced has,
    for the instant between two renames, the name `.before-...`.)
    """
    aside = target.with_name(f".writing-{target.name}")
    remove(aside)
    try:
        yield aside
        _flush(aside)
        _move_into_place(aside, target)
        _flush_alone(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WriteError(
            f"could not write {target}: {error}. What was there before is intact; make room on "
            "the disk, or choose another place, and run the same command again"
        ) from error
    finally:
        remove(aside)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, or a directory with all in it; what is not there stays so."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_into_place(aside: Path, target: Path) -> None:
    """Rename; a directory in the way steps aside first, and comes back if the renaming fails."""
    before = target.with_name(f".before-{target.name}")
    if target.is_dir():
        remove(before)
        target.replace(before)
    try:
        aside.replace(target)
    except OSError:
        if before.is_dir():
            before.replace(target)
        raise
    remove(before)


def _flush(path: Path) -> None:
    """Flush a file, or a directory with all in it."""
    if path.is_dir():
        for part in path.iterdir():
            _flush(part)
    _flush_alone(path)


def _flush_alone(path: Path) -> None:
    """Flush a file, or the names in a directory: a file whose name is lost is lost as well."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
