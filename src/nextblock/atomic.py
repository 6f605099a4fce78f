"""Output that is there whole or not at all, written by one process at a time, and never taken for data."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nextblock.errors import UsageError

OUTPUT_MARK = ".nextblock"
"""A file in every directory that nextblock wrote: a search for images passes such directories by."""

RUN_FILES = ("source.json", "environment.json", "config.yaml")
"""What makes a directory a run, in the order of writing: other projects have a config.yaml as well."""

TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
"""What errors of torch's file writer name."""


class WriteError(RuntimeError):
    """A file could not be written; the message says why and what to do."""


class InUseError(RuntimeError):
    """Another process is writing to the same directory."""


def mark_output(directory: Path) -> None:
    """Mark a directory as written by nextblock."""
    (directory / OUTPUT_MARK).touch()


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Make and mark a directory, and be the only process that writes to it meanwhile.

    Raises `InUseError`, which names the other process, if there is one.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    mark_output(directory)
    owner = directory / f"{OUTPUT_MARK}-owner"
    # A lock of the operating system, not the presence of a file: it ends with its process, also when that is
    # killed or the machine restarts. `-owner` only names the holder to whoever waits.
    lock = FileLock(directory / f"{OUTPUT_MARK}-lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        try:
            told = json.loads(owner.read_text())
            who = f"process {told['pid']} on {told['host']}, since {told['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process, which began just now"
        raise InUseError(
            f"{directory} is being written by {who}; wait until it ends, or choose another directory"
        ) from error
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
        yield
    finally:
        # First the name, then the lock: whoever gets the lock next writes a name of its own.
        owner.unlink(missing_ok=True)
        lock.release()


def is_locked(directory: Path) -> bool | None:
    """Whether a process of this machine holds `exclusive` on a directory; None if it cannot be told."""
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
    """Turn what goes wrong while `target` is written into a `WriteError` that says so."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save has no error of its own for a full disk. Other RuntimeErrors, such as CUDA's, are not
        # about the file.
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in TORCH_WRITER):
            raise
        cause = str(error)
        if isinstance(error, RuntimeError):  # torch tells a position in its file, and no cause
            place = next(path for path in target.absolute().parents if path.exists())
            free_mb = shutil.disk_usage(place).free // 1_000_000
            cause = f"the disk is full, or a quota is used up ({free_mb} MB free there)"
        raise WriteError(
            f"could not write {target}: {cause}. What was there before is intact; make room on "
            "the disk, or choose another place, and run the same command again"
        ) from error


@contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write a file or directory to, flush it to disk, and move it into place.

    Whatever goes wrong, `target` is either as it was before or complete. (A directory that is replaced has,
    for the instant between two renames, the name `.before-...`.)
    """
    aside, before = (target.with_name(f".{what}-{target.name}") for what in ("writing", "before"))
    with writing(target):
        # A killed process may have left one. The mode of a new file is what the umask gives; some writers
        # make theirs for the owner alone.
        remove(aside)
        aside.touch()
        mode = stat.S_IMODE(aside.stat().st_mode)
        aside.unlink()
        try:
            yield aside
            # First every byte, then the names: after a power cut, a name leads to all of its content.
            for path in (*aside.rglob("*"), aside):
                if not path.is_dir():
                    path.chmod(mode)
                _flush(path)
            if target.is_dir() and not aside.is_dir():  # never take a folder's place with a file
                raise UsageError(f"{target} is a directory; name a file")
            # A rename within a folder happens at once, so no reader ever sees half of the output. A directory
            # cannot be renamed onto another one, so the old one steps aside, and comes back if that fails.
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
            # The new name itself is an entry of the folder, which has to reach the disk as well.
            _flush(target.parent)
        finally:
            remove(aside)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a directory: a file whose name is lost is lost as well."""
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
    """Remove a file, a link, or a directory with all in it; what is not there stays so."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
