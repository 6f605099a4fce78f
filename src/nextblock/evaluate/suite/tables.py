"""The suite's tables: the model's accuracies above the published ones, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextblock.atomic import write_text
from nextblock.evaluate.suite.benchmarks import BENCHMARKS, FIFTEEN
from nextblock.evaluate.suite.config import Score, SuiteResult
from nextblock.evaluate.suite.published import PUBLISHED
from nextblock.settings import to_dict

__all__ = ["RESULT_FILES", "csv_table", "markdown", "write_tables"]

RESULT_FILES = ("suite.md", "suite.csv", "suite.json", "suite.png")

_TITLES = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}
_LINEAR = tuple(name for name in _TITLES if name not in FIFTEEN)


def write_tables(out: Path, result: SuiteResult, identity: Mapping[str, Any]) -> None:
    """Write suite.md, suite.csv and, last, suite.json."""
    write_text(out / "suite.md", markdown(result))
    write_text(out / "suite.csv", csv_table(result))
    found = {**identity, **to_dict(result), "mean_percent": result.mean_percent}
    write_text(out / "suite.json", json.dumps(found, indent=2) + "\n")


def markdown(result: SuiteResult) -> str:
    """The papers' table, the sizes of what was measured, what is missing, and what differs."""
    ours = result.top1_percent
    lines = [
        "# Fifteen benchmarks",
        "",
        "Top-1 accuracy in percent of attentive probes on frozen encoders. An empty cell is not measured, or "
        "not known; a mean is over all fifteen, or not there.",
        "",
        _line(["model", "architecture", "data", *(_TITLES[name] for name in FIFTEEN), "mean"]),
        _line(["---"] * 3 + ["---:"] * (len(FIFTEEN) + 1)),
        _line([f"**{result.model}**", result.architecture, "", *_cells(ours), _cell(result.mean_percent)]),
    ]
    lines += [
        _line([row.model, row.architecture, row.data, *_cells(row.by_name), _cell(row.mean)])
        for row in PUBLISHED
    ]
    lines += ["", "Below the first row: AIM (arXiv 2401.08541), Table 6; XTRA, its official repository."]
    lines += [
        f"\n{_TITLES[name]}: **{ours[name]:.1f}** (a linear head, none of the fifteen)."
        for name in _LINEAR
        if name in ours
    ]
    lines += ["", "## What was measured", "", *_sizes(result.scores)]
    if result.missing or result.failed:
        lines += ["", "## What was not", ""]
        lines += [f"- {_TITLES[name]}, missing: {why}" for name, why in result.missing.items()]
        lines += [f"- {_TITLES[name]}, failed: {why}" for name, why in result.failed.items()]
    lines += ["", "## What differs from the papers", "", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _sizes(scores: Sequence[Score]) -> list[str]:
    measured = {score.name: score for score in scores}
    columns = ("train", "trained on", "test", "paper: train", "paper: test", "classes", "lr", "weight decay")
    lines = [
        _line(["data set", *columns]),
        _line(["---", *["---:"] * len(columns)]),
    ]
    for benchmark in BENCHMARKS:
        score = measured.get(benchmark.name)
        counts = () if score is None else (score.images[0], score.trained_on, score.images[1])
        ours = [f"{number:,}" for number in counts] or [""] * 3
        paper = ["" if number is None else f"{number:,}" for number in benchmark.images]
        chosen = ["", ""] if score is None else [f"{score.lr:g}", f"{score.weight_decay:g}"]
        lines.append(_line([benchmark.title, *ours, *paper, str(benchmark.classes), *chosen]))
    return lines


def csv_table(result: SuiteResult) -> str:
    """The same rows for a program: percent, the model's unrounded, its linear probe in the last column."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "architecture", "data", *FIFTEEN, "mean", *_LINEAR])
    ours = result.top1_percent
    cells = [ours.get(name) for name in FIFTEEN]
    linear = [ours.get(name) for name in _LINEAR]
    writer.writerow([result.model, result.architecture, "", *cells, result.mean_percent, *linear])
    for row in PUBLISHED:
        nothing = [None] * len(_LINEAR)
        writer.writerow([row.model, row.architecture, row.data, *row.top1, row.mean, *nothing])
    return file.getvalue()


def _cells(values: Mapping[str, float | None]) -> list[str]:
    return [_cell(values.get(name)) for name in FIFTEEN]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
