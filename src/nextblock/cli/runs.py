"""`nextblock runs` and `report`: what runs are doing and have done, read from their files alone."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.atomic import RUN_FILES, is_locked
from nextblock.cli.arguments import Parser
from nextblock.cli.output import end_with_json
from nextblock.errors import UsageError
from nextblock.logs import clock, printable
from nextblock.settings import require

if TYPE_CHECKING:
    from nextblock.visualize.report import RunSummary

SILENT_S = 300.0
"""A run whose heartbeat is older has failed: it beats every ten seconds."""
LATE_S = 30.0
"""From this age on, the lock of a run on this machine is asked for as well."""


def report(argv: Sequence[str]) -> int:
    """Print the summary of a run directory; write it and the loss curve, if there is one, into the run."""
    parser = Parser("report")
    parser.add_argument("run", type=str, help="run directory")
    options = parser.parse(argv)

    from rich.console import Console

    from nextblock.visualize.report import plot_losses, read_run, report_markdown, report_table, report_values

    summary, run = read_run(Path(options.run)), Path(options.run)
    if summary.train:
        plot_losses(summary, run / "losses.png")
    (run / "report.md").write_text(report_markdown(summary), encoding="utf-8")
    console = Console()
    console.width = max(console.width, 84)  # what a probe of all heads with all baselines takes
    console.print(report_table(summary))
    if options.json:
        end_with_json(report_values(summary))
    return 0


def runs(argv: Sequence[str]) -> int:
    """Print a table of runs, and below it what ended those that failed."""
    parser = Parser("runs")
    parser.add_argument("dir", type=str, help="directory, searched in full; or a run")
    options = parser.parse(argv)
    top = Path(options.dir)
    require(top.is_dir(), f"{printable(str(top))} is not a directory")

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from nextblock.visualize.report import read_run

    rows: list[dict[str, Any]] = []
    for path in _find_runs(top):
        name = top.resolve().name if path == top else str(path.relative_to(top))
        file = "metrics.jsonl"
        try:
            summary = read_run(path)
            file = "heartbeat.json"
            rows.append({"run": name, **_values(summary)})
        except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
            # A file that is not JSON is named already; what else fails is a value of the wrong kind.
            why = str(error) if isinstance(error, UsageError) else f"{path / file} is damaged; remove it"
            rows.append({"run": name, "status": "unreadable", "message": why})
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for title in ("status", "step", "loss", "best kNN", "heartbeat"):
        table.add_column(title, justify="left" if title == "status" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, (printable(row["run"]), row["status"], *_cells(row))))
    console = Console()
    console.print(table if rows else f"no runs below {printable(str(top))}", markup=False, highlight=False)
    for row in rows:
        if row["message"] is not None:
            text = printable(f"{row['run']}: {row['status']}: {row['message']}")
            console.print(text, highlight=False, markup=False, emoji=False)
    if options.json:
        end_with_json(rows)
    return 0


def _find_runs(top: Path) -> Iterator[Path]:
    """The runs below a directory in the order of names; there are none within a run."""
    for folder, folders, files in os.walk(top):
        folders.sort()
        if set(RUN_FILES) <= set(files):
            folders.clear()
            yield Path(folder)


def _values(summary: RunSummary) -> dict[str, Any]:
    """The row of a run, as JSON has it."""
    beat = summary.heartbeat
    loss, step = summary.final_loss or (None, 0)
    age_s = None
    if "time" in beat:
        age_s = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(beat["time"])).total_seconds())
    status, message = _status(summary, age_s)
    return {
        "status": status,
        "message": message,
        "step": beat.get("step", step),
        "total_steps": beat.get("total_steps"),
        "loss": loss,
        "best_knn": summary.best_knn[0] if summary.best_knn else None,
        "heartbeat_age_s": age_s,
    }


def _status(summary: RunSummary, age_s: float | None) -> tuple[str, str | None]:
    """Running, stopped, finished or failed, and why it failed."""
    beat = summary.heartbeat
    if age_s is None:  # by a release that wrote no heartbeat
        if summary.environment.get("complete"):
            return "finished", None
        return "running" if is_locked(summary.run_dir) else "stopped", None
    if beat["status"] != "running":
        return beat["status"], beat.get("message")
    # A killed process cannot write that it failed. Its lock tells at once, but on its own machine only.
    # Not asked while the run is heard of: the question takes the lock for an instant.
    is_late = age_s > LATE_S and beat["host"] == platform.node()
    if age_s > SILENT_S or (is_late and is_locked(summary.run_dir) is False):
        return "failed", f"no heartbeat for {_about(age_s)}"
    return "running", None


def _cells(row: dict[str, Any]) -> list[str]:
    """The numbers of a row as text, "-" for those that are not known."""
    if "step" not in row:
        return ["-"] * 4
    step, total, age_s = row["step"], row["total_steps"], row["heartbeat_age_s"]
    return [
        f"{step:,}" if total is None else f"{step:,}/{total:,}",
        "-" if row["loss"] is None else f"{row['loss']:.4f}",
        "-" if row["best_knn"] is None else f"{row['best_knn']:.1%}",
        "-" if age_s is None else f"{_about(age_s)} ago",
    ]


def _about(seconds: float) -> str:
    """A length of time in its largest unit: "2 h"."""
    return " ".join(clock(seconds).split()[:2])
