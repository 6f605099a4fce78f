"""Initialising a model from other weights: matching tensors are copied, positions are resampled.

All other tensors stay fresh. A report lists every tensor, and settings that change what the weights compute.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextblock.checkpoint import CheckpointError
from nextblock.config import pair
from nextblock.interop.files import LoadOptions
from nextblock.interop.load import as_model, read
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_on
from nextblock.presets import model_config
from nextblock.settings import typed

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class InitReport:
    """How each parameter was initialised from another model's weights."""

    origin: str
    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    """Positions resampled to another grid."""
    fresh: tuple[str, ...]
    """Freshly initialised: missing in the other model, or of another shape there."""
    unused: tuple[str, ...]
    """Only in the other model."""
    differing: dict[str, tuple[object, object]]
    """Encoder settings that differ and change what the weights compute: {name: (here, there)}."""
    trained_otherwise: dict[str, tuple[object, object]]
    """Task settings that differ from those of the weights' training: {name: (here, there)}."""


def create_model(name: str, **overrides: Any) -> NextBlockModel:
    """Build a model of a size ("xtra-b16", "aim-600m") or a preset; `overrides` are `ModelConfig` fields.

    Weights are drawn from torch's global generator; `init=` copies those of another model.
    """
    model = NextBlockModel(model_config(name, **overrides))
    if model.config.init is not None:
        initialize(model, model.config.init)
    return model


def initialize(model: NextBlockModel, src: str | Path) -> InitReport:
    """Copy the weights of `src`, a source that `load` accepts, into a model, and log a summary by parts.

    If a file does not record its attention heads, this model's number is assumed, with a warning. Class and
    register tokens of a timm model are dropped.
    """
    config = model.config
    # Initial weights need not be exact, so heads that a file does not record come from this model. A head's
    # layers do not matter, as only the encoder is used.
    fallback = {"num_heads": config.num_heads, "probe_layers": (0,)}
    found = read(src, LoadOptions(fallback=fallback, drop_prefix_tokens=True))
    if "num_heads" in found.assumed:
        log.warning(
            "%s does not record its attention heads; assuming %d, as in this model (a wrong number changes "
            "its features: set model.num_heads to the file's)", src, config.num_heads
        )  # fmt: skip
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
        pairs = report.trained_otherwise.items()
        others = [f"{name} {typed(there)} there, {typed(here)} here" for name, (here, there) in pairs]
        log.info("  trained under other settings: %s", "; ".join(others))
    for name, (here, there) in report.differing.items():
        log.warning("  to start from the same function, set %s %s (here %s)", name, typed(there), typed(here))
    return report


def initialize_from(model: NextBlockModel, other: NextBlockModel, origin: str) -> InitReport:
    """Copy matching weights of another model and resample its positions; other tensors stay fresh.

    Raises `CheckpointError` if nothing of the encoder fits, or if only the number of attention heads differs.
    """
    here, there = model.config, other.config
    if here.embed_dim == there.embed_dim and here.num_heads != there.num_heads:
        raise CheckpointError(
            f"the encoder in {origin} has {there.num_heads} attention heads, this model {here.num_heads}: "
            f"the weights would fit and mean something else; set model.num_heads {there.num_heads}"
        )
    # Layers of another kind of predictor, or with other heads, may fit by name and shape but compute
    # something else. Fixed positions are the same function of the grid in every model.
    skipped: tuple[str, ...] = ()
    if here.predictor != there.predictor:
        skipped = ("predictor.blocks.", "predictor.norm.")
    elif here.predictor == "transformer" and here.predictor_heads != there.predictor_heads:
        skipped = ("predictor.blocks.",)
    # The state dict refers to the model's own tensors, so copying into them changes the model in place.
    own, theirs = model.state_dict(), other.state_dict()
    fixed = {name for name in own if name.endswith("pos_embed") and here.positions == "sincos"}
    loaded, resampled = [], []
    for name in own.keys() & theirs.keys() - fixed:
        if name.startswith(skipped):
            continue
        # Positions are resampled for another grid even if the number of patches is equal (2x8 and 4x4).
        is_position = name.endswith("pos_embed") and here.grid != there.grid
        if is_position and theirs[name].shape[-1] == own[name].shape[-1]:
            own[name].copy_(positions_on(here.grid, theirs[name], there))
            resampled.append(name)
        elif not is_position and theirs[name].shape == own[name].shape:
            own[name].copy_(theirs[name])
            loaded.append(name)
    done = {*loaded, *resampled}
    if not any(name.startswith("encoder.blocks.") for name in done):
        raise CheckpointError(
            f"nothing of the encoder in {origin} fits: it is {there.embed_dim} wide with "
            f"{there.depth} layers, this model {here.embed_dim} wide with {here.depth}; set model.embed_dim, "
            "model.depth and model.num_heads to match"
        )

    def unlike(*names: str) -> dict[str, tuple[object, object]]:
        values = {name: (getattr(here, name), getattr(there, name)) for name in names}
        if "block_size" in values and pair(here.block_size) == pair(there.block_size):
            del values["block_size"]
        return {f"model.{name}": (ours, its) for name, (ours, its) in values.items() if ours != its}

    # Differences are only reported, as a run may well start under other settings. Learned positions can start
    # from fixed ones, and a fresh bias is zero, so both keep the function. For LayerScale it only matters
    # whether there is one.
    differing = ["patch_size", "norm_eps", "patch_norm", "qk_scale", "class_token", "qk_norm"]
    differing += ["positions"] if here.positions != "learned" or there.positions == "rope" else []
    differing += [] if here.bias else ["bias"]
    differing += ["layer_scale"] if (here.layer_scale is None) != (there.layer_scale is None) else []
    # Blocks and their order do not affect an encoder under full attention that predicts nothing.
    task = ["feature_attention"]
    if there.predictor is not None or there.feature_attention == "causal":
        task += ["block_size", "order"] if there.predictor is None else ["block_size", "order", "prefix"]
    return InitReport(
        origin=origin,
        loaded=tuple(name for name in own if name in loaded),
        resampled=tuple(name for name in own if name in resampled),
        fresh=tuple(name for name in own if name not in done | fixed),
        unused=tuple(name for name in theirs if name not in done | fixed),
        differing=unlike(*differing),
        trained_otherwise=unlike(*task),
    )


def in_groups(names: Sequence[str]) -> dict[str, int]:
    """Count tensors by part of the model: {"encoder.blocks.0-11": 144, "predictor.norm": 2}."""
    # A part is the first two words of a name, plus the lowest and highest number of numbered layers.
    layers: dict[str, list[str]] = {}
    for name in names:
        words = name.split(".")
        layers.setdefault(".".join(words[:2]), []).append("".join(words[2:3]))
    groups = {}
    for part, numbers in layers.items():
        ends = sorted({int(number) for number in numbers if number.isdecimal()})
        ends = ends if len(ends) < 2 else [ends[0], ends[-1]]
        groups[".".join([part, *["-".join(map(str, ends))] * bool(ends)])] = len(numbers)
    return groups
