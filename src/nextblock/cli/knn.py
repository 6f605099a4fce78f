"""`nextblock knn`: what a frozen encoder's features are worth by their nearest neighbours."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from nextblock.evaluate.knn_config import KnnConfig, KnnResult
from nextblock.settings import from_keywords, to_dict

__all__ = ["knn", "run"]


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    from rich.console import Console
    from rich.table import Table

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("knn", "Measure a frozen encoder's features by their nearest neighbours.")
    parser.add_class_arguments(KnnConfig, None, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace another result in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    result = knn(**{name: v for name, v in parser.instantiate(options).items() if name != "json"})

    from nextblock.evaluate.knn import comparison, summary

    head, lines = comparison(result)
    table = Table(*head, title="top-1 %")
    for line in lines:
        table.add_row(*line)
    console = Console()
    console.print(table)
    console.print(summary(result), highlight=False)
    if options.json:
        sys.stdout.write(json.dumps(to_dict(result)) + "\n")
    return 0


def knn(**settings: Any) -> KnnResult:
    """Measure a model as `nextblock knn` does; `settings` are the fields of `KnnConfig`.

    Paths and lists may stand for strings and tuples.
    """
    config = from_keywords(KnnConfig, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.evaluate.knn import knn as knn_with

    return knn_with(config)
