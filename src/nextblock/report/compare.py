"""Several runs beside each other: what differs, their curves, and how loss, accuracy and cost go together.

The relations are those of AIM's figures 1, 4 and 5 (arXiv 2401.08541): accuracy against validation loss, and
both against compute, images seen and parameters.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from nextblock.report.page import curve, page, prose, section, shown, table, text, what_to_type
from nextblock.report.read import Measured, RunSummary
from nextblock.report.words import how_to_measure, told_apart
from nextblock.settings import listed
from nextblock.tables import Column, Table, finite, percent

if TYPE_CHECKING:
    from rich.console import Group

SPEARMAN = "Spearman ρ"  # noqa: RUF001 - its usual letter
MIN_RUNS = 3
"""Of fewer points a correlation says nothing: through two there is always a line."""
SAME_LOSS = {
    "losses": (
        *("model.target", "model.norm_pixels", "model.loss", "model.block_size", "model.patch_size"),
        *("model.image_size", "model.vocab_size", "model.teacher_digest", "model.mask_ratio"),
        *("model.prefix", "model.num_predicted_blocks", "model.order", "data.mean", "data.std"),
    ),
    "training losses": ("data.train",),
    "validation losses": ("data.val", "data.val_resize_px"),
}
"""Runs that differ in one of these predict other things, and such losses are not to be compared."""
COSTS = {"flops": "model FLOPs", "images": "images seen", "parameters": "encoder parameters"}


class Relation(NamedTuple):
    """How validation loss goes together with an accuracy, over the runs that have both."""

    accuracy: str
    runs: int
    pearson: float | None
    """None if there are too few runs, or all have the same value."""
    spearman: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs, and what there is to compare of them."""

    runs: Sequence[RunSummary]

    @cached_property
    def names(self) -> list[str]:
        """A name of each run: its directory's, with as much of the path as tells it from the others."""
        paths = [run.run_dir.resolve() for run in self.runs]
        for length in range(1, max(len(path.parts) for path in paths) + 1):
            names = ["/".join(path.parts[-length:]) for path in paths]
            if len(set(names)) == len(names):
                return names
        return [str(path) for path in paths]

    @cached_property
    def monitored(self) -> list[list[Measured]]:
        """The kNN accuracy of each run while it trained, if there is one."""
        return told_apart(*(run.monitored for run in self.runs))

    @cached_property
    def measures(self) -> dict[str, list[dict[str, float | None] | None]]:
        """Accuracies by what they are, with the standard error of each run; first what the most runs have."""
        found: dict[str, list[dict[str, float | None] | None]] = {}
        own = told_apart(*([one for one in run.results if one.encoder == "model"] for run in self.runs))
        for i, results in enumerate(zip(own, self.monitored, strict=True)):
            for one in chain(*results):
                values = found.setdefault(f"{one.method} {one.where}", [None] * len(self.runs))
                values[i] = {"top1": one.top1, "top1_se": one.top1_se}
        return dict(sorted(found.items(), key=lambda item: item[1].count(None)))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row of each run: cost, losses, and accuracies by the name of the measure."""
        return [
            {
                "run": name,
                "status": run.status.word,
                "step": run.step,
                "images": run.step * run.batch_size or None,
                "parameters": run.encoder_parameters,
                "flops": run.flops,
                "loss": run.final_loss and run.final_loss[0],
                "val_loss": run.final_val_loss and run.final_val_loss[0],
                "accuracies": {measure: values[i] for measure, values in self.measures.items()},
            }
            for i, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
        ]

    def pairs(self, x: str, y: str) -> list[tuple[int, Any, Any]]:
        """Runs by number with two values that they have both: of a row, or the accuracy of that name."""
        found = []
        for i, row in enumerate(self.rows):
            both = [
                row[name] if name in row else (row["accuracies"][name] or {}).get("top1") for name in (x, y)
            ]
            if None not in both:
                found.append((i, *both))
        return found

    @cached_property
    def differing(self) -> dict[str, list[Any]]:
        """The settings in which the runs differ, with the value of each run."""
        names = dict.fromkeys(name for run in self.runs for name in run.settings)
        values = {name: [run.settings.get(name) for run in self.runs] for name in names}
        return {name: all_ for name, all_ in values.items() if any(one != all_[0] for one in all_)}

    @property
    def unlike(self) -> dict[str, list[str]]:
        """The settings that make losses of the runs different things, by which losses."""
        keys, found = {"training losses": "loss", "validation losses": "val_loss"}, {}
        for losses, names in SAME_LOSS.items():
            # Runs without such a loss do not matter.
            kept = [i for i, row in enumerate(self.rows) if row[keys.get(losses, "run")] is not None]
            for name in names:
                values = [self.differing[name][i] for i in kept] if name in self.differing else []
                if any(value != values[0] for value in values):
                    found.setdefault(losses, []).append(name)
        return found

    @cached_property
    def relations(self) -> list[Relation]:
        """Validation loss beside each accuracy."""
        found = []
        for measure in self.measures:
            pairs = self.pairs("val_loss", measure)
            x, y = [one for _, one, _ in pairs], [one for _, _, one in pairs]
            found.append(Relation(measure, len(pairs), correlation(x, y), correlation(ranks(x), ranks(y))))
        return found

    def values(self) -> dict[str, Any]:
        """All of it for programs, ready for JSON: accuracies are shares of 1, null is what is not known."""
        known = {"differing": self.differing, "unlike": self.unlike}
        return finite({"runs": self.rows, **known, "relations": [one._asdict() for one in self.relations]})


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None of fewer than three pairs, or if one of the two never changes."""
    if len(x) < MIN_RUNS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal ones share the mean of theirs. Pearson of ranks is Spearman."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


