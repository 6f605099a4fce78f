"""Several runs compared: settings that differ, curves, and the relations of loss, accuracy and cost.

The relations are those of AIM's figures 1, 4 and 5 (arXiv 2401.08541): accuracy against validation loss, and
both against compute, images seen and parameters.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from nextblock.logs import counted
from nextblock.report.page import notes, page, section, shown, table, text, what_to_type
from nextblock.report.read import Measured, RunSummary, thinned
from nextblock.report.words import distinguished, how_to_measure
from nextblock.settings import listed
from nextblock.tables import Column, Table, finite, percent

if TYPE_CHECKING:
    from rich.console import Group

SPEARMAN = "Spearman ρ"  # noqa: RUF001 - its usual letter
MIN_RUNS = 3
"""Two points always lie on a line, so fewer have no correlation."""
SAME_LOSS = {
    "losses": (
        *("model.target", "model.norm_pixels", "model.loss", "model.block_size", "model.patch_size"),
        *("model.image_size", "model.vocab_size", "model.teacher_digest", "model.mask_ratio"),
        *("model.prefix", "model.num_predicted_blocks", "model.order", "data.mean", "data.std"),
    ),
    "training losses": ("data.train",),
    "validation losses": ("data.val", "data.val_resize_px"),
}
"""If runs differ in one of these settings, these losses measure different things."""
COSTS = {"flops": "model FLOPs", "images": "images seen", "parameters": "encoder parameters"}
CURVES = {
    "val_loss": "Validation loss",
    "loss": "Training loss",
    "knn/top1": "kNN accuracy",
    "rankme": "RankMe",
}


class Relation(NamedTuple):
    """Correlation of validation loss and an accuracy, over the runs that have both."""

    accuracy: str
    runs: int
    pearson: float | None
    """None if there are too few runs, or all have the same value."""
    spearman: float | None

    @property
    def words(self) -> str:
        """The correlation, or why there is none."""
        if self.pearson is None or self.spearman is None:
            known = counted(self.runs, "run")
            return f"no correlation of {known}; at least {MIN_RUNS} that differ are needed"
        return f"Pearson r {self.pearson:+.2f}, {SPEARMAN} {self.spearman:+.2f}, {self.runs} runs"


@dataclass(frozen=True)
class Comparison:
    """Runs, and what can be compared of them."""

    runs: Sequence[RunSummary]

    @cached_property
    def names(self) -> list[str]:
        """The name of each run: its path below the directory that contains all runs."""
        paths = [run.run_dir.resolve() for run in self.runs]
        # Two runs may have the same last name: a/run, b/run.
        common = os.path.commonpath([path.parent for path in paths])
        return [str(path.relative_to(common)) for path in paths]

    @cached_property
    def monitored(self) -> list[list[Measured]]:
        """The kNN accuracy of each run during training, if there is one."""
        return distinguished(*(run.monitored for run in self.runs))

    @cached_property
    def measures(self) -> dict[str, list[Measured | None]]:
        """The accuracies of each run by what they measure; first what the most runs have."""
        found: dict[str, list[Measured | None]] = {}
        own = distinguished(*([one for one in run.results if one.encoder == "model"] for run in self.runs))
        for i, results in enumerate(zip(own, self.monitored, strict=True)):
            last = self.runs[i].last("knn/top1")
            while_training = results[1] if last and last[1] else []  # at step 0, nothing is trained
            for one in (*results[0], *while_training):
                found.setdefault(f"{one.method} {one.where}", [None] * len(self.runs))[i] = one
        return dict(sorted(found.items(), key=lambda item: item[1].count(None)))

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A row per run: cost, losses, and accuracies by the name of the measure."""
        return [
            {
                "run": name,
                "status": run.status.word,
                "step": run.step,
                "images": run.step * run.batch_size or None,
                "parameters": run.encoder_parameters,
                "flops": run.flops,
                "loss": (run.last("loss") or [None])[0],
                "val_loss": (run.last("val_loss") or [None])[0],
                "accuracies": {
                    measure: (one := values[i]) and {"top1": one.top1, "top1_se": one.top1_se}
                    for measure, values in self.measures.items()
                },
            }
            for i, (name, run) in enumerate(zip(self.names, self.runs, strict=True))
        ]

    def pairs(self, x: str, y: str) -> list[tuple[int, Any, Any]]:
        """The runs (by number) that have both values: of a row, or the accuracy of that name."""
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
        """The settings that make losses of the runs measure different things, by which losses."""
        needed, found = {"training losses": "loss", "validation losses": "val_loss"}, {}
        for losses, names in SAME_LOSS.items():
            # Runs that have no such loss do not matter.
            kept = [i for i, row in enumerate(self.rows) if row[needed.get(losses, "run")] is not None]
            settings = [self.runs[i].settings for i in kept]
            differ = [name for name in names if len({str(one.get(name)) for one in settings}) > 1]
            if differ:
                found[losses] = differ
        return found

    @cached_property
    def relations(self) -> list[Relation]:
        """Validation loss and each accuracy."""
        found = []
        for measure in self.measures:
            pairs = self.pairs("val_loss", measure)
            x, y = [one for _, one, _ in pairs], [one for _, _, one in pairs]
            found.append(Relation(measure, len(pairs), correlation(x, y), correlation(ranks(x), ranks(y))))
        return found

    def values(self) -> dict[str, Any]:
        """Everything for programs, ready for JSON: accuracies are shares of 1, null is unknown."""
        known = {"differing": self.differing, "unlike": self.unlike}
        return finite({"runs": self.rows, **known, "relations": [one._asdict() for one in self.relations]})


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r; None for fewer than three pairs, or if one of the two never changes."""
    if len(x) < MIN_RUNS or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1; equal values share their mean rank. Pearson of ranks is Spearman."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


# ------------------------------------------------------------------------------------------------ rendering


def comparison_table(found: Comparison, *, accuracies: int = 3) -> Table:
    """A row per run: losses, and the accuracies that the most runs have."""

    def known(key: str, title: str, show: Callable[[Any], str]) -> Column:
        return Column(key, title, lambda value, _: "-" if value is None else show(value))

    def accuracy(name: str) -> Column:
        def show(one: dict[str, Any]) -> str:
            return "-" if one[name] is None else percent(one[name]["top1"], one[name], "top1")

        return known("accuracies", name, show)

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


def warnings(found: Comparison) -> Iterator[str]:
    """Reasons why the runs are not comparable as they are."""
    for losses, names in found.unlike.items():
        yield f"The runs differ in {listed(names)}, so their {losses} measure different things."
    unfinished = [row["run"] for row in found.rows if row["status"] != "finished"]
    if unfinished:
        yield f"Not finished: {listed(unfinished)}."


def relation_words(found: Comparison) -> list[str]:
    """The correlations of validation loss and accuracies; if there is none, why not."""
    known = [one for one in found.relations if one.runs >= MIN_RUNS] or found.relations[:1]
    return [f"validation loss and {one.accuracy}: {one.words}" for one in known]


def comparison_group(found: Comparison) -> Group:
    """The comparison for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.text import Text

    relations = [Text(one) for one in relation_words(found)]
    notes = [Text(one, style="italic") for one in warnings(found)]
    return Group(comparison_table(found).rich(), *relations, *notes)


