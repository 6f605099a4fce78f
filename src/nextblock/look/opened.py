"""A model that predicts, and the images to show it, made ready."""

from __future__ import annotations

from typing import NamedTuple

import torch

from nextblock.config import DataConfig
from nextblock.data import Source, open_source
from nextblock.evaluate.features import evaluation_data
from nextblock.interop import attach_teacher, load_model
from nextblock.look.settings import LookSettings
from nextblock.models import NextBlockModel
from nextblock.train.runtime import choose_device


class Opened(NamedTuple):
    """What a command that draws works with; the model is on the device, in evaluation mode."""

    model: NextBlockModel
    source: Source
    data: DataConfig
    """How images are cut and normalised for this model."""
    device: torch.device


def open_look(config: LookSettings) -> Opened:
    """Load the model, open the images; a teacher is attached if the model predicts its features."""
    model = load_model(config.model, num_heads=config.num_heads)
    data = evaluation_data(config.model, model.config, workers=config.workers)
    source, device = open_source(config.data, data), choose_device(config.device)
    attach_teacher(model, data.mean, data.std, device)
    return Opened(model.to(device).eval(), source, data, device)
