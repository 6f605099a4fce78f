"""What a report says of a run: on the terminal, in Markdown, for programs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nextblock.logs import counted, printable
from nextblock.logs import quote as typed_word
from nextblock.report.read import Measured, RunSummary, is_number
from nextblock.tables import Column, Row, Table, escape_markdown, percent
from nextblock.visualize.words import BASELINE_WORDS

if TYPE_CHECKING:
    from rich.console import Group


def told_apart(*runs: Sequence[Measured]) -> list[list[Measured]]:
    """The results of each run with the labels only if they differ, the file only if nothing else does."""
    differ = len({one.labels for run in runs for one in run} - {None}) > 1
    kept = [[one if differ else one._replace(labels=None) for one in run] for run in runs]

    def about(one: Measured) -> tuple[str, str, str | None]:
        return one.method, one.on, one.labels

    files = [Counter(key for key, _ in {(about(one), one.file) for one in run}) for run in kept]
    shared = {key for found in files for key, count in found.items() if count > 1}
    return [[one if about(one) in shared else one._replace(file="") for one in run] for run in kept]


def results_table(results: Sequence[Measured]) -> Table:
    """A line for each method of each result, encoders across; top-1 in percent with its standard error."""

    def show(one: Measured | None, _: Row) -> str:
        return "-" if one is None else percent(one.top1, one._asdict(), "top1")

    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in told_apart(results)[0]:
        own: dict[str, Any] = {"method": one.method, "on": one.on, "labels": one.labels, "file": one.file}
        rows.setdefault(tuple(own.values()), own)[one.encoder] = one
    encoders = dict.fromkeys(one.encoder for one in results)
    columns = [Column("method", "top-1 %"), Column("on", "measured on")]
    columns += [Column("labels", "labels from"), Column("file", "result")]
    return Table(list(rows.values()), [*columns, *(Column(name, name, show) for name in encoders)])


def command(words: str, run: Path) -> str:
    """A command as one types it, with the run in place of {}; words in capitals are to be filled in."""
    return " ".join(["nextblock", *(typed_word(word.format(run)) for word in words.split())])


def how_to_measure(summary: RunSummary) -> str:
    """The command that makes accuracies."""
    train = "" if summary.is_tuned else "--train TRAIN "
    return command(f"eval --model {{}} {train}--test TEST --out {{}}/eval", summary.run_dir)


def how_to_draw(summary: RunSummary) -> str:
    """The command that draws predictions."""
    return command("predict --model {} --data SOURCE --out {}/predict", summary.run_dir)


def facts(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What else is known, as (name, value); what is missing is said with the command that makes it."""
    rate, loss, status = summary.images_per_s, summary.final_loss, summary.status
    if status.word != "finished":
        yield "status", ": ".join(filter(None, (status.word, status.message)))
    if not summary.results:
        yield "accuracy", f"none yet: {how_to_measure(summary)}"
    device = f" on {summary.environment['device']}" if "device" in summary.environment else ""
    speed = None if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
    yield "speed", "not logged yet" if speed is None else f"{speed} images/s{device}"
    words = [f"{BASELINE_WORDS.get(name, name)} {value:.4f}" for name, value in summary.baselines.items()]
    beside = f"without a model: {', '.join(words)}" if words else "its baselines were not measured"
    last = "not a number" if summary.train else "not logged yet"
    yield "training loss", "{:.4f} at step {:,} ({})".format(*loss, beside) if loss else last
    if summary.final_val_loss is not None:
        yield "validation loss", "{:.4f} at step {:,}".format(*summary.final_val_loss)
    if summary.final_knn is not None:
        yield "knn top1", "{:.1%} at step {:,} on {}".format(*summary.final_knn, summary.monitored[0].on)
    if not summary.is_tuned:  # a classifier predicts no blocks
        here, picture = Path.cwd(), summary.picture
        if picture is not None and picture.is_relative_to(here):
            picture = picture.relative_to(here)
        yield "picture", str(picture or f"none yet: {how_to_draw(summary)}")


def not_numbers(summary: RunSummary) -> Iterator[str]:
    """A sentence on logged losses that are NaN or infinite, if there are any: no curve shows them."""
    for kind, lines, name in (("", summary.train, "loss"), ("validation ", summary.val, "val_loss")):
        steps = [f"{line['step']:,}" for line in lines if name in line and not is_number(line[name])]
        if steps:
            what = counted(len(steps), f"logged {kind}loss", f"logged {kind}losses")
            are = "is not a number: step" if len(steps) == 1 else "are not numbers: steps"
            yield f"{what} {are} {', '.join(steps[:5])}{', ...' if len(steps) > 5 else ''}."


