"""`nextblock suite`: probe the papers' benchmarks and write their table; or list or check them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.errors import UsageError
from nextblock.evaluate.suite.benchmarks import BENCHMARKS, Benchmark, chosen
from nextblock.evaluate.suite.config import SuiteConfig, SuiteResult
from nextblock.evaluate.suite.published import PUBLISHED
from nextblock.settings import from_dict, to_dict

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.evaluate.suite.check import Check

_FAILURE = 1


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What `--list` and `--check` are told."""

    root: str | None = None
    """Directory of the data sets."""
    only: tuple[str, ...] | None = None
    """Benchmarks, by name; null: all."""


def run(argv: Sequence[str]) -> int:
    """Parse the words; probe, list or check; 1 where a benchmark failed, or nothing could be measured."""
    from nextblock.cli.arguments import Parser, parse_settings

    about = "Probe the fifteen benchmarks of the AIM and XTRA papers and write their table."
    parser = Parser("suite", about)
    looks = [word for word in ("--list", "--check") if word in argv]
    parser.add_argument("--list", action="store_true", help="list the benchmarks, and those below --root")
    parser.add_argument("--check", action="store_true", help="compare what is below --root with the papers")
    config, overwrite = (_Look, None) if looks else (SuiteConfig, "another result")
    values, is_json = parse_settings(parser, config, argv, overwrite=overwrite)
    is_list, is_check = (values.pop(name) for name in ("list", "check"))
    if looks:
        if is_list and is_check:
            raise UsageError("--list and --check are given; give one of them")
        only = None if values["only"] is None else tuple(values["only"])
        root = None if values["root"] is None else Path(values["root"]).expanduser()
        return _check(root, only, is_json=is_json) if is_check else _list(root, only, is_json=is_json)
    from nextblock.evaluate.probe.state import ProbeStopped

    try:
        result = suite(**values)
    except ProbeStopped as stopped:
        sys.stderr.write(f"nextblock suite: {stopped}\n")
        return 128 + stopped.signal
    _show(result, Path(values["out"]))
    if is_json:
        end_with_json({**to_dict(result), "mean_percent": result.mean_percent})
    return _FAILURE if result.failed or not result.scores else 0


def suite(**settings: Any) -> SuiteResult:
    """Measure a model as `nextblock suite` does; `settings` are the fields of `SuiteConfig`.

    The picture is drawn as well. Paths and lists may stand for strings and tuples.
    """
    from nextblock.evaluate.suite.run import suite as suite_with
    from nextblock.visualize.suite import save_suite

    config = from_dict(SuiteConfig, settings)
    result = suite_with(config)
    save_suite(Path(config.out) / "suite.png", result.top1_percent, result.model)
    return result


def _show(result: SuiteResult, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    beside = {
        "MAE-H": next(row for row in PUBLISHED if (row.model, row.architecture) == ("MAE", "ViT-H/14")),
        "AIM-0.6B": next(row for row in PUBLISHED if row.model == "AIM-0.6B"),
    }
    ours = result.top1_percent
    table = Table("benchmark", "top-1 %", *beside, "what happened")
    for benchmark in BENCHMARKS:
        name = benchmark.name
        if name not in {*ours, *result.missing, *result.failed}:
            continue
        why = "missing" if name in result.missing else "failed" if name in result.failed else ""
        others = [row.by_name.get(name) for row in beside.values()]
        table.add_row(benchmark.title, _number(ours.get(name)), *map(_number, others), why)
    means = [row.mean for row in beside.values()]
    table.add_row("mean of fifteen", _number(result.mean_percent), *map(_number, means), "")
    console = Console()
    console.print(table)
    for name, why in {**result.missing, **result.failed}.items():
        say(f"{name}: {why}")
    console.print(f"{out / 'suite.md'} has the table beside the papers', and what differs", highlight=False)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# --------------------------------------------------------------------------------------------- list and check


def _list(root: Path | None, only: tuple[str, ...] | None, *, is_json: bool) -> int:
    from rich.console import Console

    rows = [_listed(benchmark, root) for benchmark in chosen(only)]
    console = Console()
    console.print(_list_table(rows, root))
    for row in rows:
        todo = f"is in {row['folder']}; --check looks closer" if row["is_there"] else row["fetch"]
        words = f"{row['name']} ({row['source']}): {todo}" + (f"; {row['note']}" if row["note"] else "")
        say(words)
    if is_json:
        end_with_json(rows)
    return 0


def _listed(benchmark: Benchmark, root: Path | None) -> dict[str, Any]:
    """A benchmark as `--list` tells it; of the folder only whether it is there."""
    root_name = "ROOT" if root is None else str(root)
    at = f"{root_name}/{benchmark.layout.folder}"
    return {
        "name": benchmark.name,
        "title": benchmark.title,
        "classes": benchmark.classes,
        "train": " + ".join(benchmark.train),
        "test": benchmark.test,
        "images": list(benchmark.images),
        "head": benchmark.head,
        "source": benchmark.source,
        "folder": at,
        "is_there": None if root is None else Path(at).is_dir(),
        "terms": benchmark.terms,
        "fetch": benchmark.fetch.format(at=at, root=root_name),
        "note": benchmark.note,
        "probe": to_dict(benchmark.recipe),
    }


def _list_table(rows: Sequence[dict[str, Any]], root: Path | None) -> Table:
    """A line each, for a terminal of 80 columns; what to do stands below it."""
    from rich.table import Table

    columns = ["name", "classes", "train / test", "terms", *([] if root is None else ["here"])]
    table = Table(*columns)
    for row in rows:
        here = [] if root is None else ["yes" if row["is_there"] else "no"]
        splits = f"{row['train']} / {row['test']}"
        table.add_row(row["name"], str(row["classes"]), splits, row["terms"], *here)
    return table


def _check(root: Path | None, only: tuple[str, ...] | None, *, is_json: bool) -> int:
    """Check and tell; 1 where one is missing, or differs otherwise than its source is known to."""
    from rich.console import Console

    from nextblock.evaluate.suite.check import check
    from nextblock.evaluate.suite.layouts import root_at

    if root is None:
        raise UsageError("--check needs --root, the directory of the data sets")
    root = root_at(root)
    checks = [check(benchmark, root) for benchmark in chosen(only)]
    console = Console()
    console.print(_check_table(checks))
    for one in checks:
        for problem in (*one.problems, *one.known):
            say(f"{one.name}: {problem}")
    if is_json:
        end_with_json([to_dict(one) for one in checks])
    return 0 if all(one.is_well for one in checks) else _FAILURE


def _check_table(checks: Sequence[Check]) -> Table:
    from rich.table import Table

    table = Table("name", "is", "classes", "to train on", "to test on")
    for one in checks:
        train, test = ("", "") if one.images is None else (f"{number:,}" for number in one.images)
        table.add_row(one.name, one.status, "" if one.classes is None else str(one.classes), train, test)
    return table
