"""The verbs that evaluate: words to settings, a call, a table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.arguments import Parser, parse_settings
from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.finetune.settings import FinetuneSettings
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.settings import (
    ClassifySettings,
    CompareSettings,
    EmbedSettings,
    FewshotSettings,
    KnnSettings,
    SearchSettings,
)
from nextblock.launch import find_world, launch
from nextblock.settings import Count

if TYPE_CHECKING:
    from nextblock.evaluate.evaluation import Result


def _run(
    argv: Sequence[str],
    verb: str,
    settings: type,
    *,
    function: str | None = None,
    after: Callable[[Result, Path], None] | None = None,
) -> int:
    """Parse the words, call `nextblock.VERB` (or another function), print its table and notes on rank 0."""
    parser = Parser(verb)
    parser.add_argument(
        "--devices", type=Count | None, help="processes on this machine, one for each GPU or CPU core"
    )
    values, is_json = parse_settings(parser, settings, argv, overwrite="another result")
    devices = values.pop("devices")
    if devices is not None:
        return launch(verb, argv, devices, values["device"])
    result = getattr(importlib.import_module("nextblock"), function or verb)(**values)
    if find_world().rank:
        return 0
    if verb == "embed":
        shape = " x ".join(map(str, result.features.shape))
        say(f"{result.path}: {shape} features, {result.about['bad']} unreadable")
        end = {"out": str(result.path), "shape": result.features.shape, "bad": result.about["bad"]}
    else:
        result.table.print()
        say(*result.notes)
        end = result.as_dict()
    if after is not None:
        after(result, Path(values["out"]))
    if is_json:
        end_with_json(end)
    return 0


def _draw_confusion(result: Result, out: Path) -> None:
    from nextblock.visualize.evaluation import draw_confusion

    row, confusion = result.rows[0], result.facts["confusion"]
    if confusion is not None:
        title = f"fine-tuned, on {row['split']}: top-1 {row['top1']:.1%}"
        draw_confusion(confusion, result.facts["class_names"], title, out / "confusion.png")


knn = partial(_run, verb="knn", settings=KnnSettings)
fewshot = partial(_run, verb="fewshot", settings=FewshotSettings)
probe = partial(_run, verb="probe", settings=ProbeSettings)
finetune = partial(_run, verb="finetune", settings=FinetuneSettings, after=_draw_confusion)
embed = partial(_run, verb="embed", settings=EmbedSettings)
search = partial(_run, verb="search", settings=SearchSettings)
classify = partial(_run, verb="classify", settings=ClassifySettings)
compare = partial(_run, verb="eval", settings=CompareSettings, function="compare")
