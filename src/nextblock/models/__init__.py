"""The networks: encoder, predictor, the model that combines them, probe heads and classifiers."""

from __future__ import annotations

from nextblock.models.heads import EncoderModel
from nextblock.models.next_block import NextBlockModel
from nextblock.models.timm_encoder import TimmEncoder

__all__ = ["EncoderModel", "NextBlockModel", "TimmEncoder"]
