"""`nextblock probe`: what a frozen encoder's features are worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.evaluate.probe.config import ProbeConfig, ProbeResult, probe_config
from nextblock.settings import to_dict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["probe", "run"]

MAX_TABLE_WIDTH = 500


def run(argv: Sequence[str]) -> int:
    """Parse the words, probe, print a table; 128 + signal where a signal stopped it, which is saved."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("probe", "Train heads on a frozen encoder's features and measure their accuracy.")
    parser.add_class_arguments(ProbeConfig, None, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace another result in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    values = {name: value for name, value in parser.instantiate(options).items() if name != "json"}
    from nextblock.evaluate.probe.state import ProbeStopped
    from nextblock.evaluate.probe.tables import choice_sentence

    try:
        result = probe(**values)
    except ProbeStopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return 128 + stopped.signal
    table = _table(result)
    width = Console(width=MAX_TABLE_WIDTH).measure(table).maximum
    console = Console()
    console.width = max(console.width, width)  # cut off, its numbers are of no use
    console.print(table)
    console.print(choice_sentence(result), highlight=False, soft_wrap=True)
    console.print(_places(Path(values["out"])), highlight=False, markup=False, soft_wrap=True)
    if options.json:
        sys.stdout.write(json.dumps(to_dict(result)) + "\n")
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
    if config.overwrite or not figures.is_dir():
        from nextblock.visualize.evaluation import draw_probe

        figures.mkdir(exist_ok=True)
        draw_probe(result, figures)
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


def _places(out: Path) -> str:
    """Where the files lie."""
    return f"{out}: probe.md, probe.csv, probe.json; a directory for each trained head; figures"
