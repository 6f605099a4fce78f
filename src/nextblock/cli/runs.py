"""`nextblock runs` and `report`: status and results of runs, read from their files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.atomic import RUN_FILES, write_text
from nextblock.cli.arguments import Parser
from nextblock.cli.output import end_with_json
from nextblock.errors import UsageError
from nextblock.logs import clock, printable
from nextblock.settings import Auto, require

if TYPE_CHECKING:
    from nextblock.report import RunSummary

log = logging.getLogger(__name__)


def report(argv: Sequence[str]) -> int:
    """Sum up a run: print it, and write report.md, report.html and losses.png into it; or compare several."""
    parser = Parser("report")
    parser.add_argument("run", nargs="+", type=str, help="run directories; several are compared")
    parser.add_argument(
        "--out",
        type=str | Auto,
        metavar="FILE.html",
        help="page to write (default: report.html in the run, or in the folder of several runs)",
    )
    options = parser.parse(argv)

    from rich.console import Console

    from nextblock import report as made

    paths = _runs_named(options.run)
    summaries = [made.read_run(path) for path in paths]
    page = _page_path(options.out, [one.run_dir for one in summaries])
    summary, run = summaries[0], summaries[0].run_dir
    console = Console()
    if len(paths) == 1:
        # All is made before anything is written: a file that cannot be read leaves the last report whole.
        losses = run / "losses.png" if summary.train else None
        html, markdown = made.run_page(summary), made.report_markdown(summary, losses=losses)
        shown, values = made.report_table(summary), made.report_values(summary)
        if options.out is None:  # else the run is left as it is: it may be another's
            if losses is not None:
                made.plot_losses(summary, losses)
            write_text(run / "report.md", markdown)
        write_text(page, html)
        console.width = max(console.width, 84)  # what a probe of all heads with all baselines takes
    else:
        compared = made.Comparison(summaries)
        html = made.comparison_page(compared)
        shown, values = made.comparison_group(compared), compared.values()
        write_text(page, html)
        console.width = max(console.width, Console(width=500).measure(shown).maximum)
    log.info("open in a browser: %s", printable(str(page)))
    console.print(shown)
    if options.json:
        end_with_json({**values, "page": str(page)})
    return 0


def _runs_named(names: Sequence[str]) -> list[Path]:
    """The directories of these names, each once, without files: `runs/*` names those as well."""
    paths = list({Path(name).resolve(): Path(name) for name in names}.values())
    files = [path for path in paths if path.is_file()]
    for path in files if len(files) < len(paths) else ():
        log.warning("%s is a file and no run; skipped", printable(str(path)))
        paths.remove(path)
    return paths


def _page_path(out: str | None, runs: Sequence[Path]) -> Path:
    """Where the page goes: as given, else into the run, or the closest directory that holds all runs."""
    if out is not None:
        path = Path(out)
        require(path.suffix == ".html" and not path.is_dir(), f"--out {out} must be a file, FILE.html")
        require(path.parent.is_dir(), f"--out {out}: there is no directory {path.parent}; make it first")
        return path
    if len(runs) == 1:
        return runs[0] / "report.html"
    folder = Path(os.path.commonpath([path.resolve().parent for path in runs]))
    is_place = folder != Path(folder.anchor) and not (folder / "config.yaml").exists()
    require(is_place, f"the runs have only {folder} in common, no place for a page; give --out FILE.html")
    return folder / "report.html"


def runs(argv: Sequence[str]) -> int:
    """Print a table of runs, and below it the messages of failed ones."""
    parser = Parser("runs")
    parser.add_argument("dir", type=str, help="directory to search recursively, or a run")
    options = parser.parse(argv)
    top = Path(options.dir)
    require(top.is_dir(), f"{printable(str(top))} is not a directory")

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nextblock.report import read_run

    found = []
    for folder, folders, files in os.walk(top):
        folders.sort()
        if set(RUN_FILES) <= set(files):
            folders.clear()  # what a run contains is no run
            found.append(Path(folder))
    rows: list[dict[str, Any]] = []
    for path in found:
        name = top.resolve().name if path == top else str(path.relative_to(top))
        file = "metrics.jsonl"
        try:
            summary = read_run(path)
            file = "heartbeat.json"
            rows.append({"run": name, **_values(summary)})
        except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
            # The error for invalid JSON names the file; other errors come from values of the wrong type.
            why = str(error) if isinstance(error, UsageError) else f"{path / file} is damaged; remove it"
            rows.append({"run": name, "status": "unreadable", "message": why})
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("status", "step", "loss", "best kNN", "heartbeat"):
        table.add_column(title, justify="left" if title == "status" else "right", no_wrap=True)
    for row in rows:
        cells = ["-"] * 4
        if "step" in row:
            total, age_s = row["total_steps"], row["heartbeat_age_s"]
            cells = [
                f"{row['step']:,}" if total is None else f"{row['step']:,}/{total:,}",
                "-" if row["loss"] is None else f"{row['loss']:.4f}",
                "-" if row["best_knn"] is None else f"{row['best_knn']:.1%}",
                "-" if age_s is None else " ".join([*clock(age_s).split()[:2], "ago"]),  # the largest unit
            ]
        table.add_row(*map(Text, (printable(row["run"]), row["status"], *cells)))
    console = Console()
    console.print(table if rows else f"no runs below {printable(str(top))}", markup=False, highlight=False)
    for row in rows:
        if row["message"] is not None:
            text = printable(f"{row['run']}: {row['status']}: {row['message']}")
            console.print(text, highlight=False, markup=False, emoji=False)
    if options.json:
        end_with_json(rows)
    return 0


def _values(summary: RunSummary) -> dict[str, Any]:
    """Values of a run's row, ready for JSON."""
    loss, step = summary.last("loss") or (None, 0)
    status = summary.status
    return {
        "status": status.word,
        "message": status.message,
        "step": summary.heartbeat.get("step", step),
        "total_steps": summary.heartbeat.get("total_steps"),
        "loss": loss,
        "best_knn": max(summary.series("knn/top1")[1], default=None),
        "heartbeat_age_s": status.age_s,
    }
