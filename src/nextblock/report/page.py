"""The report of a run as one HTML file: it needs no network, and its charts are drawn from JSON within it.

`page_values` is that JSON, `run_sections` the text between; a page that follows a run asks for both again.
Whatever comes from a run's files is escaped: names are other people's.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextblock.logs import counted, printable
from nextblock.logs import quote as typed_word
from nextblock.presets import DEFAULT_PRESET
from nextblock.report.read import RunSummary
from nextblock.report.words import (
    commands,
    how_to_draw,
    how_to_measure,
    missing,
    not_numbers,
    results_table,
    told_apart,
)
from nextblock.settings import typed
from nextblock.tables import finite
from nextblock.version import __version__
from nextblock.visualize.words import BASELINE_WORDS

MAX_POINTS = 400
"""A longer curve is drawn as means of so many parts, each with its smallest and largest value."""
MAX_PICTURES = 40
MAX_PICTURE_BYTES = 9_000_000
"""Of all pictures together; base64 makes a third more of them."""
MAX_DRAWN_BYTES = 1_500_000
"""Of the picture that predict drew. In all, a page stays below 15 MB."""
SHOWN_UNREADABLE = 10
PNG = b"\x89PNG\r\n\x1a\n"

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
"""What is drawn besides the loss, if a run logged it: shares of 1 in percent, amounts from zero."""


# ---------------------------------------------------------------------------------------------------- values


def page_values(summary: RunSummary, *, pictures: bool = True) -> dict[str, Any]:
    """What the page's script draws, ready for JSON: `charts`, and `pictures` as data: URLs unless left out.

    A chart: title, share (values in percent), series (name, x, y; of a thinned one also low and high),
    references (horizontal lines: name, value), marks (steps at which the run resumed).
    """
    loss = [("training", "loss"), ("validation", "val_loss")]
    charts = [_chart(summary, "Loss", loss, wide=True, references=_references(summary))]
    knn = "".join(f" {one.where}" for one in told_apart(summary.monitored)[0])
    for name, (title, *kinds) in CURVES.items():
        title += knn * (name == "knn/top1")
        charts.append(_chart(summary, title, [("", name)], share="share" in kinds, zero="zero" in kinds))
    return {
        "run": summary.name,
        "status": summary.status.word,
        "step": summary.step,
        "total_steps": summary.heartbeat.get("total_steps"),
        "charts": [chart for chart in charts if chart["series"]],
        "pictures": _pictures(summary.pictures) if pictures else [],
    }


def _chart(summary: RunSummary, title: str, names: Iterable[tuple[str, str]], **more: Any) -> dict[str, Any]:
    """A chart of logged values by step, each with the name of its line."""
    series = [curve(word, *summary.series(name)) for word, name in names]
    marks = [start["step"] for start in summary.starts if start.get("step")]
    known = [one for one in series if one["x"]]
    return finite({"title": title, "x": "step", "series": known, "marks": marks, **more})


def _references(summary: RunSummary) -> list[dict[str, Any]]:
    baselines = summary.baselines.items()
    return [{"name": BASELINE_WORDS.get(name, name), "value": value} for name, value in baselines]


def curve(name: str, x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """A line of a chart; of a long one the means of `MAX_POINTS` parts, with their smallest and largest."""
    if len(x) <= MAX_POINTS:
        return {"name": name, "x": list(x), "y": list(y)}
    bounds = [len(x) * part // MAX_POINTS for part in range(MAX_POINTS + 1)]
    parts = [slice(*pair) for pair in pairwise(bounds)]
    return {
        "name": name,
        "x": [x[part][-1] for part in parts],
        "y": [math.fsum(y[part]) / len(y[part]) for part in parts],
        "low": [min(y[part]) for part in parts],
        "high": [max(y[part]) for part in parts],
    }


def _whole(paths: Iterable[Path]) -> list[Path]:
    """The files of these that are PNGs at all."""
    found = []
    for path in paths:
        with path.open("rb") as file:
            found += [path] * (file.read(len(PNG)) == PNG)
    return found


def _pictures(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Pictures by step as data: URLs, evenly spaced if there are many, and smaller if they are large."""
    read = {path: path.read_bytes() for path in evenly(_whole(paths), MAX_PICTURES)}
    limit = MAX_PICTURE_BYTES // max(1, len(read))
    is_large = sum(map(len, read.values())) > MAX_PICTURE_BYTES
    return [
        {"step": int(path.stem.partition("_")[2]), "src": data_url(_smaller(one, limit) if is_large else one)}
        for path, one in read.items()
    ]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def data_url(content: bytes) -> str:
    """A PNG or JPEG as a data: URL."""
    kind = "png" if content.startswith(PNG) else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _smaller(content: bytes, limit: int) -> bytes:
    """A picture as JPEG of at most so many bytes: at its size, or at the first smaller one that fits."""
    if len(content) <= limit:
        return content
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        picture = picture.convert("RGB")
    while len(content) > limit and min(picture.size) > 16:
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=85)
        content, picture = written.getvalue(), picture.reduce(2)
    return content


