"""The commands that draw: words to settings, a call, a table, and where the pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, print_table, say
from nextblock.logs import counted
from nextblock.look.settings import CompleteSettings, FeaturesSettings, PredictSettings
from nextblock.tables import Column, Table, end_of, number

if TYPE_CHECKING:
    from nextblock.data import BadSample
    from nextblock.visualize import PredictResult


def predict(argv: Sequence[str]) -> int:
    """Draw predictions; print a table of losses."""
    values, is_json = parse_settings(Parser("predict"), PredictSettings, argv)

    from nextblock.look import predict as look
    from nextblock.visualize.words import BASELINE_WORDS

    return _show(look.predict(**values), "loss", BASELINE_WORDS, 3, is_json=is_json)


def complete(argv: Sequence[str]) -> int:
    """Draw completions; print a table of errors."""
    values, is_json = parse_settings(Parser("complete"), CompleteSettings, argv)

    from nextblock.look import complete as look
    from nextblock.visualize.completion import FILL_WORDS

    return _show(look.complete(**values), "mean squared error", FILL_WORDS, 4, is_json=is_json)


def _show(result: PredictResult, loss: str, words: Mapping[str, str], digits: int, *, is_json: bool) -> int:
    """Print a table of losses, where the picture is, and what could not be read."""
    head = ["image", loss, *(words[name] for name in result.rows[0].baselines)]
    losses = ((row.loss, *row.baselines.values()) for row in result.rows)
    rows = [
        (row.name, *(f"{value:.{digits}f}" for value in numbers))
        for row, numbers in zip(result.rows, losses, strict=True)
    ]
    print_table(head, rows)
    say(f"picture: {result.picture}")
    chosen = counted(len(result.rows) + len(result.bad), "image")
    _say_bad(result.bad, f"{len(result.bad)} of {chosen}")
    if is_json:
        bad = [{"name": sample.name, "reason": sample.reason} for sample in result.bad]
        rows = [row.as_dict() for row in result.rows]
        picture = {"picture": str(result.picture), "mean_loss": result.mean_loss}
        end_with_json({**picture, "rows": rows, "bad": bad})
    return 0


def features(argv: Sequence[str]) -> int:
    """Draw patch features; print what their colours show, and the nearest patches if asked for."""
    values, is_json = parse_settings(Parser("features"), FeaturesSettings, argv)

    from nextblock.look.features import features as look
    from nextblock.look.surprise import NAME_LETTERS

    result = look(**values)
    shares = (f"{100 * share:.1f}" for share in result.explained)
    print_table(["colour", "variance %"], zip(("red", "green", "blue"), shares, strict=False))
    if result.nearest is not None:
        columns = (
            Column("rank", "rank"),
            number("similarity", "similarity", ".4f"),
            Column("name", "image", lambda name, _: end_of(name, NAME_LETTERS)),
            Column("class", "class"),
            Column("patch", "patch", lambda patch, _: f"{patch[0]},{patch[1]}"),
        )
        Table(result.rows, columns).print()
    for path in result.pictures:
        say(f"picture: {path}")
    _say_bad(result.bad, counted(len(result.bad), "image"))
    if is_json:
        end_with_json(result.as_dict())
    return 0


def _say_bad(bad: Sequence[BadSample], share: str) -> None:
    if bad:
        named = [" ".join(f"{sample.name}: {sample.reason}".split()) for sample in bad[:3]]
        more = ["..."] if len(bad) > len(named) else []
        say(f"{share} could not be read: " + "; ".join(named + more))
