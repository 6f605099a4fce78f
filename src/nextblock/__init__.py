"""Pre-train a vision transformer by predicting the next block of an image.

The public names below are imported when they are first used, so that `import nextblock` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextblock.config import ModelConfig as ModelConfig
    from nextblock.config import RunConfig as RunConfig
    from nextblock.evaluate.classify import classify as classify
    from nextblock.evaluate.compare import compare as compare
    from nextblock.evaluate.embed import embed as embed
    from nextblock.evaluate.fewshot import fewshot as fewshot
    from nextblock.evaluate.finetune.run import finetune as finetune
    from nextblock.evaluate.knn import knn as knn
    from nextblock.evaluate.probe.run import probe as probe
    from nextblock.evaluate.search import search as search
    from nextblock.evaluate.suite.run import suite as suite
    from nextblock.interop import create_model as create_model
    from nextblock.interop import load as load
    from nextblock.interop.convert import convert as convert
    from nextblock.look.complete import complete as complete
    from nextblock.look.features import features as features
    from nextblock.look.predict import predict as predict
    from nextblock.look.surprise import surprise as surprise
    from nextblock.models import NextBlockModel as NextBlockModel
    from nextblock.models.heads import ImageClassifier as ImageClassifier
    from nextblock.presets import list_presets as list_presets
    from nextblock.pretraining import pretrain as pretrain
    from nextblock.visualize.orders import draw_order as draw_order

from nextblock.version import __version__ as __version__

# The module of each public name.
_HOMES = {
    "ImageClassifier": "models.heads",
    "ModelConfig": "config",
    "NextBlockModel": "models",
    "RunConfig": "config",
    "classify": "evaluate.classify",
    "compare": "evaluate.compare",
    "complete": "look.complete",
    "convert": "interop.convert",
    "create_model": "interop",
    "draw_order": "visualize.orders",
    "embed": "evaluate.embed",
    "features": "look.features",
    "fewshot": "evaluate.fewshot",
    "finetune": "evaluate.finetune.run",
    "knn": "evaluate.knn",
    "list_presets": "presets",
    "load": "interop",
    "predict": "look.predict",
    "pretrain": "pretraining",
    "probe": "evaluate.probe.run",
    "search": "evaluate.search",
    "suite": "evaluate.suite.run",
    "surprise": "look.surprise",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll] # one table is enough


def __getattr__(name: str) -> Any:
    # Called only for names that are not loaded yet, so neither `import nextblock` nor `--help` imports torch.
    if name not in __all__:
        raise AttributeError(f"module 'nextblock' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"nextblock.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
