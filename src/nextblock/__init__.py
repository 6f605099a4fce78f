"""Pre-train a vision transformer by predicting the next block of an image.

The public names below are imported when they are first used, so that `import nextblock` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextblock.config import ModelConfig, RunConfig
    from nextblock.evaluate.classify import classify
    from nextblock.evaluate.compare import compare
    from nextblock.evaluate.embed import embed
    from nextblock.evaluate.fewshot import fewshot
    from nextblock.evaluate.finetune.run import finetune
    from nextblock.evaluate.knn import knn
    from nextblock.evaluate.probe.run import probe
    from nextblock.evaluate.search import search
    from nextblock.evaluate.suite.run import suite
    from nextblock.interop import create_model, load
    from nextblock.interop.convert import convert
    from nextblock.look.complete import complete
    from nextblock.look.features import features
    from nextblock.look.predict import predict
    from nextblock.look.surprise import surprise
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.presets import list_presets
    from nextblock.pretraining import pretrain
    from nextblock.visualize.orders import draw_order

from nextblock.version import __version__ as __version__

__all__ = [
    "ImageClassifier",
    "ModelConfig",
    "NextBlockModel",
    "RunConfig",
    "classify",
    "compare",
    "complete",
    "convert",
    "create_model",
    "draw_order",
    "embed",
    "features",
    "fewshot",
    "finetune",
    "knn",
    "list_presets",
    "load",
    "predict",
    "pretrain",
    "probe",
    "search",
    "suite",
    "surprise",
]

# The module of each name.
_HOMES = {
    "ImageClassifier": "models.heads",
    "ModelConfig": "config",
    "NextBlockModel": "models",
    "RunConfig": "config",
    "compare": "evaluate.compare",
    "convert": "interop.convert",
    "create_model": "interop",
    "list_presets": "presets",
    "classify": "evaluate.classify",
    "draw_order": "visualize.orders",
    "embed": "evaluate.embed",
    "features": "look.features",
    "fewshot": "evaluate.fewshot",
    "finetune": "evaluate.finetune.run",
    "knn": "evaluate.knn",
    "load": "interop",
    "complete": "look.complete",
    "predict": "look.predict",
    "pretrain": "pretraining",
    "probe": "evaluate.probe.run",
    "search": "evaluate.search",
    "suite": "evaluate.suite.run",
    "surprise": "look.surprise",
}


def __getattr__(name: str) -> Any:
    # Called only for names that are not loaded yet, so neither `import nextblock` nor `--help` imports torch.
    if name not in __all__:
        raise AttributeError(f"module 'nextblock' has no attribute {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(f"nextblock.{_HOMES[name]}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
