"""`nextblock fewshot`: what a frozen encoder's features are worth with few labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from nextblock.evaluate.fewshot_config import FewshotConfig, FewshotResult
from nextblock.settings import from_keywords, to_dict

__all__ = ["fewshot", "run"]


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    from rich.console import Console
    from rich.table import Table

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("fewshot", "Measure a frozen encoder's features with few labels.")
    parser.add_class_arguments(FewshotConfig, None, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace another result in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    result = fewshot(**{name: v for name, v in parser.instantiate(options).items() if name != "json"})

    from nextblock.evaluate.fewshot import comparison, summary

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


def fewshot(**settings: Any) -> FewshotResult:
    """Measure a model as `nextblock fewshot` does; `settings` are the fields of `FewshotConfig`.

    Paths and lists may stand for strings and tuples.
    """
    config = from_keywords(FewshotConfig, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.evaluate.fewshot import fewshot as fewshot_with

    return fewshot_with(config)
