"""The report of a run as one HTML file that needs no network. Its script draws charts from JSON in the page.

`page_values` is that JSON, and `run_sections` the text. Names come from a run's files, so all are escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from nextblock.logs import counted, printable
from nextblock.logs import quote as typed_word
from nextblock.report.read import RunSummary, thinned
from nextblock.report.words import (
    baseline_words,
    distinguished,
    facts,
    gaps,
    how_to_draw,
    how_to_measure,
    missing,
    next_commands,
    results_table,
)
from nextblock.settings import typed
from nextblock.tables import finite
from nextblock.version import __version__

MAX_PICTURES = 40
MAX_PICTURE_BYTES = 9_000_000
"""Of all pictures by step; base64 takes a third more, so the page stays below 15 MB."""
SHOWN_UNREADABLE = 10

CURVES = {
    "lr": ("Learning rate", "zero"),
    "grad_norm": ("Gradient norm, before clipping",),
    "images_per_s": ("Images per second", "zero"),
    "data_wait": ("Time spent waiting for images", "zero", "share"),
    "memory_gb": ("Peak memory, GB", "zero"),
    "mfu": ("Model-FLOPs utilisation", "zero", "share"),
    "knn/top1": ("kNN accuracy", "share"),
    "top1": ("Accuracy on validation images", "share"),
    "rankme": ("RankMe, effective rank of the features",),
    "target_variance": ("Variance of the targets' directions",),
    "target_rankme": ("RankMe of the targets",),
}
"""What is drawn besides the loss, if it was logged. Shares are in percent; an axis may start at zero."""


# ---------------------------------------------------------------------------------------------------- values


def page_values(summary: RunSummary, *, pictures: bool = True) -> dict[str, Any]:
    """What the page's script draws, ready for JSON: `charts`, and `pictures` as data: URLs if wanted.

    A chart has a title, share (values in percent), series (name, x, y; a thinned one also low and high),
    references (horizontal lines: name, value) and marks (steps at which the run resumed).
    """
    references = [{"name": baseline_words(name), "value": value} for name, value in summary.baselines.items()]
    names = {"Loss": {"training": "loss", "validation": "val_loss"}}
    options: dict[str, dict[str, Any]] = {"Loss": {"wide": True, "references": references}}
    for name, (title, *kinds) in CURVES.items():
        if name == "knn/top1":
            title += "".join(f" {one.where}" for one in distinguished(summary.monitored)[0])
        names[title] = {"": name}
        options[title] = {"share": "share" in kinds, "zero": "zero" in kinds}
    marks, charts = [start["step"] for start in summary.starts if start.get("step")], []
    for title, lines in names.items():
        series = [{"name": line, **thinned(*summary.series(name))} for line, name in lines.items()]
        known = [one for one in series if one["x"]]
        if known:
            charts.append({"title": title, "x": "step", "series": known, "marks": marks, **options[title]})
    paths = _shown_pictures(summary) if pictures else []
    return finite(
        {
            "run": summary.name,
            "status": summary.status.word,
            "step": summary.step,
            "total_steps": summary.heartbeat.get("total_steps"),
            "charts": charts,
            "pictures": [{"step": int(path.stem[5:]), "src": data_url(path)} for path in paths],
        }
    )


def _shown_pictures(summary: RunSummary) -> list[Path]:
    """The pictures by step; if they are too many or too large for a page, evenly spaced ones."""
    paths = summary.pictures
    largest = max((path.stat().st_size for path in paths), default=1)
    most = min(len(paths), MAX_PICTURES, max(2, MAX_PICTURE_BYTES // max(1, largest)))
    return [paths[number] for number in np.linspace(0, len(paths) - 1, most).round().astype(int)]


def data_url(png: Path) -> str:
    """A PNG as a data: URL."""
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"


# ------------------------------------------------------------------------------------------------------ HTML


def text(value: Any) -> str:
    """Text for HTML: markup is escaped, and control characters are written out."""
    return html.escape(printable(str(value)))


def table(about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls sideways; columns of numbers are aligned on the right."""
    cells = [list(row) for row in rows]
    numeric = [all(re.fullmatch(r"[-+]?[0-9][^:]*|-?", row[i]) for row in cells) for i in range(len(head))]

    def line(tag: str, row: Sequence[str]) -> str:
        pairs = zip(row, numeric, strict=True)
        return "".join(f"<{tag}{' class=n' * is_number}>{text(cell)}</{tag}>" for cell, is_number in pairs)

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in cells)
    head_ = f"<thead><tr>{line('th', head)}</tr></thead>"
    return scroll(about, f"<table>{head_}\n<tbody>{body}</tbody></table>")


