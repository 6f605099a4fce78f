"""The teacher of `model.target features`: a frozen encoder, and how it sees the student's images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from nextblock.checkpoint import digest_of
from nextblock.config import pair
from nextblock.errors import UsageError
from nextblock.interop.load import official_data, open_encoder, recorded_data
from nextblock.models import EncoderModel, NextBlockModel

Statistics = tuple[Sequence[float], Sequence[float]]


def teacher_facts(spec: str) -> tuple[int, str]:
    """Width of a teacher's features, and the hash of its weights."""
    teacher = open_encoder(spec)
    return teacher.config.embed_dim, digest_of(teacher.encoder)


def attach_teacher(
    model: NextBlockModel, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"
) -> None:
    """Load the teacher whose features a model predicts; a model with another target is left as it is.

    `mean` and `std` are those by which the model's images are normalised. Raises `UsageError` if the
    teacher's weights are not those that the model was trained with.
    """
    config = model.config
    if config.teacher is None or model.targets is None:
        return
    teacher = open_encoder(config.teacher).to(device).eval().requires_grad_(requires_grad=False)
    digest = digest_of(teacher.encoder)
    if config.teacher_digest not in (None, digest):
        raise UsageError(
            f"the weights of {config.teacher} have changed since training started (hash {digest}, recorded "
            f"{config.teacher_digest}); give back the old ones, or start a new run"
        )
    theirs = teacher.config
    data = recorded_data(config.teacher) or official_data(theirs.image_size, theirs.in_chans)
    targets: Any = model.targets
    targets.teacher = _Teacher(teacher, (mean, std), (data.mean, data.std))


class _Teacher:
    """From images as the student sees them to features on the teacher's grid."""

    def __init__(self, teacher: EncoderModel, ours: Statistics, theirs: Statistics) -> None:
        self.teacher, self.ours, self.theirs = teacher, ours, theirs
        self.size = pair(teacher.config.image_size)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b e i j"]:
        # Its own normalisation and image size, in the precision of its weights, whatever autocast says.
        ours, theirs = (
            [torch.tensor(numbers, device=images.device).view(-1, 1, 1) for numbers in both]
            for both in (self.ours, self.theirs)
        )
        with torch.autocast(images.device.type, enabled=False):
            images = (images.float() * ours[1] + ours[0] - theirs[0]) / theirs[1]
            if images.shape[2:] != self.size:
                images = interpolate(images, size=self.size, mode="bicubic", antialias=True)
            tokens = self.teacher.encode(images).tokens
        # Rows of patches, as the teacher's patches are square.
        rows = round((tokens.shape[1] * self.size[0] / self.size[1]) ** 0.5)
        return rearrange(tokens, "b (i j) e -> b e i j", i=rows)
