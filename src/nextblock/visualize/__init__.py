"""Looking at a model: predicted pictures. Imported lazily, as figures and words alone need no torch."""

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

__all__ = [
    "PredictResult",
    "PredictionMonitor",
    "draw_predictions",
    "predict",
    "predicted_image",
    "some_images",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.predictions"), name)