def report_table(summary: RunSummary) -> Group:
    """The report for a terminal: print it with a `rich.console.Console`."""
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    table = results_table(summary.results).rich()
    table.box = None
    # A long source folds; the numbers of all encoders stay in sight.
    for column in table.columns[1 : -len({one.encoder for one in summary.results})]:
        column.no_wrap, column.overflow = False, "fold"
    grid = RichTable(box=None, pad_edge=False, show_header=False)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts(summary):
        grid.add_row(Text(name), Text(value))
    said = (*summary.notes, *not_numbers(summary))
    notes = [part for note in said for part in ("", Text(note, style="italic"))]
    title = Text(f"Report of {summary.run_dir}", style="bold")
    return Group(title, *((table, "") if summary.results else ()), grid, *notes)


def report_markdown(summary: RunSummary, *, losses: Path | None = None) -> str:
    """The same as Markdown with its pictures: the loss curve, if it was drawn, and the latest predictions."""
    parts = [f"# Report of {escape_markdown(str(summary.run_dir))}\n\n"]
    parts += [f"{results_table(summary.results).markdown()}\n"] if summary.results else []
    parts += [f"- {name}: {escape_markdown(value)}\n" for name, value in facts(summary)]
    parts += [f"\n{escape_markdown(note)}\n" for note in (*summary.notes, *not_numbers(summary))]
    for title, path in {"Loss by step": losses, "Predictions": summary.picture}.items():
        if path is not None:
            place = quote(os.path.relpath(path, summary.run_dir), errors="surrogateescape")
            parts.append(f"\n![{title}]({place})\n")
    return "\n".join(map(printable, "".join(parts).split("\n")))


def report_values(summary: RunSummary) -> dict[str, Any]:
    """The same for programs, ready for JSON: accuracies are shares of 1, null is what is not known."""
    loss, step = summary.final_loss or (None, None)
    val_loss, val_step = summary.final_val_loss or (None, None)
    return {
        "run": str(summary.run_dir),
        "status": summary.status.word,
        "message": summary.status.message,
        "results": [one._asdict() for one in summary.results],
        "notes": [*summary.notes, *not_numbers(summary)],
        "final_loss": loss,
        "final_step": step,
        "baselines": summary.baselines,
        "val_loss": val_loss,
        "val_step": val_step,
        "images_per_s": summary.images_per_s,
        "knn": {"top1": summary.final_knn[0]} if summary.final_knn else {},
        "picture": str(summary.picture) if summary.picture else None,
    }


def commands(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What to do next, as (why, command)."""
    run, status = summary.run_dir, summary.status.word
    if summary.is_tuned:
        if status != "finished":
            yield "Resume: the same command again", command("finetune --model RUN ... --out {}", run)
        yield "Name the classes of images", command("classify --model {} --data IMAGES", run)
        yield "Measure it on other images", how_to_measure(summary)
        return
    if status not in ("finished", "running"):
        yield "Resume", command("pretrain --out {}", run)
    specs = summary.settings.get("data.train") or "DIR"
    sources = "".join(
        f" --data.train {typed_word(spec)}" for spec in ([specs] if isinstance(specs, str) else specs)
    )
    yield "Train on from its weights", command("pretrain --model.init {}", run) + f"{sources} --out NEW_RUN"
    yield "Measure it", how_to_measure(summary)
    yield "Draw predictions", how_to_draw(summary)
    yield "Fine-tune it", command("finetune --model {} --train TRAIN --test TEST --out {}/finetuned", run)
    yield "Take the encoder elsewhere", command("convert {} {}/timm --to timm", run)
    yield "Compare it with other runs", command("report {} OTHER_RUN", run)


def missing(summary: RunSummary) -> Iterator[tuple[str, str]]:
    """What a page cannot show of this run: a sentence, and the command that would make it."""
    if summary.is_tuned:
        return
    new = "nextblock pretrain --data.train DIR --out NEW_RUN"
    if summary.final_val_loss is None:
        needs = "is measured every epoch" if summary.settings.get("data.val") else "needs validation images"
        yield f"No validation loss yet: it {needs}.", f"{new} --data.val DIR2 --monitor.val_every 1ep"
    if not summary.series("rankme")[0]:
        yield "No RankMe and no kNN accuracy by step.", f"{new} --monitor.knn_every 5ep"
    elif summary.final_knn is None:
        labelled = "--monitor.knn_train LABELLED --monitor.knn_val LABELLED2"
        yield "No kNN accuracy by step: it needs labelled images.", f"{new} {labelled}"
    if not summary.pictures:
        yield "No pictures by step.", f"{new} --monitor.pictures_every 5ep"
