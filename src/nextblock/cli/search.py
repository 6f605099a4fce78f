"""`nextblock search`: the images that a model sees as most alike."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.settings import SearchSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, search, print a table."""
    return run_verb("search", SearchSettings, "Find the images nearest to a query.", argv)
