"""`nextblock probe`: what a frozen encoder's features are worth."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.probe.config import ProbeCandidate, ProbeConfig, ProbeResult, probe_config
from nextblock.settings import to_dict

if TYPE_CHECKING:
    from rich.table import Table

MAX_TABLE_WIDTH = 500
MAX_PRINTED = 60
"""Candidates of the trained encoder that are printed; of more, probe.md tells."""


def run(argv: Sequence[str]) -> int:
    """Parse the words, probe, print a table; 128 + signal where a signal stopped it, which is saved."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("probe", "Train heads on a frozen encoder's features and measure their accuracy.")
    values, is_json = parse_settings(parser, ProbeConfig, argv, overwrite="another result")
    from nextblock.evaluate.probe.state import ProbeStopped
    from nextblock.evaluate.probe.tables import choice_sentence, rate_sentence

    try:
        result = probe(**values)
    except ProbeStopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 128 + stopped.signal
    tables = [_table(result)]
    trained = [one for one in result.grid if one.encoder == "trained"]
    if result.chosen_on is not None and len(trained) <= MAX_PRINTED:
        tables.insert(0, _grid_table(result, trained))
    console = Console()
    measured = (Console(width=MAX_TABLE_WIDTH).measure(table).maximum for table in tables)
    console.width = max(console.width, *measured)  # cut off, its numbers are of no use
    for table in tables:
        console.print(table)
    out = Path(values["out"])
    lines = [choice_sentence(result), rate_sentence(result)]
    if len(trained) > MAX_PRINTED:
        lines.append(f"All {len(trained)} candidates of the trained encoder: {out / 'probe.md'}")
    for line in filter(None, [*lines, _places(out, result)]):
        say(line)
    if is_json:
        end_with_json(to_dict(result))
    return 0


def probe(**settings: Any) -> ProbeResult:
    """Probe a model as `nextblock probe` does; `settings` are the fields of `ProbeConfig`.

    Paths, lists and single values may stand for strings and tuples.
    """
    from nextblock.evaluate.probe.run import FIGURES_DIR
    from nextblock.evaluate.probe.run import probe as probe_with

    config = probe_config(settings)
    result = probe_with(config)
    figures = Path(config.out) / FIGURES_DIR
    # Always anew: what lies there may be of another result.
    from nextblock.atomic import write_aside
    from nextblock.visualize.evaluation import draw_probe

    with write_aside(figures) as aside:
        aside.mkdir()
        draw_probe(result, aside)
    return result


def _table(result: ProbeResult) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from nextblock.evaluate.probe.tables import layer_words

    columns = ("encoder", "head", "measured on", "images", "top-1", "top-5", "balanced", "ECE", "lr", "wd")
    table = Table(*columns, "layers", box=SIMPLE, pad_edge=False)
    for row in result.rows:
        shares = (row.top1, row.top5, row.balanced, row.calibration_error)
        table.add_row(
            row.encoder,
            row.head,
            row.split,
            str(row.images),
            *(f"{share:.1%}" for share in shares),
            f"{row.lr:g}",
            f"{row.weight_decay:g}",
            layer_words(row.layers),
        )
    return table


def _grid_table(result: ProbeResult, trained: Sequence[ProbeCandidate]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from nextblock.evaluate.probe.tables import CANDIDATE_COLUMNS, candidate_cells

    table = Table(
        *CANDIDATE_COLUMNS,
        title=f"all candidates, on {result.chosen_on}; winners bold and marked *",
        box=SIMPLE,
        pad_edge=False,
    )
    for one in trained:
        cells = candidate_cells(one)
        if one.winner:
            cells[0] += " *"
        table.add_row(*cells, style="bold" if one.winner else None)
    return table


def _places(out: Path, result: ProbeResult) -> str:
    """Where the files lie."""
    heads = ", ".join(f"{head}/" for head in dict.fromkeys(row.head for row in result.rows))
    return f"{out}: probe.md, probe.csv, probe.json, figures/, and the trained heads {heads}"
