"""`nextblock finetune`: encoder and head trained together on labelled images."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.finetune.settings import FinetuneSettings


def run(argv: Sequence[str]) -> int:
    """Parse the words, fine-tune, print a table."""
    return run_verb(
        "finetune", FinetuneSettings, "Train encoder and head together on labels, whole or by LoRA.", argv
    )
