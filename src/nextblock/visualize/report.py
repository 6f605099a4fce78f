"""What a run achieved, read from its files: accuracies, speed, the loss beside its baselines, a picture.

Nothing here imports torch, so that the report starts quickly. What a run does not have yet is said, not an
error.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nextblock.errors import UsageError
from nextblock.tables import Column, Row, Table, percent
from nextblock.visualize.words import BASELINE_WORDS

if TYPE_CHECKING:
    from rich.console import Group

VERBS = ("probe", "knn", "fewshot", "finetune")
"""What results below a run are reported, in this order."""


class Measured(NamedTuple):
    """An accuracy below a run."""

    method: str
    """The head, or how it was measured."""
    on: str
    """The images it was measured on."""
    encoder: str
    """The model, or one of its baselines."""
    top1: float
    top1_se: float | None


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the files of a run say."""

    run_dir: Path
    train: tuple[dict[str, Any], ...] = ()
    """Logged training lines, in order: step, loss, lr, images_per_s, ..."""
    val: tuple[dict[str, Any], ...] = ()
    """Validation lines: step, val_loss."""
    monitor: tuple[dict[str, Any], ...] = ()
    """What monitors measured: step, and their own names."""
    baselines: dict[str, float] = field(default_factory=dict)
    """The loss without a model, by the names of `BASELINE_WORDS`; empty where not measured."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Versions and hardware, as the run's last start wrote them."""
    heartbeat: dict[str, Any] = field(default_factory=dict)
    """The run's status, step and time, as it last wrote them; empty if it never did."""
    results: tuple[Measured, ...] = ()
    """The accuracies of every result below the run."""
    notes: tuple[str, ...] = ()
    """What these results say about the model, each with its source."""
    picture: Path | None = None
    """The latest picture of predictions."""

    @property
    def images_per_s(self) -> float | None:
        """Median over the logged steps."""
        _, rates = _series(self.train, "images_per_s")
        return statistics.median(rates) if rates else None

    @property
    def final_loss(self) -> tuple[float, int] | None:
        """The last logged training loss that is a number, and its step."""
        steps, losses = _series(self.train, "loss")
        return (losses[-1], steps[-1]) if losses else None

    @property
    def final_val_loss(self) -> tuple[float, int] | None:
        """The last validation loss that is a number, and its step."""
        steps, losses = _series(self.val, "val_loss")
        return (losses[-1], steps[-1]) if losses else None

    @property
    def knn(self) -> dict[str, tuple[float, int]]:
        """The latest of the monitored kNN accuracies by name ("knn/top1"), each with its step."""
        return {
            name: (value, line["step"])
            for line in self.monitor
            for name, value in line.items()
            if name.startswith("knn/") and _is_number(value)
        }

    @property
    def best_knn(self) -> tuple[float, int] | None:
        """The best of the monitored kNN accuracies, and its step."""
        steps, values = _series(self.monitor, "knn/top1")
        return max(zip(values, steps, strict=True), default=None)


# -------------------------------------------------------------------------------- reading


def read_run(run_dir: Path) -> RunSummary:
    """Read a run directory's files; raises `ValueError` on a directory that is no run or a damaged file."""
    if not (run_dir / "config.yaml").is_file():
        why = "is not a run: it has no config.yaml" if run_dir.is_dir() else "does not exist"
        raise UsageError(f"{run_dir} {why}; give the directory that `nextblock pretrain --out` wrote")
    metrics, lines = run_dir / "metrics.jsonl", []
    text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.is_file() else ""
    # A last line without newline is being written.
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"line {number} of {metrics} is not JSON ({error.msg}); remove that line"
            ) from error
    starts = _read_json(run_dir / "environment.json") or [{}]
    files = [path for verb in VERBS for path in sorted(run_dir.rglob(f"{verb}.json"))]
    results = {path: _read_json(path) for path in files}
    # The newest that was asked for, else the monitor's of the highest step.
    asked = sorted(run_dir.glob("predict*/predictions.png"), key=lambda path: (path.stat().st_mtime_ns, path))
    pictures = [*sorted((run_dir / "pictures").glob("step_*.png")), *asked]
    return RunSummary(
        run_dir=run_dir,
        train=tuple(line for line in lines if line.get("kind") == "train"),
        val=tuple(line for line in lines if line.get("kind") == "val"),
        monitor=tuple(line for line in lines if line.get("kind") == "monitor"),
        baselines=_read_json(run_dir / "baselines.json"),
        environment=starts[-1],
        heartbeat=_read_json(run_dir / "heartbeat.json"),
        results=tuple(one for path, values in results.items() for one in _measured(path, values)),
        notes=tuple(
            f"{values['verb']}: {note}"
            for values in results.values()
            for note in values.get("notes", ())
            if "not clearly better" in note
        ),
        picture=pictures[-1] if pictures else None,
    )


