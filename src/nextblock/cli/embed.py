"""`nextblock embed`: the features of images, in a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.embed.config import EmbedConfig
from nextblock.settings import from_dict

if TYPE_CHECKING:
    from nextblock.evaluate.embed.files import Embeddings


def run(argv: Sequence[str]) -> int:
    """Parse the words, embed, say what the file holds."""
    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("embed", "Write the features of images to a file; run it again to go on.")
    values, is_json = parse_settings(parser, EmbedConfig, argv, overwrite="other features")
    result = embed(**values)
    shape = " x ".join(map(str, result.shape))
    say(f"features: {result.path}, {shape}")
    if result.origin.bad:
        from nextblock.evaluate.embed.files import sidecars

        say(f"unreadable images left out: {result.origin.bad}, see {sidecars(result.path)['quarantine']}")
    if is_json:
        end_with_json(_as_json(result))
    return 0


def embed(**settings: Any) -> Embeddings:
    """Embed images as `nextblock embed` does; `settings` are the fields of `EmbedConfig`.

    Paths may stand for strings. Returned are the features, and names, labels and indices of the images.
    """
    from nextblock.evaluate.embed.run import embed as embed_with

    return embed_with(from_dict(EmbedConfig, settings))


def _as_json(result: Embeddings) -> dict[str, Any]:
    return {
        "features": str(result.path),
        "shape": list(result.shape),
        "images": result.origin.rows,
        "bad": result.origin.bad,
        "classes": None if result.class_names is None else len(result.class_names),
    }
