"""Models from anywhere and to anywhere: `load` tells a format by its content, `convert` writes others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from nextblock.checkpoint import CheckpointError, MissingSettingError
from nextblock.config import ModelConfig, Size
from nextblock.interop.reading import Told, read
from nextblock.interop.start import InitReport, in_groups, initialize_from
from nextblock.interop.timm import from_timm, is_timm_directory
from nextblock.interop.timm_spec import TIMM_SPEC, open_timm_encoder, parse_timm_spec
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.heads import ImageClassifier
from nextblock.presets import model_config

__all__ = ["create_model", "initialize", "load", "load_classifier", "load_model", "open_encoder"]

log = logging.getLogger(__name__)


def create_model(name: str, **overrides: Any) -> NextBlockModel:
    """A model of a size ("xtra-b16", "aim-600m") or a preset, with any `ModelConfig` field changed.

    Its weights are fresh, drawn from torch's global generator; with `init=`, those of another model.
    """
    model = NextBlockModel(model_config(name, **overrides))
    if model.config.init is not None:
        initialize(model, model.config.init)
    return model


def load(
    src: str | Path,
    head: str | Path | None = None,
    *,
    num_heads: int | None = None,
    probe_layers: Literal["last", "best"] | Sequence[int] | None = None,
    image_size: Size | None = None,
    norm_eps: float | None = None,
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier that a run, a file, `hf:USER/NAME[/FILE]` or `timm:NAME` holds.

    Understood: what this package writes; official XTRA and AIM files, models and classifiers; timm's vision
    transformers without class token. `head` is the second file of an AIM classifier. The others say what a
    foreign file does not tell: `num_heads` of the encoder, `probe_layers` that an AIM head averages,
    `image_size` in pixels and `norm_eps` of AIM files. On the CPU, in fp32 and evaluation mode. Raises
    `CheckpointError` where a file is not understood, or does not tell enough.
    """
    told = Told(
        head=head, num_heads=num_heads, probe_layers=probe_layers, image_size=image_size, norm_eps=norm_eps
    )
    return read(src, told).model


def load_model(src: str | Path, *, num_heads: int | None = None) -> NextBlockModel:
    """Load what can encode and perhaps predict: of a classifier, its encoder, timm's if it can be ours."""
    return _model_of(read(src, Told(num_heads=num_heads)).model, str(src))


def load_classifier(
    src: str | Path,
    head: str | Path | None = None,
    *,
    num_heads: int | None = None,
    probe_layers: Literal["last", "best"] | Sequence[int] | None = None,
) -> ImageClassifier:
    """Load as `load` does what must be a classifier; `CheckpointError` where it is a model without a head."""
    # Of timm the encoder alone is taken, and not every one of them can be loaded as one of ours.
    is_timm = str(src).startswith(TIMM_SPEC) or is_timm_directory(Path(src))
    found = None if is_timm else load(src, head, num_heads=num_heads, probe_layers=probe_layers)
    if found is None or isinstance(found, NextBlockModel):
        raise CheckpointError(
            f"{src} holds no classification head; `nextblock probe` and `nextblock finetune` train one, and "
            "write it in a directory of its name"
        )
    return found


def open_encoder(src: str | Path, *, num_heads: int | None = None) -> EncoderModel:
    """What can be evaluated: an encoder of ours, or any transformer of timm; of a classifier, its encoder.

    "timm:NAME" is taken as it is there, with its class and register tokens; only `nextblock_vit`, which is
    our own encoder under timm's name, comes back as ours.
    """
    spec = str(src)
    if not spec.startswith(TIMM_SPEC) or parse_timm_spec(spec).name.startswith("nextblock_vit"):
        found = read(src, Told(num_heads=num_heads)).model
        return found if isinstance(found, NextBlockModel) else found.encoder_model
    if num_heads is not None:
        raise ValueError(f"{spec} tells its attention heads itself; leave num_heads out")
    return open_timm_encoder(spec)


def initialize(model: NextBlockModel, src: str | Path) -> InitReport:
    """Give a model the weights of what `src` names, as `load` does, and log what became of them, by parts.

    The report names every tensor. Attention heads that a file does not tell are taken to be as many as the
    model has, and a warning says so; class and register tokens of a timm model are left out.
    """
    found = _model_of(_read_to_start(src, model.config), str(src), drop_prefix_tokens=True)
    report = initialize_from(model, found, str(src))
    log.info("weights of %s: %d tensors loaded", report.origin, len(report.loaded))
    unlike = [name for name in report.fresh if name in report.unused]
    for what, names in (
        ("resampled", report.resampled),
        ("fresh, of another shape or kind there", unlike),
        ("fresh, not there", [name for name in report.fresh if name not in unlike]),
        ("unused, not here", [name for name in report.unused if name not in unlike]),
    ):
        _log_names(what, names)
    if report.trained_otherwise:
        others = (
            f"{name} {_plain(there)} there, {_plain(here)} here"
            for name, (here, there) in report.trained_otherwise.items()
        )
        log.info("  trained under other settings: %s", "; ".join(others))
    for name, (here, there) in report.differing.items():
        log.warning(
            "  to go on from the same function, set %s %s (here %s)", name, _plain(there), _plain(here)
        )
    return report


def _log_names(what: str, names: Sequence[str]) -> None:
    """Log how many tensors of which parts; every single name for who asks for details."""
    if names:
        groups = (part if count == 1 else f"{part} ({count})" for part, count in in_groups(names).items())
        log.info("  %s: %s", what, ", ".join(groups))
        log.debug("  %s, by name: %s", what, ", ".join(names))


def _read_to_start(src: str | Path, config: ModelConfig) -> NextBlockModel | ImageClassifier:
    """Read weights to start from; what a head averages is of no account."""
    told = Told(to_start_from=True)
    stand_ins = {"num_heads": config.num_heads, "probe_layers": (0,), "image_size": config.image_size}
    while True:
        try:
            return read(src, told).model
        except MissingSettingError as error:
            told = replace(told, **{error.setting: stand_ins[error.setting]})
            if error.setting == "num_heads":
                log.warning(
                    "%s does not tell its attention heads; taken to be %d as here (a wrong number changes "
                    "its features: set model.num_heads to the file's)",
                    src,
                    config.num_heads,
                )


def _plain(value: object) -> str:
    """A value as it stands on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _model_of(
    loaded: NextBlockModel | ImageClassifier, origin: str, *, drop_prefix_tokens: bool = False
) -> NextBlockModel:
    """Of a classifier its encoder; `CheckpointError` where that is timm's and of another kind than ours."""
    model = loaded.encoder_model if isinstance(loaded, ImageClassifier) else loaded
    if isinstance(model, TimmEncoder):
        return from_timm(model.encoder, origin, drop_prefix_tokens=drop_prefix_tokens)
    return model