def scroll(about: str, content: str) -> str:
    """A box that scrolls sideways, also with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{text(about)}">{content}</div>\n'


def section(title: str, *parts: str) -> str:
    """A part of the page below its heading."""
    name = re.sub("[^a-z]+", "-", title.lower())
    return f'<section id="{name}">\n<h2>{text(title)}</h2>\n{"".join(parts)}</section>\n'


def what_to_type(rows: Iterable[tuple[str, str]]) -> str:
    """Sentences, each with its command, if there is one."""
    return "".join(
        f"<p>{text(why)}</p>\n" + (f"<pre><code>{text(command)}</code></pre>\n" if command else "")
        for why, command in rows
    )


def notes(sentences: Iterable[str]) -> str:
    """Warnings, each a paragraph with a mark."""
    return "".join(f"<p class=note>{text(one)}</p>\n" for one in sentences)


def shown(value: Any) -> str:
    """A setting as people type it."""
    return typed(value) if value != "" else '""'


# ------------------------------------------------------------------------------------------------- sections


def run_sections(summary: RunSummary) -> str:
    """The page's content, without the values that its script draws."""
    parts = {"Accuracy": _accuracy(summary), "Curves": _curves(summary)}
    if not summary.is_tuned:
        parts["Predictions"] = _predictions(summary)
    parts |= {"Settings": _settings(summary), "Unreadable images": _unreadable(summary)}
    parts |= {"Starts": _starts(summary), "What next": what_to_type(next_commands(summary))}
    return run_header(summary) + "".join(section(title, content) for title, content in parts.items())


def run_header(summary: RunSummary) -> str:
    """The run's name, what it is doing, and its numbers."""
    status, total = summary.status, summary.heartbeat.get("total_steps")
    steps = f"step {summary.step:,}" + (f" of {total:,}" if total else "")
    what = "fine-tuning" if summary.is_tuned else summary.preset
    source = typed(summary.settings.get("data.train") or "")
    line = " · ".join(filter(None, (status.word, steps, what, source, status.message)))
    boxes = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>\n"
        for name, value in facts(summary)
        if name not in ("status", "accuracy", "picture")  # these have other places on the page
    )
    return (
        f'<header><h1>{text(summary.name)}</h1>\n<p class="muted">{text(line)}</p>\n'
        f'<dl class="tiles">{boxes}</dl></header>\n'
    )


def _accuracy(summary: RunSummary) -> str:
    if not summary.results:
        return what_to_type([("This run has no results yet. Measure it:", how_to_measure(summary))])
    found = results_table(summary.results)
    labels = dict.fromkeys(one.labels for one in summary.results if one.labels)
    files = ", ".join(dict.fromkeys(one.file for one in summary.results))
    learned = f"Labels came from {', '.join(labels)}. " if labels else ""
    return (
        "<p>Top-1 in percent ± one standard error, measured on the images named in the row.</p>\n"
        f"{table('accuracies', found.head, found.cells())}"
        f"<p class=muted>{text(learned)}All numbers: {text(files)}.</p>\n{notes(summary.notes)}"
    )


def _curves(summary: RunSummary) -> str:
    note = "Point at a chart to read its values, or focus it and use the arrow keys. A band is the range of "
    note += "values behind each point. ▲ marks where the run resumed."
    if not summary.train:
        note = "Nothing is logged yet; the first line comes after monitor.log_every."
    lacking = what_to_type(missing(summary))
    return (
        f'<p class=muted>{note}</p>\n{notes(gaps(summary))}<div id="charts" class="charts"></div>\n{lacking}'
    )


