"""A run's report as text: on the terminal, in Markdown with the loss curve, as values for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nextblock.errors import UsageError
from nextblock.logs import printable
from nextblock.logs import quote as typed_word
from nextblock.report.read import Measured, RunSummary, is_number, thinned
from nextblock.tables import Column, Row, Table, escape_markdown, percent
from nextblock.visualize.words import BASELINE_WORDS

if TYPE_CHECKING:
    from rich.console import Group

LONG_SOURCE = 20
"""Letters from which a source that all results have is named below the table of the terminal."""


def distinguished(*runs: Sequence[Measured]) -> list[list[Measured]]:
    """Drop the labels if all results have the same, and the file if something else differs."""
    differ = len({one.labels for run in runs for one in run} - {None}) > 1
    kept = [[one if differ else one._replace(labels=None) for one in run] for run in runs]

    def about(one: Measured) -> tuple[str, str, str | None]:
        return one.method, one.on, one.labels

    files = [Counter(key for key, _ in {(about(one), one.file) for one in run}) for run in kept]
    # Only results that look the same otherwise need their file named.
    shared = {key for counts in files for key, count in counts.items() if count > 1}
    return [[one if about(one) in shared else one._replace(file="") for one in run] for run in kept]


def results_table(results: Sequence[Measured]) -> Table:
    """A row per method and result, a column per encoder: top-1 in percent with its standard error."""

    def show(one: Measured | None, _: Row) -> str:
        return "-" if one is None else percent(one.top1, one._asdict(), "top1")

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in distinguished(results)[0]:
        own: dict[str, Any] = {"method": one.method, "on": one.on, "labels": one.labels, "file": one.file}
        rows.setdefault(tuple(own.values()), own)[one.encoder] = one
    encoders = dict.fromkeys(one.encoder for one in results)
    columns = [Column("method", "top-1 %"), Column("on", "measured on")]
    columns += [Column("labels", "labels from"), Column("file", "result")]
    return Table(list(rows.values()), [*columns, *(Column(name, name, show) for name in encoders)])


# ------------------------------------------------------------------------------------------------- commands


def command(words: str, run: Path) -> str:
    """A command with the run in place of {}; the reader fills in words in capitals."""
    return " ".join(["nextblock", *(typed_word(word.format(run)) for word in words.split())])


def how_to_measure(summary: RunSummary) -> str:
    """The command that measures accuracies."""
    train = "" if summary.is_tuned else "--train TRAIN "
    return command(f"eval --model {{}} {train}--test TEST --out {{}}/eval", summary.run_dir)


def how_to_draw(summary: RunSummary) -> str:
    """The command that draws predictions."""
    return command("predict --model {} --data SOURCE --out {}/predict", summary.run_dir)


def next_commands(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What to do next, as (purpose, command)."""
    run, status = summary.run_dir, summary.status.word
    if summary.is_tuned:
        if status != "finished":
            yield "Resume: the same command again", command("finetune --model RUN ... --out {}", run)
        yield "Classify images", command("classify --model {} --data IMAGES", run)
        yield "Measure it on other images", how_to_measure(summary)
        return
    if status not in ("finished", "running"):
        yield "Resume", command("pretrain --out {}", run)
    specs = summary.settings.get("data.train") or "DIR"
    specs = [specs] if isinstance(specs, str) else specs
    sources = "".join(f" --data.train {typed_word(spec)}" for spec in specs)
    yield "Train on from its weights", command("pretrain --model.init {}", run) + f"{sources} --out NEW_RUN"
    yield "Measure it", how_to_measure(summary)
    yield "Draw predictions", how_to_draw(summary)
    yield "Fine-tune it", command("finetune --model {} --train TRAIN --test TEST --out {}/finetuned", run)
    yield "Use the encoder elsewhere", command("convert {} {}/timm --to timm", run)
    yield "Compare it with other runs", command("report {} OTHER_RUN", run)