# ------------------------------------------------------------------------------------------------ shown


def comparison_table(found: Comparison, *, accuracies: int = 3) -> Table:
    """A row of each run: losses, and the accuracies that the most runs have."""

    def accuracy(name: str) -> Column:
        def show(found: dict[str, Any], _: Any) -> str:
            return "-" if found[name] is None else percent(found[name]["top1"], found[name], "top1")

        return Column("accuracies", name, show)

    def known(key: str, title: str, show: Callable[[Any], str]) -> Column:
        return Column(key, title, lambda value, _: "-" if value is None else show(value))

    def count(value: float) -> str:
        return f"{value:,}" if value < 1e6 else f"{value / 1e6:,.1f} M"

    columns = [
        Column("run", "run"),
        Column("status", "status"),
        known("step", "step", count),
        known("images", "images seen", count),
        known("parameters", "encoder", count),
        known("flops", "FLOPs", "{:.1e}".format),
        known("loss", "loss", "{:.4f}".format),
        known("val_loss", "val loss", "{:.4f}".format),
    ]
    return Table(found.rows, [*columns, *map(accuracy, [*found.measures][:accuracies])])


def relation_words(one: Relation) -> str:
    """A correlation in words."""
    if one.runs < MIN_RUNS:
        return f"no correlation of {one.runs} {'run' if one.runs == 1 else 'runs'}; {MIN_RUNS} are needed"
    if one.pearson is None or one.spearman is None:
        return f"no correlation: one of the two is the same in all {one.runs} runs"
    return f"Pearson r {one.pearson:+.2f}, {SPEARMAN} {one.spearman:+.2f}, {one.runs} runs"


def warnings(found: Comparison) -> Iterator[str]:
    """What keeps the runs from being compared as they are."""
    for losses, names in found.unlike.items():
        advice = " Compare accuracies; a correlation with these losses means nothing."
        advice = "" if losses == "training losses" else advice
        yield f"The runs differ in {listed(names)}, so their {losses} measure different things.{advice}"
    unfinished = [row["run"] for row in found.rows if row["status"] != "finished"]
    if unfinished:
        yield f"Not finished: {listed(unfinished)}."


