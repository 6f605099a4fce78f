"""The list of files that could not be read, `quarantine.jsonl`, and the limit to their number."""

from __future__ import annotations

import json
from pathlib import Path

from nextblock.data.loader import BadSample

__all__ = ["QuarantineLog", "TooManyBadImages"]


class TooManyBadImages(RuntimeError):  # noqa: N818 - it says what happened
    """More of the listed files are unreadable than `data.max_bad_fraction` allows."""


class QuarantineLog:
    """One JSON line per unreadable file, however often it is met, restarts included."""

    def __init__(self, path: Path, num_files: int, max_bad_fraction: float) -> None:
        self._path = path
        self._num_files = num_files
        self._max_bad_fraction = max_bad_fraction
        self._bad = {bad.sample: bad for bad in _read(path)}

    @property
    def count(self) -> int:
        """Distinct unreadable files so far."""
        return len(self._bad)

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """These files."""
        return tuple(self._bad.values())

    def add(self, bad: BadSample) -> None:
        """Note a file; `TooManyBadImages` once their number is beyond the limit."""
        if bad.sample not in self._bad:
            self._bad[bad.sample] = bad
            line = json.dumps({"name": bad.name, "sample": bad.sample, "reason": bad.reason})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self.count > self._max_bad_fraction * self._num_files:
            raise TooManyBadImages(self._message())

    def _message(self) -> str:
        first = "".join(f"\n  {bad.name}: {bad.reason}" for bad in list(self._bad.values())[:10])
        return (
            f"{self.count} of {self._num_files} files cannot be read, more than data.max_bad_fraction "
            f"{self._max_bad_fraction:g} allows. The first are:{first}\nAll are listed in {self._path}. Fix "
            "or remove them and delete that list, or raise data.max_bad_fraction."
        )


def _read(path: Path) -> list[BadSample]:
    """What an earlier part of the run wrote; a last line that a crash cut off is taken out of the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    entries = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append(BadSample(entry["sample"], entry["name"], entry["reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that file") from error
    return entries
