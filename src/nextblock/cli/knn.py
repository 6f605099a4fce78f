"""`nextblock knn`: what a frozen encoder's features are worth by their nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nextblock.cli.output import end_with_json, print_table
from nextblock.evaluate.knn_config import KnnConfig, KnnResult
from nextblock.settings import from_dict, to_dict


def run(argv: Sequence[str]) -> int:
    """Parse the words, measure, print a table."""
    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("knn", "Measure a frozen encoder's features by their nearest neighbours.")
    values, is_json = parse_settings(parser, KnnConfig, argv, overwrite="another result")
    result = knn(**values)

    from nextblock.evaluate.knn import comparison, summary

    print_table(*comparison(result), title="top-1 %", below=summary(result))
    if is_json:
        end_with_json(to_dict(result))
    return 0


def knn(**settings: Any) -> KnnResult:
    """Measure a model as `nextblock knn` does; `settings` are the fields of `KnnConfig`.

    Paths and lists may stand for strings and tuples.
    """
    config = from_dict(KnnConfig, settings)  # first: torch takes seconds, a wrong setting none
    from nextblock.evaluate.knn import knn as knn_with

    return knn_with(config)
