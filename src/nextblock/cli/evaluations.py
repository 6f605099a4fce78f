"""The verbs that evaluate: parse settings, call the public function, print its table."""

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
from nextblock.evaluate.suite.settings import SuiteSettings
from nextblock.launch import find_world, launch
from nextblock.look.settings import SurpriseSettings
from nextblock.settings import Count

if TYPE_CHECKING:
    from nextblock.evaluate.evaluation import Result


def _run(
    argv: Sequence[str],
    verb: str,
    settings: type,
    *,
    function: str | None = None,
    after: Callable[[Result, Path], int | None] | None = None,
    switch: tuple[str, str] | None = None,
) -> int:
    """Parse the words, call `nextblock.VERB` or `function`, and print its table and notes on rank 0.

    Returns the exit code of `after`, or 0. `switch` is a flag that only the help lists, and its description.
    """
    parser = Parser(verb)
    if switch is not None:
        parser.add_argument(switch[0], action="store_true", help=switch[1])
    parser.add_argument(
        "--devices", type=Count | None, help="processes on this machine, one for each GPU or CPU core"
    )
    values, is_json = parse_settings(parser, settings, argv, overwrite="another result")
    values = {name: value for name, value in values.items() if switch is None or name != switch[0][2:]}
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
        (result.brief or result.table).print()
        say(*result.notes)
        end = result.as_dict()
    code = after(result, Path(values["out"])) if after is not None else None
    if is_json:
        end_with_json(end)
    return code or 0


def _draw_confusion(result: Result, out: Path) -> None:
    from nextblock.visualize.evaluation import draw_confusion

    row, confusion = result.rows[0], result.facts["confusion"]
    if confusion is not None:
        title = f"fine-tuned, on {row['split']}: top-1 {row['top1']:.1%}"
        draw_confusion(confusion, result.facts["class_names"], title, out / "confusion.png")


def suite(argv: Sequence[str]) -> int:
    """Probe the benchmarks, or list them; return 1 if one failed or none was measured."""
    switch = "--list", "list the benchmarks, whether --root contains them, and how to get them"
    if switch[0] not in argv or {"-h", "--help", "--help-all"} & set(argv):
        return _run(argv, verb="suite", settings=SuiteSettings, after=_suite_code, switch=switch)
    parser = Parser("suite")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--root", type=str | None)
    parser.add_argument("--only", type=tuple[str, ...] | None)
    options = parser.parse(argv)
    from nextblock.evaluate.suite.run import list_benchmarks

    result = list_benchmarks(options.root, options.only)
    result.table.print()
    say(*result.notes)
    if options.json:
        end_with_json(result.as_dict())
    return 0


def _suite_code(result: Result, _: Path) -> int:
    statuses = {row["status"] for row in result.rows}
    return int("failed" in statuses or "measured" not in statuses)


knn = partial(_run, verb="knn", settings=KnnSettings)
fewshot = partial(_run, verb="fewshot", settings=FewshotSettings)
probe = partial(_run, verb="probe", settings=ProbeSettings)
finetune = partial(_run, verb="finetune", settings=FinetuneSettings, after=_draw_confusion)
embed = partial(_run, verb="embed", settings=EmbedSettings)
search = partial(_run, verb="search", settings=SearchSettings)
classify = partial(_run, verb="classify", settings=ClassifySettings)
surprise = partial(_run, verb="surprise", settings=SurpriseSettings)
compare = partial(_run, verb="eval", settings=CompareSettings, function="compare")
