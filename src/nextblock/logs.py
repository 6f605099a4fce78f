"""Text for the terminal: counts, durations, odd file names; and muting of other libraries' loggers."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def muted(below: int, *names: str) -> Iterator[None]:
    """Drop these loggers' lines below a level, then restore their levels."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(below)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def printable(text: str) -> str:
    """Escape control characters, which a terminal would execute."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def quote(word: str) -> str:
    """Quote a word for a shell; control characters need $'...', which bash and zsh read."""
    if word.isprintable():
        return shlex.quote(word)
    # Byte by byte, which preserves names that are not UTF-8.
    letters = (
        f"\\{c}" if c in "\\'" else c if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c))
        for c in word
    )
    return f"$'{''.join(letters)}'"


def counted(count: float, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "1 image", "1,797 images"; give `plural` if adding s is wrong."""
    is_short = isinstance(count, float) and count < 1e4
    number = f"{count:,.4g}" if is_short else f"{round(count):,}"
    return f"{number} {noun if count == 1 else plural or f'{noun}s'}"


def label_words(shots: str) -> str:
    """Describe the labels of few-shot evaluation: "5 labels a class", "1% of the labels"."""
    return f"{shots} of the labels" if "%" in shots else f"{counted(int(shots), 'label')} a class"


def clock(seconds: float) -> str:
    """Format a duration in its two largest units: "2 d 3 h", "5 min 10 s"."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    rest, parts = round(seconds), []
    for name, length in units:
        count, rest = divmod(rest, length)
        if count or parts or name == "s":
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
