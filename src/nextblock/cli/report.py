"""`nextblock report`: sum up a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nextblock.cli.output import end_with_json


def run(argv: Sequence[str]) -> int:
    """Print the summary of a run directory; write it and the loss curve, if there is one, into the run."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser
    from nextblock.visualize.report import plot_losses, read_run, report_markdown, report_table, report_values

    parser = Parser("report", "Sum up a run: accuracies, speed, losses, pictures.")
    parser.add_argument("run", type=str, help="run directory")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse(argv)
    summary = read_run(Path(options.run))
    if summary.train:
        plot_losses(summary, Path(options.run) / "losses.png")
    (Path(options.run) / "report.md").write_text(report_markdown(summary), encoding="utf-8")
    Console().print(report_table(summary))
    if options.json:
        end_with_json(report_values(summary))
    return 0