# ------------------------------------------------------------------------------------------------------ HTML


def text(value: Any) -> str:
    """Any text for HTML: markup is escaped, and control characters are written out."""
    return html.escape(printable(str(value)))


def prose(value: Any) -> str:
    """Text for HTML in which no line is broken between a flag's dashes and its name."""
    return re.sub("--[a-z_.]+", lambda flag: f"<span>{flag[0]}</span>", text(value))


def table(about: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box of its own that scrolls; cells are plain text, and numbers are set to the right."""
    cells = [list(row) for row in rows]
    numeric = [all(re.fullmatch(r"[-+]?[0-9][^:]*|-?", row[i]) for row in cells) for i in range(len(head))]

    def line(tag: str, row: Sequence[str]) -> str:
        pairs = zip(row, numeric, strict=True)
        return "".join(f"<{tag}{' class=n' * is_number}>{text(cell)}</{tag}>" for cell, is_number in pairs)

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in cells)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(about)}">'
        f"<table><thead><tr>{line('th', head)}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def section(title: str, *parts: str) -> str:
    """A part of the page below its heading."""
    name = re.sub("[^a-z]+", "-", title.lower())
    return f'<section id="{name}">\n<h2>{text(title)}</h2>\n{"".join(parts)}</section>\n'


def what_to_type(rows: Sequence[tuple[str, str]]) -> str:
    """Sentences, each with the command that belongs to it, if there is one."""
    return "".join(
        f"<div class=how><p>{prose(why)}</p>"
        f"{f'<pre><code>{prose(command)}</code></pre>' if command else ''}</div>\n"
        for why, command in rows
    )


def shown(value: Any) -> str:
    """A setting as people type it."""
    return typed(value) if value != "" else '""'


# ------------------------------------------------------------------------------------------------- sections


def run_sections(summary: RunSummary) -> str:
    """The page between title and end, without the values that its script draws."""
    parts = {"Accuracy": _accuracy(summary), "Curves": _curves(summary)}
    if not summary.is_tuned:  # a classifier predicts no blocks
        parts["Predictions"] = _predictions(summary)
    parts |= {"Settings": _settings(summary), "Unreadable images": _unreadable(summary)}
    parts |= {"Starts": _starts(summary), "What next": what_to_type([*commands(summary)])}
    return _head(summary) + "".join(section(title, content) for title, content in parts.items())


def _head(summary: RunSummary) -> str:
    status, total = summary.status, summary.heartbeat.get("total_steps")
    steps = f"step {summary.step:,}" + (f" of {total:,}" if total else "")
    what = "fine-tuning" if summary.is_tuned else summary.settings.get("preset") or DEFAULT_PRESET
    sources = summary.settings.get("data.train")
    line = " · ".join(filter(None, (status.word, steps, what, typed(sources or ""), status.message)))
    tiles = []
    if summary.final_loss is not None:  # references are of training images
        plain = [f"{one['name']}: {one['value']:.3f}" for one in _references(summary)]
        tiles.append(("training loss", f"{summary.final_loss[0]:.4f}", (plain or [""])[0]))
    if summary.final_val_loss is not None:
        loss, step = summary.final_val_loss
        tiles.append(("validation loss", f"{loss:.4f}", f"at step {step:,}"))
    own = [one for one in told_apart(summary.results)[0] if one.encoder == "model"]
    tiles += [(one.method, f"{one.top1:.1%}", one.where) for one in own[:2]]
    if summary.final_knn is not None and not own:
        (one,), step = told_apart(summary.monitored)[0], summary.final_knn[1]
        tiles.append(("kNN", f"{one.top1:.1%}", f"{one.where}, at step {step:,}"))
    if summary.images_per_s is not None:
        device = summary.environment.get("device", "")
        tiles.append(("images/s, median", f"{summary.images_per_s:,.3g}", device))
    boxes = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}<small>{text(more)}</small></dd></div>\n"
        for name, value, more in tiles
    )
    return (
        f'<header><h1>{text(summary.name)}</h1>\n<p class="muted">{prose(line)}</p>\n'
        f'<dl class="tiles">{boxes}</dl></header>\n'
    )


def _accuracy(summary: RunSummary) -> str:
    if not summary.results:
        return what_to_type([("This run has no results yet. Measure it:", how_to_measure(summary))])
    found = results_table(summary.results)
    labels = list(dict.fromkeys(one.labels for one in summary.results if one.labels))
    files = ", ".join(dict.fromkeys(one.file for one in summary.results))
    learned = f"Labels came from {', '.join(labels)}. " if labels else ""
    notes = "".join(f"<p class=note>{prose(note)}</p>\n" for note in summary.notes)
    return (
        "<p>Top-1 in percent ± one standard error, each on the images named beside it.</p>\n"
        f"{table('accuracies', found.head, found.cells())}{notes}"
        f"<p class=muted>{text(learned)}All numbers: {text(files)}.</p>\n"
    )


def _curves(summary: RunSummary) -> str:
    lacking = "".join(f"<p class=note>{text(one)}</p>\n" for one in not_numbers(summary))
    lacking += what_to_type([*missing(summary)])
    if not summary.train:
        return f"<p>Nothing is logged yet; the first line comes after monitor.log_every.</p>\n{lacking}"
    note = "Point at a chart to read its values, or focus it and use the arrow keys."
    if len(summary.train) > MAX_POINTS:
        note += " Lines are means of several logged lines; the band goes from the smallest to the largest."
    note += " ▲ marks where the run resumed." if any(start.get("step") for start in summary.starts) else ""
    return f'<p class=muted>{note}</p>\n<div id="charts" class="charts"></div>\n{lacking}'


def _predictions(summary: RunSummary) -> str:
    whole, parts = _whole(summary.pictures), list[str]()
    if whole:
        parts.append(
            '<figure id="steps" hidden><p><label for="step">Step</label> '
            '<input id="step" type="range" min="0" value="0" step="1"> <output for="step"></output></p>'
            '<div class="scroll" tabindex="0" role="region" aria-label="picture"><img alt=""></div>'
            "</figure>\n"
        )
    if len(whole) > MAX_PICTURES:
        parts.append(f"<p class=muted>{MAX_PICTURES} of {len(whole)} pictures, evenly spaced.</p>\n")
    if len(whole) < len(summary.pictures):
        damaged = counted(len(summary.pictures) - len(whole), "picture")
        parts.append(f"<p>{damaged} in pictures/ cannot be read.</p>\n")
    for path in _whole([summary.drawn] if summary.drawn else []):
        name = text(path.relative_to(summary.run_dir))
        source = data_url(_smaller(path.read_bytes(), MAX_DRAWN_BYTES))
        parts.append(
            f"<figure><figcaption>Drawn by nextblock predict: {name}</figcaption>"
            '<div class="scroll" tabindex="0" role="region" aria-label="picture drawn by predict">'
            f'<img alt="Originals, predictions and errors" src="{source}"></div></figure>\n'
        )
    return "".join(parts) or what_to_type([("No picture yet. Draw one:", how_to_draw(summary))])


def _settings(summary: RunSummary) -> str:
    if not summary.settings:
        return "<p>config.yaml is empty.</p>\n"
    rows = [[name, shown(value)] for name, value in summary.settings.items()]
    every = table("all settings", ["setting", "value"], rows)
    every = f"<details><summary>All settings</summary>\n{every}</details>\n"
    if summary.is_tuned:
        return every
    preset = summary.settings.get("preset") or DEFAULT_PRESET
    rows = [[name, shown(usual), shown(value)] for name, (usual, value) in summary.changed.items()]
    if not rows:
        return f"<p>All as in preset {text(preset)}.</p>\n{every}"
    head = ["setting", f"preset {preset}", "this run"]
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
    rows = []
    for start in summary.starts:
        packages = start.get("packages") or {}
        names = ("host", "device", "processes")
        versions = [str(packages.get(name) or "-") for name in ("nextblock", "torch", "timm")]
        # 2026-11-30T04:27:28+0000: to the minute, and the zone.
        time = re.sub(r"^(\S+)T(\d+:\d+):\d+(.*)$", r"\1 \2 \3", str(start.get("started", "-")))
        begun = "resumed" if start.get("step") else "began"
        own = [f"{start.get('step', 0):,}", time, *(str(start.get(name, "-")) for name in names)]
        rows.append([begun, *own, *versions, str(start.get("git_commit") or "-")[:10]])
    head = ["", "at step", "when", "host", "device", "processes", "nextblock", "torch", "timm", "git commit"]
    words = [str(word) for word in summary.starts[-1].get("command") or ()]
    if words and Path(words[0]).name in ("nextblock", "__main__.py"):
        words[0] = "nextblock"
    last = [("The last start was", " ".join(map(typed_word, words)))] if words else []
    return table("starts", head, rows) + what_to_type(last)


# ---------------------------------------------------------------------------------------------------- a page


def asset(name: str) -> str:
    """A file of this package: a template, or the style that pages share."""
    return (resources.files("nextblock.report") / name).read_text(encoding="utf-8")


def page(title: str, body: str, values: Mapping[str, Any], *, script: str = "") -> str:
    """A whole page: `values` are what its script draws, and `script` is run after it."""
    template = asset("page.html").replace("{{script}}", script)
    own = re.search(r"<script>(.*?)</script>", template, flags=re.DOTALL)
    assert own is not None, "the template has a script"
    # No other script runs, whatever a name might smuggle in, and nothing is fetched from elsewhere.
    digest = base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode()
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = {
        "policy": "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
        "style": asset("style.html"),
        "title": text(title),
        "body": body,
        "foot": f"Written {now} by nextblock {__version__}.",
        # "<" alone could end the data block; as an escape it is the same JSON.
        "values": json.dumps(values, allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def run_page(summary: RunSummary, *, script: str = "") -> str:
    """The page of one run; the same file opens from a disk and from a server."""
    return page(f"{summary.name} · nextblock", run_sections(summary), page_values(summary), script=script)
