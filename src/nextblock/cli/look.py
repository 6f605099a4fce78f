"""The commands that draw, and the page: words to settings, a call, a table, and where the pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, say
from nextblock.logs import counted
from nextblock.look.settings import CompleteSettings, FeaturesSettings, PredictSettings, ServeSettings
from nextblock.tables import Column, Table, image, number

if TYPE_CHECKING:
    from nextblock.look.opened import LookResult


def predict(argv: Sequence[str]) -> int:
    """Draw predictions; print a table of losses."""
    values, is_json = parse_settings(Parser("predict"), PredictSettings, argv)

    from nextblock.look import predict as look
    from nextblock.visualize.words import BASELINE_WORDS

    return _show(look.predict(**values), {"loss": "loss", **BASELINE_WORDS}, 3, is_json=is_json)


def complete(argv: Sequence[str]) -> int:
    """Draw completions; print a table of errors."""
    values, is_json = parse_settings(Parser("complete"), CompleteSettings, argv)

    from nextblock.look import complete as look

    words = {"loss": "mean squared error", **look.FILL_WORDS}
    return _show(look.complete(**values), words, 4, is_json=is_json)


def _show(result: LookResult, words: Mapping[str, str], digits: int, *, is_json: bool) -> int:
    """Print a table of losses, where the picture is, and what could not be read."""
    losses = [number(kind, words[kind], f".{digits}f") for kind in result.rows[0] if kind != "name"]
    Table(result.rows, [Column("name", "image", image), *losses]).print()
    chosen = counted(len(result.rows) + len(result.bad), "image")
    return _end(result, f"{len(result.bad)} of {chosen}", is_json=is_json)


def features(argv: Sequence[str]) -> int:
    """Draw patch features; print what their colours show, and the nearest patches if asked for."""
    values, is_json = parse_settings(Parser("features"), FeaturesSettings, argv)

    from nextblock.look.features import features as look

    result = look(**values)
    shares = zip(("red", "green", "blue"), result.facts["explained"], strict=False)
    rows = [{"colour": colour, "variance": 100 * share} for colour, share in shares]
    Table(rows, [Column("colour", "colour"), number("variance", "variance %", ".1f")]).print()
    if result.rows:
        columns = (
            Column("rank", "rank"),
            number("similarity", "similarity", ".4f"),
            Column("name", "image", image),
            Column("class", "class"),
            Column("patch", "patch", lambda patch, _: f"{patch[0]},{patch[1]}"),
        )
        Table(result.rows, columns).print()
    return _end(result, counted(len(result.bad), "image"), is_json=is_json)


def _end(result: LookResult, unreadable: str, *, is_json: bool) -> int:
    for path in result.pictures:
        say(f"picture: {path}")
    if result.bad:
        named = [" ".join(f"{sample.name}: {sample.reason}".split()) for sample in result.bad[:3]]
        more = ["..."] if len(result.bad) > len(named) else []
        say(f"{unreadable} could not be read: " + "; ".join(named + more))
    if is_json:
        end_with_json(result.as_dict())
    return 0


def serve(argv: Sequence[str]) -> int:
    """Load the model and serve its page until a signal ends it."""
    # The model may come first, without its flag.
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    values, is_json = parse_settings(Parser("serve"), ServeSettings, argv)

    from nextblock.serve.server import serve as serve_page

    def announce(url: str) -> None:
        say(f"Open {url} in a browser. Ctrl-C ends.")
        if is_json:
            end_with_json({"url": url})

    serve_page(ServeSettings(**values), announce)
    return 0