def missing(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What the run has not logged, as (sentence, command that would log it)."""
    flags = {
        "validation loss": "--data.val DIR2",
        "RankMe": "--monitor.knn_every 5ep",
        "kNN accuracy": "--monitor.knn_every 5ep --monitor.knn_train LABELLED --monitor.knn_val LABELLED2",
        "pictures": "--monitor.pictures_every 5ep",
    }
    logged = [summary.series(name)[0] for name in ("val_loss", "rankme", "knn/top1")]
    for (what, flag), is_there in zip(flags.items(), (*logged, summary.pictures), strict=True):
        if not is_there and not summary.is_tuned:
            yield f"No {what} by step.", f"nextblock pretrain --data.train DIR --out NEW_RUN {flag}"


# -------------------------------------------------------------------------------------------------- a report


def baseline_words(name: str) -> str:
    """What a reference loss is called."""
    return BASELINE_WORDS.get(name, name)


def facts(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What is known besides accuracies, as (name, value); what is missing, with the command for it."""
    status, loss, val_loss, knn = summary.status, *map(summary.last, ("loss", "val_loss", "knn/top1"))
    if status.word != "finished":
        yield "status", ": ".join(filter(None, (status.word, status.message)))
    if not summary.results:
        yield "accuracy", f"none yet: {how_to_measure(summary)}"
    rate, speed = summary.images_per_s, "not logged yet"
    if rate is not None:
        device = f" on {summary.environment['device']}" if "device" in summary.environment else ""
        speed = f"{rate:,.0f} images/s{device}" if rate >= 10 else f"{rate:.2g} images/s{device}"
    yield "speed", speed
    references = ", ".join(f"{baseline_words(name)} {value:.4f}" for name, value in summary.baselines.items())
    references = f"without a model: {references}" if references else "its baselines were not measured"
    if loss is not None:
        yield "training loss", "{:.4f} at step {:,} ({})".format(*loss, references)
    else:
        yield "training loss", "NaN" if summary.train else "not logged yet"
    if val_loss is not None:
        yield "validation loss", "{:.4f} at step {:,}".format(*val_loss)
    if knn is not None:
        yield "knn top1", "{:.1%} at step {:,} on {}".format(*knn, summary.monitored[0].on)
    if not summary.is_tuned:
        here, picture = Path.cwd(), summary.picture
        if picture is not None and picture.is_relative_to(here):
            picture = picture.relative_to(here)
        yield "picture", str(picture or f"none yet: {how_to_draw(summary)}")


def gaps(summary: RunSummary) -> Iterator[str]:
    """Sentences on logged losses that are NaN or infinite, which no curve shows."""
    for what, lines, name in (("loss", summary.train, "loss"), ("validation loss", summary.val, "val_loss")):
        steps = [f"{line['step']:,}" for line in lines if name in line and not is_number(line[name])]
        if steps:
            more = ", ..." if len(steps) > 5 else ""
            yield f"NaN or infinite {what} at step {', '.join(steps[:5])}{more}."


def warnings(summary: RunSummary) -> list[str]:
    """The notes of results, and gaps in the losses."""
    return [*summary.notes, *gaps(summary)]


def report_table(summary: RunSummary) -> Group:
    """The report for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = results_table(summary.results)
    places = {one.on for one in summary.results}
    below = None
    if len(places) == 1 and len(place := places.pop()) > LONG_SOURCE:
        below, shown = place, shown._replace(columns=[one for one in shown.columns if one.key != "on"])
    table = shown.rich()
    table.box = None
    # A long source folds, so that the numbers of all encoders stay visible.
    for column in table.columns[1 : -len({one.encoder for one in summary.results})]:
        column.no_wrap, column.overflow = False, "fold"
    grid = RichTable(box=None, pad_edge=False, show_header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in [*([("measured on", below)] if below else []), *facts(summary)]:
        grid.add_row(Text(name), Text(value))
    notes = [part for note in warnings(summary) for part in ("", Text(note, style="italic"))]
    title = Text(f"Report of {summary.run_dir}", style="bold")
    return Group(title, *((table, "") if summary.results else ()), grid, *notes)


def report_markdown(summary: RunSummary, *, losses: Path | None = None) -> str:
    """The report in Markdown with its pictures: the loss curve, if given, and the latest predictions."""
    parts = [f"# Report of {escape_markdown(str(summary.run_dir))}\n\n"]
    parts += [f"{results_table(summary.results).markdown()}\n"] if summary.results else []
    parts += [f"- {name}: {escape_markdown(value)}\n" for name, value in facts(summary)]
    parts += [f"\n{escape_markdown(note)}\n" for note in warnings(summary)]
    for title, path in {"Loss by step": losses, "Predictions": summary.picture}.items():
        if path is not None:
            place = quote(os.path.relpath(path, summary.run_dir), errors="surrogateescape")
            parts.append(f"\n![{title}]({place})\n")
    return "\n".join(map(printable, "".join(parts).split("\n")))


def report_values(summary: RunSummary) -> dict[str, Any]:
    """The report for programs, ready for JSON: accuracies are shares of 1, null is unknown."""
    loss, step = summary.last("loss") or (None, None)
    val_loss, val_step = summary.last("val_loss") or (None, None)
    knn = summary.last("knn/top1")
    return {
        "run": str(summary.run_dir),
        "status": summary.status.word,
        "message": summary.status.message,
        "results": [one._asdict() for one in summary.results],
        "notes": warnings(summary),
        "final_loss": loss,
        "final_step": step,
        "baselines": summary.baselines,
        "val_loss": val_loss,
        "val_step": val_step,
        "images_per_s": summary.images_per_s,
        "knn": {"top1": knn[0]} if knn else {},
        "picture": str(summary.picture) if summary.picture else None,
    }


def plot_losses(summary: RunSummary, path: Path) -> None:
    """Draw a PNG of the losses by step with their references as horizontal lines, and the learning rate."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from nextblock.visualize.figure import MUTED, save_png

    if not summary.train:
        raise UsageError(f"{summary.training_dir / 'metrics.jsonl'} has no training step yet")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for name, label, colour in (("loss", "training", "#0969da"), ("val_loss", "validation", "#bc4c00")):
        line = thinned(*summary.series(name))
        if line["x"]:
            marker = "o" if name == "val_loss" or len(line["x"]) == 1 else ""  # a point makes no line
            losses.plot(line["x"], line["y"], color=colour, marker=marker, markersize=3, label=label)
        if "low" in line:
            losses.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)
    for name, value in summary.baselines.items():
        # Two lines may be close together, so their labels are at different places.
        is_plain = name in ("zero", "uniform", "chance")
        dashes, x, side = ("--", 1.0, "right") if is_plain else (":", 0.5, "center")
        losses.axhline(value, color=MUTED, linewidth=1.1, linestyle=dashes)
        place, at = (x, value), losses.get_yaxis_transform()
        words, style = f"{baseline_words(name)}: {value:.3f}", {"ha": side, "va": "bottom", "fontsize": 8}
        losses.annotate(words, place, (0, 2), at, "offset points", color=MUTED, **style)
    losses.margins(y=0.08)
    losses.set_ylabel("loss")
    losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    steps, values = summary.series("lr")
    rates.plot(steps, values, color=MUTED, linewidth=1.2, marker="" if steps[1:] else "o", markersize=3)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    rates.set_ylim(bottom=0)
    rates.set_ylabel("lr")
    rates.set_xlabel("step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    rates.yaxis.get_offset_text().set_size(8)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    losses.set_title(f"Loss of {printable(summary.name)}", loc="left", fontsize=11, parse_math=False)
    save_png(figure, path, dpis=(160,))
