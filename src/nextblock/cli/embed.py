"""`nextblock embed`: the features of images, in a file."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.settings import EmbedSettings
from nextblock.launch import find_world


def run(argv: Sequence[str]) -> int:
    """Parse the words, embed, say what the file holds."""
    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("embed", "Write the features of images to a file; run it again to resume.")
    values, is_json = parse_settings(parser, EmbedSettings, argv, overwrite="other features")

    from nextblock.evaluate.embed import embed

    found = embed(**values)
    if find_world().rank == 0:
        shape = " x ".join(map(str, found.features.shape))
        say(f"{found.path}: {shape} features, {found.about['bad']} unreadable")
        if is_json:
            end_with_json({"out": str(found.path), "shape": found.features.shape, "bad": found.about["bad"]})
    return 0
