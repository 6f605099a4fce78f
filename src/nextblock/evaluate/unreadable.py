"""Images that an evaluation could not read: counted in the source that the user named, told and listed."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path

from nextblock.atomic import write_text
from nextblock.data import BadSample, Source
from nextblock.data.sources import SubsetSource
from nextblock.evaluate.directories import make_directory

__all__ = ["QUARANTINE", "Part", "in_whole", "report_unreadable", "whole_of"]

log = logging.getLogger(__name__)

QUARANTINE = "quarantine.jsonl"
TOLD = 3
"""So many unreadable images of a source are named in the log."""


class Part(SubsetSource):
    """Images of a source that an evaluation keeps for one purpose; the user named the source `of`."""

    def number_in_whole(self, index: int) -> int:
        """Which image of the whole source this one is."""
        return int(self._numbers[index])


def whole_of(source: Source) -> Source:
    """What the user named: of a part the source it is of, else the source itself."""
    return source.of if isinstance(source, Part) else source


def in_whole(bad: BadSample, source: Source) -> BadSample:
    """An unreadable image of a source by its number in the whole of it."""
    return bad._replace(sample=source.number_in_whole(bad.sample)) if isinstance(source, Part) else bad


def report_unreadable(out: Path | None, found: Mapping[str, tuple[Source, Collection[BadSample]]]) -> None:
    """Name images that were left out, by what their source is for: a few in the log, all in quarantine.jsonl.

    Where there are none, that list is removed from `out`.
    """
    lines = []
    for purpose, (source, bad) in found.items():
        if not bad:
            continue
        first = "; ".join(" ".join(f"{one.name}: {one.reason}".split()) for one in list(bad)[:TOLD])
        log.warning(
            "%d of the %d images of %s (%s) cannot be read and are left out: %s%s",
            len(bad),
            len(source),
            source.spec,
            purpose,
            first,
            "; ..." if len(bad) > TOLD else "",
        )
        lines += [json.dumps({"source": purpose, **in_whole(one, source)._asdict()}) for one in bad]
    if out is None:
        return
    if lines:
        make_directory(out)
        write_text(out / QUARANTINE, "\n".join(lines) + "\n")
    else:
        (out / QUARANTINE).unlink(missing_ok=True)
