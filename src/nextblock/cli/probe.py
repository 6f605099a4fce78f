"""`nextblock probe`: what a frozen encoder's features are worth to heads trained on them."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.probe.settings import ProbeSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, probe, print a table."""
    return run_verb(
        "probe", ProbeSettings, "Train heads on a frozen encoder's features, and measure them.", argv
    )
