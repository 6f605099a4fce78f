"""Words on the screen: other libraries' log lines held back, lengths of time, names with odd characters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back(below: int, *names: str) -> Iterator[None]:
    """Hold back the lines of these loggers below a level, and leave their levels as they were."""
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
    """Text with control characters, which a terminal would obey, written as escapes."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def clock(seconds: float) -> str:
    """A length of time in the two units that matter: "2 d 3 h", "5 min 10 s"."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    rest, parts = round(seconds), []
    for name, length in units:
        count, rest = divmod(rest, length)
        if count or parts or name == "s":
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
