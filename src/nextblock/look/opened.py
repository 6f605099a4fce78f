"""Shared by the commands that draw: an opened model and source, and the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nextblock.atomic import write_text
from nextblock.config import DataConfig
from nextblock.data import BadSample, Source, normalize, open_source
from nextblock.evaluate.features import classifier_directory, evaluation_data
from nextblock.interop import attach_teacher, load_model, open_encoder
from nextblock.look.settings import LookSettings
from nextblock.models import NextBlockModel
from nextblock.tables import Shown, finite
from nextblock.train.runtime import choose_device


class Opened(NamedTuple):
    """A model and the images to draw."""

    model: Any
    """On the device, in evaluation mode: a `NextBlockModel` if it predicts, else any encoder."""
    source: Source
    data: DataConfig
    """How to crop and normalise images for this model."""
    device: torch.device

    def ready(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalise images for the model, on its device."""
        return normalize(images.to(self.device), self.data.mean, self.data.std)


def open_look(config: LookSettings, *, predicts: bool = True) -> Opened:
    """Load a model and open its images; attach the teacher if the model predicts one's features."""
    spec = classifier_directory(config.model)
    model = (load_model if predicts else open_encoder)(spec, num_heads=config.num_heads)
    # A picture needs only some images; the commands name those that are unreadable.
    data = replace(evaluation_data(spec, model.config, workers=config.workers), max_bad_fraction=1.0)
    source, device = open_source(config.data, data), choose_device(config.device)
    if isinstance(model, NextBlockModel) and predicts:
        attach_teacher(model, data.mean, data.std, device)
    return Opened(model.to(device).eval(), source, data, device)


@dataclass(frozen=True, kw_only=True)
class LookResult(Shown):
    """Pictures and numbers of a command that draws."""

    picture: Path
    further: tuple[Path, ...] = ()
    """More pictures."""
    rows: tuple[dict[str, Any], ...]
    """`predict`, `complete`: losses per drawn image. `features`: the nearest patches."""
    bad: tuple[BadSample, ...]
    """Unreadable images."""
    facts: dict[str, Any]
    """The numbers, ready for JSON except for NaN."""

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All pictures of the result."""
        return (self.picture, *self.further)

    def as_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        bad = [{"name": sample.name, "reason": sample.reason} for sample in self.bad]
        return finite({**self.facts, "bad": bad})


def write_numbers(path: Path, content: dict[str, Any]) -> None:
    """Write numbers as JSON."""
    write_text(path, json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def losses_result(
    picture: Path,
    names: Sequence[str],
    losses: Mapping[str, Sequence[float]],
    bad: tuple[BadSample, ...],
    **facts: Any,
) -> LookResult:
    """Make a result from images' losses: "loss", and those without a model; write it as JSON too."""
    rows = tuple(
        {"name": name, **dict(zip(losses, values, strict=True))}
        for name, *values in zip(names, *losses.values(), strict=True)
    )
    found = {"picture": str(picture), "mean_loss": sum(losses["loss"]) / len(rows), "rows": rows}
    result = LookResult(picture=picture, rows=rows, bad=bad, facts=found)
    content = {"mean_loss": found["mean_loss"], **facts, "images": rows, "bad": result.as_dict()["bad"]}
    write_numbers(picture.with_suffix(".json"), content)
    return result


def about_image(source: Source, index: int) -> dict[str, Any]:
    """What rows say about an image."""
    name = source.class_names[source.labels[index]] if source.has_labels else None
    return {"index": index, "name": source.name(index), "class": name}
