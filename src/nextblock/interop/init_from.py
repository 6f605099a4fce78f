"""Starting from other weights: what fits is copied, positions are resampled, the rest stays fresh.

Nothing is skipped silently: a report names every tensor, and the settings under which the same weights
compute something else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextblock.checkpoint import CheckpointError
from nextblock.config import ModelConfig, pair
from nextblock.interop.load import as_model, read
from nextblock.interop.options import LoadOptions
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_on
from nextblock.presets import model_config

__all__ = ["InitReport", "create_model", "in_groups", "initialize", "initialize_from"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """What became of every parameter when a model was given another's weights."""

    origin: str
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    """Positions brought to another grid."""
    fresh: tuple[str, ...]
    """Missing in the other model, or of another shape: as they were initialised."""
    unused: tuple[str, ...]
    """In the other model only."""
    differing: dict[str, tuple[object, object]]
    """Settings of the encoder by which the same weights compute something else: {name: (here, there)}."""
    trained_otherwise: dict[str, tuple[object, object]]
    """Settings of the task under which the weights were trained, where they are others here."""


def create_model(name: str, **overrides: Any) -> NextBlockModel:
    """A model of a size ("xtra-b16", "aim-600m") or a preset, with any `ModelConfig` field changed.

    Its weights are fresh, drawn from torch's global generator; with `init=`, those of another model.
    """
    model = NextBlockModel(model_config(name, **overrides))
    if model.config.init is not None:
        initialize(model, model.config.init)
    return model


def initialize(model: NextBlockModel, src: str | Path) -> InitReport:
    """Give a model the weights of what `src` names, as `load` does, and log what became of them, by parts.

    The report names every tensor. If a file does not tell its attention heads, the model's own number is
    taken, and a warning says so; class and register tokens of a timm model are left out.
    """
    config = model.config
    fallback = {"num_heads": config.num_heads, "probe_layers": (0,), "image_size": config.image_size}
    found = read(src, LoadOptions(fallback=fallback, drop_prefix_tokens=True))
    if "num_heads" in found.assumed:
        log.warning(
            "%s does not tell its attention heads; taken to be %d as here (a wrong number changes its "
            "features: set model.num_heads to the file's)",
            src,
            config.num_heads,
        )
    report = initialize_from(model, as_model(found, str(src), drop_prefix_tokens=True), str(src))
    log.info("weights of %s: %d tensors loaded", report.origin, len(report.loaded))
    unlike = [name for name in report.fresh if name in report.unused]
    for what, names in (
        ("resampled", report.resampled),
        ("fresh, of another shape or kind there", unlike),
        ("fresh, not there", [name for name in report.fresh if name not in unlike]),
        ("unused, not here", [name for name in report.unused if name not in unlike]),
    ):
        if names:
            groups = (part if count == 1 else f"{part} ({count})" for part, count in in_groups(names).items())
            log.info("  %s: %s", what, ", ".join(groups))
            log.debug("  %s, by name: %s", what, ", ".join(names))
    if report.trained_otherwise:
        others = [
            f"{n} {_typed(there)} there, {_typed(here)} here"
            for n, (here, there) in report.trained_otherwise.items()
        ]
        log.info("  trained under other settings: %s", "; ".join(others))
    for name, (here, there) in report.differing.items():
        log.warning(
            "  to go on from the same function, set %s %s (here %s)", name, _typed(there), _typed(here)
        )
    return report


