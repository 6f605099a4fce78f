"""`nextblock knn`: what a frozen encoder's features are worth by their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.settings import KnnSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    return run_verb(
        "knn", KnnSettings, "Measure a frozen encoder's features by their nearest neighbours.", argv
    )
