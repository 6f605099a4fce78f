"""`nextblock classify`: the classes of images by a trained head."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.settings import ClassifySettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, classify, print a table of the first images."""
    return run_verb("classify", ClassifySettings, "Classify images with a trained head.", argv)
