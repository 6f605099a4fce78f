"""`nextblock embed`: the features of images, in a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nextblock.evaluate.embed.config import EmbedConfig
from nextblock.settings import from_keywords

if TYPE_CHECKING:
    from nextblock.evaluate.embed.files import Embeddings

__all__ = ["embed", "run"]


def run(argv: Sequence[str]) -> int:
    """Parse the words, embed, say what the file holds."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("embed", "Write the features of images to a file; run it again to go on.")
    parser.add_class_arguments(EmbedConfig, None, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace other features in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    values = {name: value for name, value in parser.instantiate(options).items() if name != "json"}
    result = embed(**values)
    console = Console()
    shape = " x ".join(map(str, result.shape))
    words = f"features: {result.path}, {shape}"
    console.print(words, highlight=False, markup=False, soft_wrap=True)
    if result.origin.bad:
        from nextblock.evaluate.embed.files import sidecars

        words = f"{result.origin.bad} images could not be read: {sidecars(result.path)['quarantine']}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    if options.json:
        sys.stdout.write(json.dumps(_as_json(result)) + "\n")
    return 0


def embed(**settings: Any) -> Embeddings:
    """Embed images as `nextblock embed` does; `settings` are the fields of `EmbedConfig`.

    Paths may stand for strings. Returned are the features, and names, labels and indices of the images.
    """
    from nextblock.evaluate.embed.run import embed as embed_with

    return embed_with(from_keywords(EmbedConfig, settings))


def _as_json(result: Embeddings) -> dict[str, Any]:
    return {
        "features": str(result.path),
        "shape": list(result.shape),
        "images": result.origin.rows,
        "bad": result.origin.bad,
        "classes": None if result.class_names is None else len(result.class_names),
    }