def _typed(value: object) -> str:
    """A value as it stands on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def initialize_from(model: NextBlockModel, other: NextBlockModel, origin: str) -> InitReport:
    """Give a model another's weights: what fits is copied, positions are resampled, the rest stays fresh.

    Fixed positions stay as they are. A predictor of another kind or with other attention heads gives nothing
    of its layers. Raises `CheckpointError` where nothing of the encoder fits, or all of it but the number of
    attention heads, as that is surely not what was meant.
    """
    here, there = model.config, other.config
    if here.embed_dim == there.embed_dim and here.num_heads != there.num_heads:
        raise CheckpointError(
            f"the encoder in {origin} has {there.num_heads} attention heads, this model {here.num_heads}: "
            f"the weights would fit and mean something else; set model.num_heads {there.num_heads}"
        )
    own, theirs = model.state_dict(), other.state_dict()
    loaded, resampled = [], []
    fixed = {name for name in own if name.endswith("pos_embed") and model.config.positions == "sincos"}
    for name in own.keys() - fixed - set(_meaningless(model.config, other.config, own)):
        if name not in theirs:
            continue
        is_position = name.endswith("pos_embed") and model.config.grid != other.config.grid
        if is_position and theirs[name].shape[-1] == own[name].shape[-1]:
            own[name].copy_(positions_on(model.config.grid, theirs[name], other.config))
            resampled.append(name)
        elif not is_position and theirs[name].shape == own[name].shape:
            own[name].copy_(theirs[name])
            loaded.append(name)
    done = {*loaded, *resampled}
    if not any(name.startswith("encoder.blocks.") for name in done):
        raise CheckpointError(
            f"nothing of the encoder in {origin} fits: it is {other.config.embed_dim} wide with "
            f"{other.config.depth} layers, this model {model.config.embed_dim} wide with "
            f"{model.config.depth}; set model.embed_dim, model.depth and model.num_heads as there"
        )
    return InitReport(
        origin=origin,
        loaded=tuple(name for name in own if name in loaded),
        resampled=tuple(name for name in own if name in resampled),
        fresh=tuple(name for name in own if name not in done | fixed),
        unused=tuple(name for name in theirs if name not in done | fixed),
        differing=_differing(model.config, other.config),
        trained_otherwise=_trained_otherwise(model.config, other.config),
    )


def in_groups(names: Sequence[str]) -> dict[str, int]:
    """How many tensors each part of a model has: {"encoder.blocks.0-11": 144, "predictor.norm": 2}."""
    counts: dict[str, int] = {}
    layers: dict[str, set[int]] = {}
    for name in names:
        part = ".".join(name.split(".")[:2])
        counts[part] = counts.get(part, 0) + 1
        number = re.match(r"\d+", name.removeprefix(f"{part}."))
        layers.setdefault(part, set()).update([] if number is None else [int(number[0])])
    return {f"{part}{_numbers(layers[part])}": count for part, count in counts.items()}


def _numbers(found: set[int]) -> str:
    """The layers ".2", ".0-11" or ".0-3,7"."""
    starts = sorted(number for number in found if number - 1 not in found)
    ends = sorted(number for number in found if number + 1 not in found)
    runs = (str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return f".{','.join(runs)}" if found else ""


def _meaningless(own: ModelConfig, theirs: ModelConfig, names: dict[str, Any]) -> list[str]:
    """Tensors of a predictor that may have the same name and shape there and do something else."""
    parts: tuple[str, ...] = ()
    if own.predictor != theirs.predictor:
        parts = ("predictor.blocks.", "predictor.norm.")
    elif own.predictor == "transformer" and own.predictor_heads != theirs.predictor_heads:
        parts = ("predictor.blocks.",)
    return [name for name in names if name.startswith(parts)] if parts else []


def _differing(own: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[object, object]]:
    """Settings of the encoder by which the same weights compute something else: {name: (here, there)}."""
    names = ["patch_size", "norm_eps", "patch_norm", "qk_scale"]
    names += ["positions"] if own.positions == "sincos" else []  # learned ones begin where fixed ones are
    names += ["bias"] if not own.bias else []  # a fresh bias is zero: the same function
    return _unlike(names, own, theirs)


def _trained_otherwise(own: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[object, object]]:
    """What the weights were trained for; blocks mean nothing to full attention without a predictor."""
    names = ["feature_attention"]
    if theirs.predictor is not None or theirs.feature_attention == "causal":
        names += ["block_size", "order"] if theirs.predictor is None else ["block_size", "order", "prefix"]
    return _unlike(names, own, theirs)


def _unlike(names: list[str], own: ModelConfig, theirs: ModelConfig) -> dict[str, tuple[object, object]]:
    values = {name: (getattr(own, name), getattr(theirs, name)) for name in names}
    return {
        f"model.{name}": (here, there)
        for name, (here, there) in values.items()
        if (pair(here) != pair(there) if name == "block_size" else here != there)
    }