def comparison_page(found: Comparison) -> str:
    """The page of a comparison."""
    results = comparison_table(found, accuracies=len(found.measures))
    charts, lacking = _relation_charts(found)
    relations = "".join(f"<p>Accuracy: {text(one)}.</p>\n" for one in [*found.measures][:1])
    relations += '<div id="relations" class="charts pairs"></div>\n'
    relations += "".join(f"<p>Correlation of {text(one)}.</p>\n" for one in relation_words(found))
    settings = "<p>None: all runs have the same settings.</p>\n"
    if found.differing:
        cells = [[name, *map(shown, values)] for name, values in found.differing.items()]
        settings = table("settings that differ", ["setting", *found.names], cells)
    title = f"{len(found.runs)} runs compared"
    body = [
        f"<header><h1>{title}</h1>\n<p class=muted>{text(', '.join(found.names))}</p></header>\n",
        notes(warnings(found)),
        section(
            "Results",
            "<p>Accuracies are top-1 in percent ± one standard error.</p>\n",
            table("results", results.head, results.cells()),
        ),
        section("Loss, accuracy and cost", relations, what_to_type(lacking)),
        section("Curves", '<div id="charts" class="charts"></div>\n'),
        section("Settings that differ", settings),
    ]
    values = finite({"charts": _curve_charts(found), "relations": charts})
    return page(f"{title} · nextblock", "".join(body), values)


def _curve_charts(found: Comparison) -> list[dict[str, Any]]:
    """The curves of all runs by images seen, because batch sizes may differ."""
    charts: dict[str, dict[str, Any]] = {}
    for key, name in CURVES.items():
        for i, run in enumerate(found.runs):
            steps, values = run.series(key)
            if not steps:
                continue
            # kNN accuracies on different images get separate charts.
            title = name + "".join(f" {one.where}" for one in found.monitored[i] if key == "knn/top1")
            options = {"x": "images seen", "share": key == "knn/top1", "wide": key == "val_loss"}
            chart = charts.setdefault(title, {"title": title, "series": [], **options})
            line = thinned([step * (run.batch_size or 1) for step in steps], values)
            chart["series"].append({"name": found.names[i], **line, "colour": i})
    return [*charts.values()]


def _relation_charts(found: Comparison) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Scatter plots: accuracy against validation loss, both against cost; and what is missing for them."""
    charts, lacking = list[dict[str, Any]](), list[tuple[str, str]]()
    measure = next(iter(found.measures), "")
    if not measure:
        lacking.append(("No run has an accuracy yet. Measure each:", how_to_measure(found.runs[0])))
    if all(row["val_loss"] is None for row in found.rows):
        lacking.append(("No run has a validation loss.", "nextblock pretrain --data.val DIR2 ..."))
    for x, words in {"val_loss": "validation loss", **COSTS}.items():
        if x in COSTS and len({row[x] for row in found.rows} - {None}) < 2:
            lacking.append((f"No chart by {words}: unknown, or the same for all runs.", ""))
            continue
        for y, title in {"val_loss": "Validation loss", measure: "Accuracy"}.items():
            pairs = found.pairs(x, y) if y and x != y else []
            if len({one for _, one, _ in pairs}) > 1:  # points above each other show no relation
                points = [{"name": found.names[i], "x": a, "y": b, "colour": i} for i, a, b in pairs]
                own = {"note": found.relations[0].words, "wide": True} if x == "val_loss" else {}
                kind = {"x": words, "log": x in COSTS, "share": y == measure}
                charts.append({"title": f"{title} by {words}", "points": points, **kind, **own})
    return charts, lacking
