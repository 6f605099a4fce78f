"""`nextblock info`: what a run or a weight file holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Load a model from anything `nextblock.load` reads, and tell what it is."""
    from rich.console import Console
    from rich.table import Table

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("info", "Tell what a run or a weight file holds.")
    parser.add_argument("file", type=str, help="run directory, checkpoint or weight file")
    parser.add_argument(
        "--num_heads", type=int | None, default=None, help="the encoder's, where the file is silent"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parse(parser, argv)
    told = _describe(options.file, options.num_heads)
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")
        return 0
    table = Table(show_header=False)
    for name, value in told.items():
        table.add_row(name, str(value))
    Console().print(table)
    return 0


def _describe(src: str, num_heads: int | None) -> dict[str, Any]:
    from nextblock.interop import load
    from nextblock.models.classifier import ImageClassifier
    from nextblock.settings import to_dict

    model = load(src, num_heads=num_heads)
    is_classifier = isinstance(model, ImageClassifier)
    encoder_model = model.encoder_model if is_classifier else model
    config = encoder_model.config
    return {
        "kind": "classifier" if is_classifier else "model" if encoder_model.predictor else "encoder",
        "encoder": f"{config.embed_dim} wide, {config.depth} layers, {config.num_heads} heads",
        "encoder_params": sum(p.numel() for p in encoder_model.encoder.parameters()),
        "total_params": sum(p.numel() for p in model.parameters()),
        "grid": list(config.grid),
        "blocks": config.num_blocks,
        **({"head": to_dict(model.head_config)} if is_classifier else {}),
        "config": to_dict(config),
    }
