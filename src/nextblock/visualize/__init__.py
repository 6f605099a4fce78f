"""Looking at a model and at a run: predicted pictures, and the report of what a run achieved.

Imported lazily: the report reads files alone, and must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextblock.visualize.predictions import (
        PredictionMonitor,
        PredictResult,
        draw_predictions,
        predict,
        predicted_image,
        some_images,
    )
    from nextblock.visualize.report import RunSummary, plot_losses, read_run, report_markdown, report_table

__all__ = [
    "PredictResult",
    "PredictionMonitor",
    "RunSummary",
    "draw_predictions",
    "plot_losses",
    "predict",
    "predicted_image",
    "read_run",
    "report_markdown",
    "report_table",
    "some_images",
]

_REPORT = {"RunSummary", "plot_losses", "read_run", "report_markdown", "report_table"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "report" if name in _REPORT else "predictions"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
