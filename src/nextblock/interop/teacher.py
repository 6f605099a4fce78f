"""The teacher of `model.target features`: a frozen encoder with its own normalisation and image size."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from nextblock.checkpoint import CheckpointError, digest_of
from nextblock.config import ModelConfig, pair
from nextblock.errors import UsageError
from nextblock.interop.load import official_data, open_encoder, recorded_data
from nextblock.logs import counted
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.timm_encoder import TimmConfig

log = logging.getLogger(__name__)


def with_teacher(config: ModelConfig) -> ModelConfig:
    """Return the settings with the width of the teacher's features and the hash of its weights."""
    teacher, digest = _open(config)
    return replace(config, teacher_dim=teacher.config.embed_dim, teacher_digest=digest)


def attach_teacher(
    model: NextBlockModel,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    place: str | None = None,
) -> None:
    """Load the teacher whose features a model predicts; does nothing for other targets.

    `mean` and `std` are the normalisation of the model's images. `place` overrides the teacher's place in the
    settings. Grey images are converted for a colour teacher. Raises `UsageError` if the teacher's weights
    differ from those used in training, or if its channels or width do not match.
    """
    config = model.config
    if config.teacher is None or model.targets is None:
        return
    # The teacher may have moved since the model was written.
    teacher, _ = _open(config if place is None else replace(config, teacher=place))
    theirs: Any = teacher.config
    own = (theirs.mean, theirs.std) if isinstance(theirs, TimmConfig) else (None, None)
    if None in own:
        data = recorded_data(place or config.teacher)
        if data is None:
            log.warning("%s records no mean and deviation of its images; using ImageNet's", config.teacher)
            data = official_data(theirs.image_size, theirs.in_chans)
        own = (data.mean, data.std)
    # On the device, so that no step waits for a copy.
    statistics = [
        torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1)
        for numbers in (mean, std, *own)
    ]
    targets: Any = model.targets
    targets.teacher = _Teacher(teacher.to(device).eval().requires_grad_(requires_grad=False), *statistics)


def _open(config: ModelConfig) -> tuple[EncoderModel, str]:
    """Open the teacher of these settings; return it with the hash of its weights."""
    assert config.teacher is not None
    try:
        teacher = open_encoder(config.teacher)
    except (CheckpointError, UsageError) as error:
        raise UsageError(
            f"the teacher, model.teacher {config.teacher}, cannot be read: {error}. If it has moved, give "
            "its new place: --model.teacher PLACE"
        ) from error
    digest, theirs = digest_of(teacher.encoder), teacher.config
    if config.in_chans not in (1, theirs.in_chans):
        raise UsageError(
            f"{config.teacher} takes images of {counted(theirs.in_chans, 'channel')}, and model.in_chans is "
            f"{config.in_chans}; choose a teacher with the same number of channels"
        )
    if config.teacher_dim not in (None, theirs.embed_dim):
        raise UsageError(
            f"features of {config.teacher} are {theirs.embed_dim} wide, and model.teacher_dim is "
            f"{config.teacher_dim}; leave model.teacher_dim out"
        )
    if config.teacher_digest not in (None, digest):
        raise UsageError(
            f"the weights of {config.teacher} have changed since training started (hash {digest}, recorded "
            f"{config.teacher_digest}); put the old ones back, or start a new run"
        )
    return teacher, digest


class _Teacher:
    """Maps the student's normalised images to features on the teacher's grid."""

    def __init__(
        self, teacher: EncoderModel, mean: Tensor, std: Tensor, own_mean: Tensor, own_std: Tensor
    ) -> None:
        self.teacher, self.mean, self.std, self.own_mean, self.own_std = teacher, mean, std, own_mean, own_std
        self.size = pair(teacher.config.image_size)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        # The teacher runs in the precision of its weights, even under autocast.
        with torch.autocast(images.device.type, enabled=False):
            # Broadcasting expands one channel to the number of the teacher's means.
            images = (images.float() * self.std + self.mean - self.own_mean) / self.own_std
            if images.shape[2:] != self.size:
                images = interpolate(images, size=self.size, mode="bicubic", antialias=True)
            tokens = self.teacher.encode(images).tokens
        # Number of patch rows, as the teacher's patches are square.
        rows = round((tokens.shape[1] * self.size[0] / self.size[1]) ** 0.5)
        return rearrange(tokens, "b (i j) e -> b e i j", i=rows)
