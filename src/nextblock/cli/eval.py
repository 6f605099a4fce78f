"""`nextblock eval`: one model or several, measured in several ways, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.settings import CompareSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    about = "Measure models in several ways: kNN, few labels, trained heads; or a classifier as it is."
    return run_verb("compare", CompareSettings, about, argv)
