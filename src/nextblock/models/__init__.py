"""The networks: encoder, predictor, the model that combines them, probe heads and classifiers."""

from __future__ import annotations

from nextblock.models.heads import EncoderModel, ImageClassifier
from nextblock.models.next_block import Further, NextBlockModel, Prediction
from nextblock.models.timm_encoder import TimmEncoder
from nextblock.models.vit import Encoded

__all__ = [
    "Encoded",
    "EncoderModel",
    "Further",
    "ImageClassifier",
    "NextBlockModel",
    "Prediction",
    "TimmEncoder",
]
