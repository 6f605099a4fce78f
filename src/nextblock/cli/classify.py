"""`nextblock classify`: the classes of images by a trained head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.classify_config import ClassifyConfig
from nextblock.settings import from_dict

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.evaluate.classify import ClassifyResult

TABLE_ROWS, TABLE_CLASSES, NAME_LETTERS = 10, 3, 24


def run(argv: Sequence[str]) -> int:
    """Parse the words, classify, print a table of the first images."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser, parse_settings
    from nextblock.evaluate.classify import to_json

    parser = Parser("classify", "Name the classes of images with a trained head.")
    values, is_json = parse_settings(parser, ClassifyConfig, argv, overwrite="an earlier file")
    result = classify(**values)
    Console().print(_table(result))
    say(*_notes(result, values["out"]))
    if is_json:
        end_with_json(to_json(result))
    return 0


def classify(**settings: Any) -> ClassifyResult:
    """Classify images as `nextblock classify` does; `settings` are the fields of `ClassifyConfig`.

    Paths and lists may stand for strings and tuples. What comes back has `rows`, one for each image.
    """
    from nextblock.evaluate.classify import classify as classify_with

    return classify_with(from_dict(ClassifyConfig, settings))


def _table(result: ClassifyResult) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    from nextblock.cli.output import end_of

    has_truth = result.rows[0].true_class is not None
    places = ("class", "second", "third")[: min(TABLE_CLASSES, len(result.rows[0].classes))]
    table = Table(Column("image", no_wrap=True), *places, *(["true class"] if has_truth else []))
    for row in result.rows[:TABLE_ROWS]:
        ranked = zip(row.classes[:TABLE_CLASSES], row.probabilities, strict=False)
        table.add_row(
            Text(end_of(row.name, NAME_LETTERS)),
            *(Text(f"{name} {probability:.1%}") for name, probability in ranked),
            *([Text(row.true_class or "")] if has_truth else []),
        )
    return table


def _notes(result: ClassifyResult, out: str | None) -> list[str]:
    notes = []
    if (more := len(result.rows) - TABLE_ROWS) > 0:
        notes.append(
            f"and {more} images more" + (f", all in {out}" if out else "; --out FILE.csv writes all")
        )
    elif out:
        notes.append(f"classes: {out}")
    if (found := result.measures) is not None:
        notes.append(
            f"top-1 {found.top1:.1%}, top-5 {found.top5:.1%}, balanced {found.balanced:.1%}, "
            f"calibration error {found.calibration_error:.3f}, of {found.images} labelled images"
        )
    elif result.rows[0].true_class is not None:
        notes.append("the classes of these labels are not the classifier's: no accuracy")
    if result.bad:
        named = "; ".join(f"{bad.name}: {bad.reason}" for bad in result.bad[:3])
        notes.append(
            f"unreadable images left out: {len(result.bad)} ({named}"
            + ("; ..." * (len(result.bad) > 3))
            + ")"
        )
    return notes
