"""Pre-train a vision transformer by predicting the next block of an image.

The public names below are imported when they are first used, so that `import nextblock` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextblock.cli.classify import classify
    from nextblock.cli.embed import embed
    from nextblock.cli.fewshot import fewshot
    from nextblock.cli.finetune import finetune
    from nextblock.cli.knn import knn
    from nextblock.cli.predict import predict
    from nextblock.cli.pretrain import pretrain
    from nextblock.cli.probe import probe
    from nextblock.cli.search import search
    from nextblock.cli.suite import suite
    from nextblock.config import ModelConfig, RunConfig
    from nextblock.interop import create_model, load
    from nextblock.interop.convert import convert
    from nextblock.models import NextBlockModel
    from nextblock.models.heads import ImageClassifier
    from nextblock.presets import list_presets

__version__ = "0.1.0"

__all__ = [
    "ImageClassifier",
    "ModelConfig",
    "NextBlockModel",
    "RunConfig",
    "classify",
    "convert",
    "create_model",
    "embed",
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
]

_HOMES = {
    "ImageClassifier": "nextblock.models.heads",
    "ModelConfig": "nextblock.config",
    "NextBlockModel": "nextblock.models",
    "RunConfig": "nextblock.config",
    "classify": "nextblock.cli.classify",
    "convert": "nextblock.interop.convert",
    "create_model": "nextblock.interop",
    "embed": "nextblock.cli.embed",
    "fewshot": "nextblock.cli.fewshot",
    "finetune": "nextblock.cli.finetune",
    "knn": "nextblock.cli.knn",
    "list_presets": "nextblock.presets",
    "load": "nextblock.interop",
    "predict": "nextblock.cli.predict",
    "pretrain": "nextblock.cli.pretrain",
    "probe": "nextblock.cli.probe",
    "search": "nextblock.cli.search",
    "suite": "nextblock.cli.suite",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nextblock' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
