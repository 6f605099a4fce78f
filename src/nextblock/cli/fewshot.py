"""`nextblock fewshot`: what a frozen encoder's features are worth with few labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nextblock.cli.output import end_with_json, print_table
from nextblock.evaluate.fewshot_config import FewshotConfig, FewshotResult
from nextblock.settings import from_dict, to_dict


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("fewshot", "Measure a frozen encoder's features with few labels.")
    values, is_json = parse_settings(parser, FewshotConfig, argv, overwrite="another result")
    result = fewshot(**values)

    from nextblock.evaluate.fewshot import comparison, summary

    print_table(*comparison(result), title="top-1 %", below=summary(result))
    if is_json:
        end_with_json(to_dict(result))
    return 0


def fewshot(**settings: Any) -> FewshotResult:
    """Measure a model as `nextblock fewshot` does; `settings` are the fields of `FewshotConfig`.

    Paths and lists may stand for strings and tuples.
    """
    config = from_dict(FewshotConfig, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.evaluate.fewshot import fewshot as fewshot_with

    return fewshot_with(config)
