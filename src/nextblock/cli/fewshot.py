"""`nextblock fewshot`: what a frozen encoder's features are worth with few labels."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.settings import FewshotSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    about = "Measure a frozen encoder's features by logistic regression with few labels."
    return run_verb("fewshot", FewshotSettings, about, argv)
