"""The settings of a run: frozen dataclasses, checked where they are made, to and from YAML.

Every field is a dotted flag of the command line (`--model.block_size 4`) and a key of `config.yaml`. Nothing
here imports torch: `nextblock pretrain --help` must be quick. Impossible settings raise `ValueError` with
the values and the remedy; derived numbers are properties.
"""

from __future__ import annotations

from nextblock.config.data import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ValCrop
from nextblock.config.model import Attention, ModelConfig, Size, pair
from nextblock.config.run import CheckpointConfig, MonitorConfig, OptimConfig, RunConfig, TrainConfig

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Attention",
    "CheckpointConfig",
    "DataConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "RunConfig",
    "Size",
    "TrainConfig",
    "ValCrop",
    "pair",
]