def comparison_group(found: Comparison) -> Group:
    """The comparison for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.text import Text

    known = [one for one in found.relations if one.runs >= MIN_RUNS] or found.relations[:1]
    relations = [Text(f"validation loss and {one.accuracy}: {relation_words(one)}") for one in known]
    notes = [Text(one, style="italic") for one in warnings(found)]
    return Group(comparison_table(found).rich(), *relations, *notes)


def comparison_page(found: Comparison, folder: Path) -> str:
    """The page of a comparison, to be written into `folder`."""
    results = comparison_table(found, accuracies=len(found.measures))
    pages = {name: run.run_dir / "report.html" for name, run in zip(found.names, found.runs, strict=True)}
    links = [
        f'<a href="{quote(os.path.relpath(path, folder), errors="surrogateescape")}">{text(name)}</a>'
        for name, path in pages.items()
        if path.is_file()
    ]
    charts, lacking = _relation_charts(found)
    relations = "".join(f"<p>Accuracy: {text(one)}.</p>\n" for one in [*found.measures][:1])
    relations += '<div id="relations" class="charts pairs"></div>\n'
    if found.relations:
        cells = [
            [one.accuracy, str(one.runs), *("-" if r is None else f"{r:+.2f}" for r in one[2:])]
            for one in found.relations
        ]
        relations += "<p>Correlation of the validation loss with each accuracy:</p>\n"
        relations += table("correlations", ["accuracy", "runs", "Pearson r", SPEARMAN], cells)
    settings = "<p>None: all runs have the same settings.</p>\n"
    if found.differing:
        cells = [[name, *map(shown, values)] for name, values in found.differing.items()]
        settings = table("settings that differ", ["setting", *found.names], cells)
    title = f"{len(found.runs)} runs compared"
    body = [
        f"<header><h1>{title}</h1>\n<p class=muted>{text(', '.join(found.names))}</p></header>\n",
        *(f"<p class=note>{prose(one)}</p>\n" for one in warnings(found)),
        section(
            "Results",
            "<p>Accuracies are top-1 in percent ± one standard error.</p>\n",
            table("results", results.head, results.cells()),
            f"<p>Pages of their own: {', '.join(links)}.</p>\n" if links else "",
        ),
        section("Loss, accuracy and cost", relations, what_to_type(lacking)),
        section("Curves", '<div id="charts" class="charts"></div>\n'),
        section("Settings that differ", settings),
    ]
    values = finite({"charts": _curve_charts(found), "relations": charts})
    return page(f"{title} · nextblock", "".join(body), values)


def _curve_charts(found: Comparison) -> list[dict[str, Any]]:
    """The curves of all runs, by images seen: batches may differ."""
    titles = {
        "val_loss": "Validation loss",
        "loss": "Training loss",
        "knn/top1": "kNN accuracy",
        "rankme": "RankMe",
    }
    charts: dict[str, dict[str, Any]] = {}
    for key, title in titles.items():
        for i, (name, run) in enumerate(zip(found.names, found.runs, strict=True)):
            steps, values = run.series(key)
            if steps:
                images = [step * (run.batch_size or 1) for step in steps]
                # kNN on other images is another measure.
                where = "".join(f" {one.where}" for one in found.monitored[i]) if key == "knn/top1" else ""
                more = {"x": "images seen", "share": key == "knn/top1", "wide": key == "val_loss"}
                chart = charts.setdefault(title + where, {"title": title + where, "series": [], **more})
                chart["series"].append({**curve(name, images, values), "colour": i})
    return [*charts.values()]


def _relation_charts(found: Comparison) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Points of runs: accuracy against validation loss, both against what they cost; and what is missing."""
    charts, lacking = list[dict[str, Any]](), list[tuple[str, str]]()
    measure = next(iter(found.measures), "")
    if not measure:
        lacking.append(("No run has an accuracy yet. Measure each:", how_to_measure(found.runs[0])))
    if all(row["val_loss"] is None for row in found.rows):
        lacking.append(("No run has a validation loss.", "nextblock pretrain --data.val DIR2 ..."))
    for x, words in {"val_loss": "validation loss", **COSTS}.items():
        known = {row[x] for row in found.rows} - {None}
        if x in COSTS and len(known) < 2:
            value = [f"{one:,}" if isinstance(one, int) else f"{one:.2e}" for one in known]
            why = f"it is {value[0]} for all" if value else "not known"
            lacking.append((f"No chart by {words}: {why}.", ""))
            continue
        for y, title in {"val_loss": "Validation loss", measure: "Accuracy"}.items():
            pairs = found.pairs(x, y) if y and x != y else []
            if len(pairs) > 1:
                points = [{"name": found.names[i], "x": a, "y": b, "colour": i} for i, a, b in pairs]
                own = {"note": relation_words(found.relations[0]), "wide": True} if x == "val_loss" else {}
                kind = {"x": words, "log": x in COSTS, "share": y == measure}
                charts.append({"title": f"{title} by {words}", "points": points, **kind, **own})
    return charts, lacking
