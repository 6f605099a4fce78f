"""`nextblock finetune`: encoder and head trained together on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.evaluations import run_verb
from nextblock.evaluate.finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from nextblock.evaluate.evaluation import Result


def run(argv: Sequence[str]) -> int:
    """Parse the words, fine-tune, print a table and draw the confusion of classes."""
    about = "Train encoder and head together on labels, whole or by LoRA."
    return run_verb("finetune", FinetuneSettings, about, argv, draw=_draw)


def _draw(result: Result, out: Path) -> None:
    from nextblock.visualize.evaluation import draw_confusion

    row, confusion = result.rows[0], result.facts["confusion"]
    if confusion is not None:
        title = f"fine-tuned, on {row['split']}: top-1 {row['top1']:.1%}"
        draw_confusion(confusion, result.facts["class_names"], title, out / "confusion.png")
