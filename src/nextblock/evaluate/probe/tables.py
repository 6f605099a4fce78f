"""A probe's result as text: the winners and the whole grid, in Markdown and as comma-separated values."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from nextblock.evaluate.probe.config import ProbeCandidate, ProbeResult

__all__ = [
    "CANDIDATE_COLUMNS",
    "candidate_cells",
    "choice_sentence",
    "grid_csv",
    "layer_words",
    "markdown",
    "rate_sentence",
]

CANDIDATE_COLUMNS = (
    "encoder",
    "head",
    "layers",
    "attention",
    "tokens",
    "weight decay",
    "lr",
    "top-1 %",
    "top-5 %",
    "loss",
)


def markdown(result: ProbeResult, identity: Mapping[str, Any]) -> str:
    """The winners, then all candidates, the winners in bold."""
    sources, settings = identity["sources"], identity["settings"]
    bad = sum(result.bad_images.values())
    lines = [
        f"# Probe of {settings['model']}",
        "",
        f"Heads trained on {result.train_images} images of {sources['train']['spec']}, "
        f"{result.num_classes} classes, {settings['epochs']} epochs, seed {settings['seed']}; "
        f"unreadable images left out: {bad}. Encoder weights {identity['weights']}. "
        f"{choice_sentence(result)} {rate_sentence(result)}".rstrip(),
        "",
        "| encoder | head | split | images | top-1 % | top-5 % | balanced % | ECE % | layers | attention "
        "| tokens | lr | weight decay |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.encoder} | {row.head} | {row.split} | {row.images} "
        f"| {100 * row.top1:.2f} | {100 * row.top5:.2f} | {100 * row.balanced:.2f} "
        f"| {100 * row.calibration_error:.2f} | {layer_words(row.layers)} | {row.attention or '-'} "
        f"| {row.tokens or '-'} | {row.lr:g} | {row.weight_decay:g} |"
        for row in result.rows
    ]
    if result.chosen_on is not None:
        lines += [
            "",
            f"## All candidates, on {result.chosen_on}",
            "",
            f"| {' | '.join(CANDIDATE_COLUMNS)} |",
            "|---" * len(CANDIDATE_COLUMNS) + "|",
            *(_grid_line(one) for one in result.grid),
        ]
    return "\n".join(lines) + "\n"


def choice_sentence(result: ProbeResult) -> str:
    """Say among how many heads the winners were chosen, and on what."""
    if result.chosen_on is None:
        return "Nothing was chosen: one head of each kind."
    count = sum(one.winner for one in result.grid)
    winners, they_are = ("1 winner", "it is") if count == 1 else (f"{count} winners", "they are")
    diverged = sum(one.diverged for one in result.grid)
    return (
        f"{winners} chosen among {len(result.grid)} heads on {result.split_images[result.chosen_on]} images "
        f"({result.chosen_on}) that {they_are} not measured on"
        + (f"; {diverged} diverged." if diverged else ".")
    )


def rate_sentence(result: ProbeResult) -> str:
    """Say where learning rates do not count as they are named; else empty."""
    if not result.resolved.get("official_warmup_trap"):
        return ""
    return "Learning rates count a tenth of their names (official_warmup_trap): the cosine starts at lr / 10."


def layer_words(layers: tuple[int, ...]) -> str:
    """Layers in few characters: 6-11 where they follow each other, - for none."""
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "-"


def grid_csv(result: ProbeResult) -> str:
    """All candidates, one a line."""
    text = io.StringIO()
    names = list(ProbeCandidate.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for one in result.grid:
        values = {name: getattr(one, name) for name in names}
        values["layers"] = "+".join(map(str, one.layers))
        writer.writerow(["" if value is None else value for value in values.values()])
    return text.getvalue()


def candidate_cells(one: ProbeCandidate) -> list[str]:
    """What a table tells of a candidate, in the order of `CANDIDATE_COLUMNS`."""
    found = ["diverged", "", ""]
    if one.top1 is not None and one.top5 is not None and one.loss is not None:
        found = [f"{100 * one.top1:.2f}", f"{100 * one.top5:.2f}", f"{one.loss:.4f}"]
    return [
        one.encoder,
        one.head,
        layer_words(one.layers),
        one.attention or "-",
        one.tokens or "-",
        f"{one.weight_decay:g}",
        f"{one.lr:g}",
        *found,
    ]


def _grid_line(one: ProbeCandidate) -> str:
    cells = candidate_cells(one)
    return "| " + " | ".join(f"**{cell}**" if one.winner and cell else cell for cell in cells) + " |"
