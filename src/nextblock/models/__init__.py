"""The networks: encoder, predictor, the model that joins them, probe heads and classifiers."""

from __future__ import annotations

from nextblock.models.next_block import Encoded, Further, NextBlockModel, Prediction

__all__ = ["Encoded", "Further", "NextBlockModel", "Prediction"]
