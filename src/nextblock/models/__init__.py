"""The networks: encoder, predictor, the model that joins them, probe heads and classifiers."""

from __future__ import annotations

from nextblock.models.features import Encoded
from nextblock.models.next_block import Further, NextBlockModel, Prediction
from nextblock.models.timm_encoder import TimmEncoder

__all__ = ["Encoded", "EncoderModel", "Further", "NextBlockModel", "Prediction", "TimmEncoder"]

EncoderModel = NextBlockModel | TimmEncoder
"""What can be evaluated: it encodes, has a `final_norm`, and tells its sizes in `config`."""