def _predictions(summary: RunSummary) -> str:
    content = (
        '<figure id="steps" hidden><p><label for="step">Step</label> '
        '<input id="step" type="range" min="0" value="0" step="1"> <output for="step"></output></p>'
        + scroll("picture", '<img alt="">')
        + "</figure>\n"
    )
    shown, all_ = len(_shown_pictures(summary)), len(summary.pictures)
    if shown < all_:
        content += f"<p class=muted>{shown} of {all_} pictures, evenly spaced.</p>\n"
    if summary.drawn:
        name = text(summary.drawn.relative_to(summary.run_dir))
        image = f'<img alt="Originals, predictions and errors" src="{data_url(summary.drawn)}">'
        caption, image = f"Drawn by nextblock predict: {name}", scroll("picture drawn by predict", image)
        content += f"<figure><figcaption>{caption}</figcaption>{image}</figure>\n"
    if not summary.picture:
        content += what_to_type([("No picture yet. Draw one:", how_to_draw(summary))])
    return content


def _settings(summary: RunSummary) -> str:
    rows = [[name, shown(value)] for name, value in summary.settings.items()]
    every = table("all settings", ["setting", "value"], rows)
    every = f"<details><summary>All settings</summary>\n{every}</details>\n"
    if summary.is_tuned:
        return every
    rows = [[name, shown(usual), shown(value)] for name, (usual, value) in summary.changed.items()]
    if not rows:
        return f"<p>All as in preset {text(summary.preset)}.</p>\n{every}"
    head = ["setting", f"preset {summary.preset}", "this run"]
    return f"<p>These differ from the preset.</p>\n{table('settings that differ', head, rows)}{every}"


def _unreadable(summary: RunSummary) -> str:
    parts = []
    for file, rows in summary.unreadable.items():
        first = f", the first {SHOWN_UNREADABLE}" if len(rows) > SHOWN_UNREADABLE else ""
        parts.append(f"<p>{counted(len(rows), 'image')} in {text(file)}{first}:</p>\n")
        cells = [[str(row.get("name")), str(row.get("reason"))] for row in rows[:SHOWN_UNREADABLE]]
        parts.append(table(f"images in {file}", ["image", "reason"], cells))
    return "".join(parts) or "<p>None: every image could be read so far.</p>\n"


def _starts(summary: RunSummary) -> str:
    if not summary.starts:
        return "<p>No start was recorded: environment.json is missing or empty.</p>\n"
    own, packages = ("step", "started", "host", "device", "processes"), ("nextblock", "torch", "timm")
    rows = []
    for start in summary.starts:
        values = [start.get(name) for name in own]
        values += [(start.get("packages") or {}).get(name) for name in packages]
        rows.append(["-" if value is None else str(value) for value in (*values, start.get("git_commit"))])
    words = [str(word) for word in summary.starts[-1].get("command") or ()]
    if words and Path(words[0]).name in ("nextblock", "__main__.py"):
        words[0] = "nextblock"
    last = [("The last start was", " ".join(map(typed_word, words)))] if words else []
    return table("starts", [*own, *packages, "git commit"], rows) + what_to_type(last)


# ---------------------------------------------------------------------------------------------------- a page


def asset(name: str) -> str:
    """A file of this package: a template, or the style that pages share."""
    return (resources.files("nextblock.report") / name).read_text(encoding="utf-8")


def page(title: str, body: str, values: Mapping[str, Any], *, script: str = "") -> str:
    """A whole page: its script draws `values`, then runs `script`."""
    template = asset("page.html").replace("{{script}}", script)
    own = re.search(r"<script>(.*?)</script>", template, flags=re.DOTALL)
    assert own is not None, "the template has a script"
    # Only this very script runs, whatever a name may contain, and nothing is fetched from elsewhere.
    digest = base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = {
        "policy": "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        "style": asset("style.html"),
        "title": text(title),
        "body": body,
        "foot": f"Written {now} by nextblock {__version__}.",
        # "<" could end the data block; its escape is the same in JSON.
        "values": json.dumps(values, allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def run_page(summary: RunSummary, *, script: str = "") -> str:
    """The page of one run; the same file opens from a disk and from a server."""
    return page(f"{summary.name} · nextblock", run_sections(summary), page_values(summary), script=script)
