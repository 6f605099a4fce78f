"""Atomic output: files and directories appear whole or not at all, written by one process at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from nextblock.errors import BAD_PATH, UsageError

OUTPUT_MARK = ".nextblock"
"""A file in every directory that nextblock wrote; image searches skip such directories."""

RUN_FILES = ("source.json", "environment.json", "config.yaml")
"""The files that identify a run, in writing order; other projects have a config.yaml too."""

TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""Names in the errors of torch's file writer."""


class WriteError(RuntimeError):
    """A file could not be written; the message says why and what to do."""


class InUseError(RuntimeError):
    """Another process is writing to the same directory."""


def mark_output(directory: Path) -> None:
    """Mark a directory as written by nextblock."""
    (directory / OUTPUT_MARK).touch()


def make_directory(directory: Path) -> None:
    """Create a directory and its parents, if it does not exist; raises `UsageError` or `WriteError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(directory, error) from error


def _unusable(directory: Path, error: OSError) -> Exception:
    """The error of a directory that cannot be made or written in, by cause."""
    why = error.strerror or str(error)
    with suppress(OSError):  # the parents may be unreadable too
        for place in (directory, *directory.parents):
            if place.is_symlink() and not place.exists():
                why = f"{place} is a link to {place.readlink()}, which does not exist"
            elif place.is_file():
                why = f"{place} is a file"
    if error.errno in (*BAD_PATH, errno.EEXIST):
        return UsageError(f"cannot make or write the directory {directory}: {why}; choose another place")
    return WriteError(f"could not make or write the directory {directory}: {why}; make room on the disk")


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Create and mark a directory, and lock it: only one process writes to it at a time.

    Raises `InUseError`, which names the other process, if the lock is taken, and like `make_directory`.
    """
    from filelock import FileLock, Timeout

    owner = directory / f"{OUTPUT_MARK}-owner"
    # An operating-system lock, not the mere presence of a file: it ends with its process, even after a kill
    # or a reboot. `-owner` only tells others who holds it.
    lock = FileLock(directory / f"{OUTPUT_MARK}-lock", timeout=0)
    is_new = False
    try:
        is_new = not directory.exists()
        directory.mkdir(parents=True, exist_ok=True)
        mark_output(directory)
        lock.acquire()
    except Timeout as error:
        try:
            holder = json.loads(owner.read_text())
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process, which has just started"
        raise InUseError(
            f"{directory} is being written by {who}; wait until it ends, or choose another directory"
        ) from error
    except OSError as error:
        if is_new:  # a full disk may take a directory, but no file in it
            with suppress(OSError):
                directory.rmdir()
        raise _unusable(directory, error) from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        # Remove the name before releasing the lock: the next holder writes its own.
        owner.unlink(missing_ok=True)
        lock.release()


def is_locked(directory: Path) -> bool | None:
    """Whether a process of this machine holds `exclusive` on a directory; None if unknown."""
    try:
        import fcntl

        with (directory / f"{OUTPUT_MARK}-lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        return None
    return False


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn errors while `target` is written into a `WriteError`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no error of its own for a full disk. Other RuntimeErrors, such as CUDA's, are not
        # about the file.
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        cause, how = str(error), "make room on the disk, or choose another place,"
        if isinstance(error, OSError) and error.errno in BAD_PATH:
            how = "choose another name or place"
        if isinstance(error, RuntimeError):  # torch reports a file position, not the cause
            place = next(path for path in target.absolute().parents if path.exists())
            free_mb = shutil.disk_usage(place).free // 1_000_000
            cause = f"the disk is full, or a quota is used up ({free_mb} MB free there)"
        raise WriteError(
            f"could not write {target}: {cause}. What was there before is intact; {how} and run the same "
            "command again"
        ) from error


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Yield a path next to `target` to write to, then flush it to disk and move it into place.

    Whatever goes wrong, `target` is either unchanged or complete. Replacing a directory takes two renames;
    between them the old one is called `.before-...`.
    """
    aside, before = (target.with_name(f".{what}-{target.name}") for what in ("writing", "before"))
    with writing(target):
        # A killed process may have left one. An empty file shows the mode that the umask gives; some writers
        # create files that only the owner can read.
        remove(aside)
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)
        aside.unlink()
        try:
            yield aside
            # Flush the content before any rename: after a power cut, a name then has its full content.
            for path in (*aside.rglob("*"), aside):
                if not path.is_dir():
                    path.chmod(mode)
                _flush(path)
            if target.is_dir() and not aside.is_dir():  # never replace a folder by a file
                raise UsageError(f"{target} is a directory; name a file")
            # A rename within a folder is atomic, so no reader sees half of the output. A directory cannot be
            # renamed onto another, so the old one is moved away first, and moved back on failure.
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
            # The new name is an entry of the parent folder, which must reach the disk too.
            _flush(target.parent)
        finally:
            remove(aside)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
