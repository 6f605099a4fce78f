"""`nextblock finetune`: encoder and head trained together on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.finetune.config import FinetuneConfig
from nextblock.settings import from_dict, to_dict

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.evaluate.finetune.report import FinetuneResult
    from nextblock.train import Reporter


def run(argv: Sequence[str]) -> int:
    """Parse the words, fine-tune, print a table; exits with 128 + signal where a signal stopped it."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("finetune", "Train encoder and head together on labels, whole or by LoRA.")
    values, is_json = parse_settings(parser, FinetuneConfig, argv, overwrite="another result")
    result = finetune(**values)
    if result.stopped_by is None:
        Console().print(_table(result))
        say(f"classifier: {Path(values['out']) / 'classifier'}")
    if is_json:
        end_with_json(to_dict(result))
    if result.stopped_by is None:
        return 0
    import signal

    return 128 + signal.Signals[result.stopped_by]


def finetune(*, reporter: Reporter | None = None, **settings: Any) -> FinetuneResult:
    """Fine-tune a model as `nextblock finetune` does; `settings` are the fields of `FinetuneConfig`.

    Paths, lists and dicts (`lora={"rank": 8}`) may stand for strings, tuples and settings.
    """
    from nextblock.evaluate.finetune.run import CONFUSION
    from nextblock.evaluate.finetune.run import finetune as finetune_with
    from nextblock.train import Reporter

    reporter = reporter or Reporter()
    result = finetune_with(from_dict(FinetuneConfig, settings), reporter)
    if result.stopped_by is not None:
        reporter.note(
            f"stopped by {result.stopped_by} after step {result.step} of {result.total_steps}, saved; the "
            "same command goes on"
        )
    else:
        _draw(result, Path(settings["out"]) / CONFUSION)
    return result


def _draw(result: FinetuneResult, path: Path) -> None:
    from nextblock.visualize.evaluation import draw_confusion

    row = result.reported
    if row.measures.confusion is not None:
        title = f"fine-tuned, on {row.split}: top-1 {row.measures.top1:.1%}"
        draw_confusion(row.measures.confusion, result.class_names, title, path)


def _table(result: FinetuneResult) -> Table:
    from rich.table import Table

    table = Table("weights", "measured on", "images", "top-1", "top-5", "balanced", "calibration error")
    for row in result.rows:
        m = row.measures
        table.add_row(
            row.weights,
            row.split,
            str(m.images),
            *(f"{share:.1%}" for share in (m.top1, m.top5, m.balanced, m.calibration_error)),
        )
    return table