def _read_json(path: Path) -> Any:
    """The content of a JSON file; an empty object if there is no file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path} is not JSON ({error.msg}, line {error.lineno}); remove it or write it again"
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that hold a finite number under `name`."""
    kept = [line for line in lines if _is_number(line.get(name))]
    return [line["step"] for line in kept], [line[name] for line in kept]


def _measured(path: Path, values: dict[str, Any]) -> Iterator[Measured]:
    """The accuracies in a result; of kNN those of the setting that was fixed beforehand."""
    try:
        verb, sources = values["verb"], values["sources"]
        held_out = "each by the others" if verb == "knn" else "held out"
        on = sources["test"]["spec"] if "test" in sources else f"{sources['train']['spec']}, {held_out}"
        for row in values["rows"]:
            method = row.get("head") or verb
            if verb == "fewshot":
                method = row["shots"] + (" of the labels" if "%" in row["shots"] else " labels a class")
            elif verb == "knn":
                if not row["is_default"]:
                    continue
                method = f"kNN, k {row['k']}"
            yield Measured(method, on, row["encoder"], float(row["top1"]), row.get("top1_se"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of an older release ({error!r}); measure again") from error


# -------------------------------------------------------------------------------- what is said


def _table(summary: RunSummary) -> Table:
    """A line for each method and images, encoders across; top-1 in percent with its standard error."""

    def show(one: Measured | None, _: Row) -> str:
        return "-" if one is None else percent(one.top1, one._asdict(), "top1")

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for one in summary.results:  # the last of each counts
        rows.setdefault(one[:2], {"method": one.method, "on": one.on})[one.encoder] = one
    encoders = dict.fromkeys(one.encoder for one in summary.results)
    columns = [Column("method", "top-1 %"), Column("on", "measured on")]
    return Table(list(rows.values()), [*columns, *(Column(name, name, show) for name in encoders)])


def _facts(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What else is known, as (name, value); what is missing is said with the command that makes it."""
    run, rate, loss = summary.run_dir, summary.images_per_s, summary.final_loss
    if not summary.results:
        how = f"nextblock eval --model {run} --train TRAIN --test TEST --out {run / 'eval'}"
        yield "accuracy", f"none yet: {how}"
    device = f" on {summary.environment['device']}" if "device" in summary.environment else ""
    speed = None if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    yield "speed", "not logged yet" if speed is None else f"{speed} images/s{device}"
    words = [f"{BASELINE_WORDS.get(name, name)} {value:.4f}" for name, value in summary.baselines.items()]
    beside = f"without a model: {', '.join(words)}" if words else "its baselines were not measured"
    yield (
        "training loss",
        "not logged yet" if loss is None else "{:.4f} at step {:,} ({})".format(*loss, beside),
    )
    if summary.final_val_loss is not None:
        yield "validation loss", "{:.4f} at step {:,}".format(*summary.final_val_loss)
    for name, (value, step) in summary.knn.items():
        yield name.replace("/", " "), f"{value:.1%} at step {step:,}"
    hint = f"none yet: nextblock predict --model {run} --data SOURCE --out {run / 'predict'}"
    yield "picture", str(summary.picture or hint)


def report_table(summary: RunSummary) -> Group:
    """The report for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    table = _table(summary).rich()
    table.box = None
    # A long source folds; the numbers of all encoders stay in sight.
    for column in table.columns[1:2]:
        column.no_wrap, column.overflow = False, "fold"
    facts = RichTable(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(summary):
        facts.add_row(Text(name), Text(value))
    notes = [part for note in summary.notes for part in ("", Text(note, style="italic"))]
    title = Text(f"Report of {summary.run_dir}", style="bold")
    return Group(title, *((table, "") if summary.results else ()), facts, *notes)


def report_markdown(summary: RunSummary) -> str:
    """The same as Markdown."""
    table = f"{_table(summary).markdown()}\n" if summary.results else ""
    facts = "".join(f"- {name}: {value}\n" for name, value in _facts(summary))
    return f"# Report of {summary.run_dir}\n\n{table}{facts}" + "".join(
        f"\n{note}\n" for note in summary.notes
    )


def report_values(summary: RunSummary) -> dict[str, Any]:
    """The same for programs, ready for JSON: accuracies are shares of 1, null is what is not known."""
    loss, step = summary.final_loss or (None, None)
    val_loss, val_step = summary.final_val_loss or (None, None)
    return {
        "run": str(summary.run_dir),
        "results": [one._asdict() for one in summary.results],
        "notes": list(summary.notes),
        "final_loss": loss,
        "final_step": step,
        "baselines": summary.baselines,
        "val_loss": val_loss,
        "val_step": val_step,
        "images_per_s": summary.images_per_s,
        "knn": {name.removeprefix("knn/"): value for name, (value, _) in summary.knn.items()},
        "picture": str(summary.picture) if summary.picture else None,
    }


# -------------------------------------------------------------------------------- the loss curve


def plot_losses(summary: RunSummary, path: Path) -> None:
    """Draw the losses by step, those that need no model as horizontal lines, and the learning rate below."""
    from matplotlib.figure import Figure

    from nextblock.visualize.figure import MUTED, save_png

    if not summary.train:
        raise UsageError(
            f"{summary.run_dir / 'metrics.jsonl'} holds no training step yet; train before drawing"
        )
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, values = _series(summary.train, "loss")
    line, label = {"color": "#0969da", "linewidth": 1.6}, "training"
    if len(values) > 100:
        losses.plot(steps, values, **{**line, "linewidth": 0.7}, alpha=0.3)
        # A running mean over the last fiftieth of the curve, at least ten values.
        window, sums = max(10, len(values) // 50), [0.0, *accumulate(values)]
        starts = [max(0, end - window) for end in range(1, len(sums))]
        values = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
        label = "training (smoothed)"
    losses.plot(steps, values, **line, label=label)
    if summary.val:
        line = {"color": "#bc4c00", "linewidth": 1.6, "marker": "o", "markersize": 3}
        losses.plot(*_series(summary.val, "val_loss"), **line, label="validation")
    for name, value in summary.baselines.items():
        # Two lines may lie close together: their words stand at different places.
        is_plain = name in ("zero", "uniform", "chance")
        style, x, side = ("--", 1.0, "right") if is_plain else (":", 0.5, "center")
        losses.axhline(value, color=MUTED, linewidth=1.1, linestyle=style)
        losses.annotate(
            f"{BASELINE_WORDS.get(name, name)}: {value:.3f}",
            (x, value),
            xytext=(0, 2),
            xycoords=losses.get_yaxis_transform(),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=MUTED,
        )
    losses.margins(y=0.08)
    losses.set_ylabel("loss")
    losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    rates.plot(*_series(summary.train, "lr"), color=MUTED, linewidth=1.2)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("lr")
    rates.set_xlabel("step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    rates.yaxis.get_offset_text().set_size(8)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    name = summary.run_dir.name or str(summary.run_dir)
    losses.set_title(f"Loss of {name}", loc="left", fontsize=11, parse_math=False)
    save_png(figure, path, dpis=(160,))
