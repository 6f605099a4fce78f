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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nextblock.errors import UsageError
from nextblock.visualize.words import BASELINE_WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Group

__all__ = [
    "Measured",
    "RunSummary",
    "plot_losses",
    "read_run",
    "report_markdown",
    "report_table",
    "report_values",
]

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
    """Versions and hardware, as the run wrote them."""
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
        rates = [line["images_per_s"] for line in self.train if _is_number(line.get("images_per_s"))]
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
    lines = _read_lines(run_dir / "metrics.jsonl")
    files = [path for verb in VERBS for path in sorted(run_dir.rglob(f"{verb}.json"))]
    results = {path: _read_json(path) for path in files}
    return RunSummary(
        run_dir=run_dir,
        train=tuple(line for line in lines if line.get("kind") == "train"),
        val=tuple(line for line in lines if line.get("kind") == "val"),
        monitor=tuple(line for line in lines if line.get("kind") == "monitor"),
        baselines=_read_json(run_dir / "baselines.json"),
        environment=_last_start(run_dir / "environment.json"),
        heartbeat=_read_json(run_dir / "heartbeat.json"),
        results=tuple(one for path, values in results.items() for one in _measured(path, values)),
        notes=tuple(note for values in results.values() for note in _verdicts(values)),
        picture=_newest(run_dir.glob("predict*/predictions.png")) or _last_picture(run_dir),
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, none without a file; a last one without newline is being written."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"line {number} of {path} is not JSON ({error.msg}); remove that line"
            ) from error
    return lines


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


def _last_start(path: Path) -> dict[str, Any]:
    """What the run's last start wrote of its machine; empty if nothing did."""
    starts = _read_json(path)
    return starts[-1] if isinstance(starts, list) and starts else {}


def _newest(paths: Any) -> Path | None:
    return max(paths, key=lambda path: (path.stat().st_mtime_ns, str(path)), default=None)


