"""`nextblock report`: sum up a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    """Print the summary of a run directory; write it and the loss curve into the run."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse
    from nextblock.visualize.report import plot_losses, read_run, report_markdown, report_table

    parser = build_parser("report", "Sum up a run: accuracies, speed, losses, pictures.")
    parser.add_argument("run", type=str, help="run directory")
    options = parse(parser, argv)
    summary = read_run(Path(options.run))
    plot_losses(summary, Path(options.run) / "losses.png")
    (Path(options.run) / "report.md").write_text(report_markdown(summary))
    Console().print(report_table(summary))
    return 0
