"""What a run achieved: read from its files, then printed, written as Markdown, and written as a page.

Importing it loads neither torch nor matplotlib, so that a report starts quickly.
"""

from nextblock.report.compare import Comparison, comparison_group, comparison_page
from nextblock.report.page import page_values, run_page
from nextblock.report.read import RunSummary, read_run
from nextblock.report.words import plot_losses, report_markdown, report_table, report_values

__all__ = [
    "Comparison",
    "RunSummary",
    "comparison_group",
    "comparison_page",
    "page_values",
    "plot_losses",
    "read_run",
    "report_markdown",
    "report_table",
    "report_values",
    "run_page",
]