def _last_picture(run_dir: Path) -> Path | None:
    """The monitor's picture of the highest step."""
    return max((run_dir / "pictures").glob("step_*.png"), default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _measured(path: Path, values: dict[str, Any]) -> Iterator[Measured]:
    """The accuracies in a result; of kNN those of the setting that was fixed beforehand."""
    try:
        on = _images(values)
        for row in values["rows"]:
            method = row.get("head") or values["verb"]
            if values["verb"] == "fewshot":
                method = row["shots"] + (" of the labels" if "%" in row["shots"] else " labels a class")
            elif values["verb"] == "knn":
                if not row["is_default"]:
                    continue
                method = f"kNN, k {row['k']}"
            yield Measured(method, on, row["encoder"], float(row["top1"]), row.get("top1_se"))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged or of an older release ({error!r}); measure again") from error


def _images(values: dict[str, Any]) -> str:
    """What a result was measured on."""
    sources = values["sources"]
    if "test" in sources:
        return sources["test"]["spec"]
    return f"{sources['train']['spec']}, " + ("each by the others" if values["verb"] == "knn" else "held out")


def _verdicts(values: dict[str, Any]) -> list[str]:
    """What a result says of a model that does not beat its baselines."""
    return [f"{values['verb']}: {note}" for note in values.get("notes", ()) if "not clearly better" in note]


# -------------------------------------------------------------------------------- what is said


def _table(summary: RunSummary) -> tuple[list[str], list[list[str]]]:
    """A line for each method and images, encoders across; top-1 in percent with its standard error."""
    encoders = list(dict.fromkeys(one.encoder for one in summary.results))
    found = {(one.method, one.on, one.encoder): one for one in summary.results}  # the last of each counts
    rows = []
    for method, on in dict.fromkeys((one.method, one.on) for one in summary.results):
        cells = [found.get((method, on, encoder)) for encoder in encoders]
        rows.append([method, on, *("-" if one is None else _percent(one) for one in cells)])
    return ["top-1 %", "measured on", *encoders], rows


def _percent(one: Measured) -> str:
    return f"{100 * one.top1:.1f}" + ("" if one.top1_se is None else f" ± {100 * one.top1_se:.1f}")


def _facts(summary: RunSummary) -> list[tuple[str, str]]:
    """What else is known, as (name, value); what is missing is said with the command that makes it."""
    run = summary.run_dir
    facts = []
    if not summary.results:
        how = f"nextblock eval --model {run} --train TRAIN --test TEST --out {run / 'eval'}"
        facts.append(("accuracy", f"none yet: {how}"))
    facts.append(("speed", _speed(summary)))
    facts.append(("training loss", _loss(summary)))
    if summary.final_val_loss is not None:
        facts.append(("validation loss", "{:.4f} at step {:,}".format(*summary.final_val_loss)))
    facts.extend(
        (name.replace("/", " "), f"{value:.1%} at step {step:,}")
        for name, (value, step) in summary.knn.items()
    )
    picture = str(summary.picture) if summary.picture else None
    hint = f"none yet: nextblock predict --model {run} --data SOURCE --out {run / 'predict'}"
    facts.append(("picture", picture or hint))
    return facts


def _speed(summary: RunSummary) -> str:
    rate = summary.images_per_s
    if rate is None:
        return "not logged yet"
    device = f" on {summary.environment['device']}" if "device" in summary.environment else ""
    return (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}") + f" images/s{device}"


def _loss(summary: RunSummary) -> str:
    if summary.final_loss is None:
        return "not logged yet"
    words = "{:.4f} at step {:,}".format(*summary.final_loss)
    if not summary.baselines:
        return f"{words} (its baselines were not measured)"
    return f"{words} (without a model: {_baseline_words(summary)})"


def _baseline_words(summary: RunSummary) -> str:
    return ", ".join(
        f"{BASELINE_WORDS.get(name, name)} {value:.4f}" for name, value in summary.baselines.items()
    )


def report_table(summary: RunSummary) -> Group:
    """The report for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"Report of {summary.run_dir}", style="bold")]
    if summary.results:
        header, rows = _table(summary)
        probes = Table(box=None, pad_edge=False)
        for column, name in enumerate(header):
            probes.add_column(Text(name), justify="left" if column < 2 else "right", overflow="fold")
        for row in rows:
            probes.add_row(*(Text(cell) for cell in row))
        parts += ["", probes]
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(summary):
        facts.add_row(Text(name), Text(value))
    parts += ["", facts]
    for note in summary.notes:
        parts += ["", Text(note, style="italic")]
    return Group(*parts)


def report_markdown(summary: RunSummary) -> str:
    """The same as Markdown."""
    lines = [f"# Report of {summary.run_dir}", ""]
    if summary.results:
        header, rows = _table(summary)
        lines += [
            _row(header),
            _row(["---", "---"] + ["---:"] * (len(header) - 2)),
            *(_row(row) for row in rows),
            "",
        ]
    lines += [f"- {name}: {value}" for name, value in _facts(summary)]
    for note in summary.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


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


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


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
    _draw_losses(losses, summary)
    steps, lr = _series(summary.train, "lr")
    rates.plot(steps, lr, color=MUTED, linewidth=1.2)
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


def _draw_losses(axes: Axes, summary: RunSummary) -> None:
    steps, losses = _series(summary.train, "loss")
    if len(losses) > 100:
        axes.plot(steps, losses, color="#0969da", linewidth=0.7, alpha=0.3)
        axes.plot(steps, _smoothed(losses), color="#0969da", linewidth=1.6, label="training (smoothed)")
    else:
        axes.plot(steps, losses, color="#0969da", linewidth=1.6, label="training")
    if summary.val:
        steps, losses = _series(summary.val, "val_loss")
        axes.plot(steps, losses, color="#bc4c00", linewidth=1.6, marker="o", markersize=3, label="validation")
    for name, value in summary.baselines.items():
        style, x, side = ("--", 1.0, "right") if name in ("zero", "uniform") else (":", 0.5, "center")
        axes.axhline(value, color="#656d76", linewidth=1.1, linestyle=style)
        words = f"{BASELINE_WORDS.get(name, name)}: {value:.3f}"
        axes.annotate(
            words,
            (x, value),
            xytext=(0, 2),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color="#656d76",
        )
    axes.margins(y=0.08)
    axes.set_ylabel("loss")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)


def _series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the lines that hold a finite number under `name`."""
    kept = [line for line in lines if _is_number(line.get(name))]
    return [line["step"] for line in kept], [line[name] for line in kept]


def _smoothed(values: Sequence[float]) -> list[float]:
    """A running mean over the last fiftieth of the curve, at least ten values."""
    window = max(10, len(values) // 50)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[end] - sums[max(0, end - window)]) / (end - max(0, end - window))
        for end in range(1, len(values) + 1)
    ]
