"""`nextblock.convert`: from any format that `load` reads to any that is written, on disk or on the hub."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from nextblock.atomic import write_aside
from nextblock.checkpoint import MODEL_FILE, save_model
from nextblock.config import Attention, DataConfig, ModelConfig, Size, pair
from nextblock.interop.aim_out import write_aim
from nextblock.interop.cards import (
    CARD_FILE,
    OFFICIAL_LICENSES,
    Provenance,
    model_card,
    official_provenance,
    read_provenance,
)
from nextblock.interop.files import make_parent
from nextblock.interop.hub import HUB_SPEC, fetch, is_hub_spec, push
from nextblock.interop.image_data import official_data, recorded_data
from nextblock.interop.reading import Told, read
from nextblock.interop.timm import is_timm_directory, write_timm
from nextblock.interop.timm_spec import TIMM_SPEC, timm_provenance
from nextblock.interop.xtra import write_xtra
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.heads import ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import require

__all__ = ["Converted", "Target", "convert"]

log = logging.getLogger(__name__)

Target = Literal["nextblock", "timm", "onnx", "xtra", "aim"]

SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "nextblock": ("license", "origin", "image_size"),
    "timm": ("license", "origin", "image_size"),
    "onnx": ("license", "origin", "image_size", "layers", "attention"),
    "xtra": (),
    "aim": (),
}
"""What each target understands, beside the settings that say how to read the source."""
TO_HUB = ("nextblock", "timm")
AS_FILE = ("onnx", "xtra")
"""Targets that are one file; `aim` may be either."""


class Converted(NamedTuple):
    """What a conversion wrote."""

    to: Target
    place: str
    """The path, or the address on the hub."""
    num_bytes: int
    """Of all files together."""
    difference: float | None
    """ONNX: onnxruntime's largest difference from torch, over the largest output."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: Target = "nextblock",
    *,
    image_size: Size | None = None,
    layers: Sequence[int] | None = None,
    attention: Attention | None = None,
    head: str | Path | None = None,
    num_heads: int | None = None,
    probe_layers: Literal["last", "best"] | Sequence[int] | None = None,
    norm_eps: float | None = None,
    license: str | None = None,  # noqa: A002 - the word that users know
    origin: str | None = None,
) -> Converted:
    """Read a model as `nextblock.load` does and write it in the format `to`.

    `dst` is a path where nothing is yet, or "hf:USER/NAME" for a "nextblock" or "timm" directory on the
    Hugging Face hub. `image_size` (timm, onnx) writes the encoder at that size, and is that of
    an AIM file which does not tell it; `layers` and `attention` (onnx) choose outputs and mask; `license` and
    `origin` go into the model card. `head`, `num_heads`, `probe_layers` and `norm_eps` say of the source what
    its file does not tell, as in `load`.
    """
    choices = {"image_size": image_size, "layers": layers, "attention": attention}
    _check_settings(to, dst, license=license, origin=origin, **choices)
    place = fetch(str(src)) if is_hub_spec(src) else src
    told = Told(
        head=head,
        num_heads=num_heads,
        probe_layers=probe_layers,
        norm_eps=norm_eps,
        image_size_if_untold=image_size,
    )
    found = read(src, told)
    config = _config_of(found.model)
    if isinstance(config, TimmConfig):
        _refuse_for_timms(src, to, image_size, config)
    else:
        _refuse_other_size(src, to, image_size, config)
    known = _provenance_of(src, place, found.format, config)
    wanted = _Wanted(
        data=recorded_data(place) or official_data(config.image_size, config.in_chans),
        provenance=known.changed(origin=origin, license=license),
        image_size=image_size,
        layers=layers,
        attention=attention or "native",
    )
    return (
        _push(found.model, str(dst), to, wanted) if is_hub_spec(dst) else _save(found.model, dst, to, wanted)
    )


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is written beside the weights, and the choices of some formats."""

    data: DataConfig
    provenance: Provenance
    image_size: Size | None
    layers: Sequence[int] | None
    attention: Attention
    repo: str | None = None
    """Of the hub, where they are going to lie."""


def _save(model: NextBlockModel | ImageClassifier, dst: str | Path, to: Target, wanted: _Wanted) -> Converted:
    path = _path(dst)
    difference = _write(model, path, to, wanted)
    return Converted(to, str(path), _size(path), difference)


def _push(model: NextBlockModel | ImageClassifier, dst: str, to: Target, wanted: _Wanted) -> Converted:
    repo = dst.removeprefix(HUB_SPEC)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / repo.rpartition("/")[2]
        _write(model, folder, to, replace(wanted, repo=repo))
        return Converted(to, push(folder, dst), _size(folder), None)


def _path(dst: str | Path) -> Path:
    """A path with a name of its own, which "." and ".." do not have."""
    path = Path(dst)
    return path.resolve() if path.name in ("", "..") else path


def _check_settings(to: Target, dst: str | Path, **settings: object) -> None:
    """Refuse what the target does not understand, and a place that cannot be written to."""
    require(to in SETTINGS_OF, f"to is {to!r}; it must be one of {', '.join(SETTINGS_OF)}")
    for name, value in settings.items():
        takers = [target for target, names in SETTINGS_OF.items() if name in names]
        require(
            value is None or name in SETTINGS_OF[to],
            f"{name} means nothing to the format {to}; it is for {' and '.join(takers)}",
        )
    if is_hub_spec(dst):
        require(to in TO_HUB, f"{dst}: only {' and '.join(TO_HUB)} go to the hub; write {to} to a path")
        return
    path = _path(dst)
    taken = to in AS_FILE or any(path.iterdir()) if path.is_dir() else path.exists()
    require(not taken, f"{path} exists already; name a new place, or remove it first")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    require(above.is_dir(), f"{path} cannot be written: {above} is a file; name a place in a directory")


def _refuse_other_size(src: str | Path, to: Target, image_size: Size | None, config: ModelConfig) -> None:
    """Refuse to change the size of a whole model, whose predictor is made for one."""
    wrong = to == "nextblock" and image_size is not None and pair(image_size) != pair(config.image_size)
    require(
        not wrong,
        f"{src} is of images of {config.image_size} px, as it tells itself, and stays so in nextblock's own "
        "format: leave image_size out, or write timm or onnx",
    )


def _refuse_for_timms(src: str | Path, to: Target, image_size: Size | None, config: TimmConfig) -> None:
    """Refuse what cannot be made of a classifier on an encoder of timm's."""
    require(
        to in ("nextblock", "timm"),
        f"{src} holds a classifier on timm's {config.architecture}, which the format {to} cannot hold; write "
        "it to nextblock, or its encoder to timm",
    )
    require(
        image_size is None or pair(image_size) == config.image_size,
        f"{src} is of images of {config.image_size} px, as it tells itself, and timm's {config.architecture} "
        "stays so; leave image_size out",
    )


def _config_of(model: NextBlockModel | ImageClassifier) -> ModelConfig | TimmConfig:
    return model.encoder_model.config if isinstance(model, ImageClassifier) else model.config


def _write(model: NextBlockModel | ImageClassifier, path: Path, to: Target, wanted: _Wanted) -> float | None:
    """Write a model to a path; ONNX gives the difference that it measured."""
    if to == "timm":
        write_timm(
            _encoder_for_timm(model),
            path,
            data=wanted.data,
            provenance=wanted.provenance,
            image_size=wanted.image_size,
            address=None if wanted.repo is None else f"hf-hub:{wanted.repo}",
        )
    elif to == "nextblock":
        _write_nextblock(model, path, wanted)
    elif to == "onnx":
        from nextblock.interop.onnx import write_onnx

        return write_onnx(
            model,
            path,
            data=wanted.data,
            provenance=wanted.provenance,
            layers=wanted.layers,
            attention=wanted.attention,
            image_size=wanted.image_size,
        )
    elif to == "xtra":
        write_xtra(model, path)
    else:
        write_aim(model, path)
    return None


def _encoder_for_timm(model: NextBlockModel | ImageClassifier) -> EncoderModel:
    """What goes into timm's format, with a word on what does not."""
    if isinstance(model, ImageClassifier):
        log.info(
            "left out: the classifier's %s head, which timm's models do not have", model.head_config.kind
        )
        return model.encoder_model
    if model.predictor is not None:
        log.info("left out: the predictor, which timm's models do not have")
    return model


def _write_nextblock(model: NextBlockModel | ImageClassifier, directory: Path, wanted: _Wanted) -> None:
    is_classifier = isinstance(model, ImageClassifier)
    place = directory.name if wanted.repo is None else f"{HUB_SPEC}{wanted.repo}"
    use = "logits = model(images)" if is_classifier else "features = model.encode(images)"
    parts = "(b classes)" if is_classifier else "features.tokens, features.layers"
    notes = []
    if is_classifier:
        head = model.head_config
        article = "an" if head.kind == "attentive" else "a"
        notes.append(
            f"With {article} {head.kind} head of {head.num_classes} classes on layers {list(head.layers)}."
        )
    card = model_card(
        _config_of(model),
        title=directory.name,
        library="nextblock",
        data=wanted.data,
        provenance=wanted.provenance,
        opening=f'import nextblock\nmodel = nextblock.load("{place}")\n{use}  # {parts}',
        notes=notes,
    )
    make_parent(directory)
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, model, data=wanted.data)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _size(path: Path) -> int:
    """Bytes of a file with what lies beside it under its name, or of all files of a directory."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())


# ---------------------------------------------------------------------------------- what is known of a source


def _provenance_of(
    src: str | Path, place: str | Path, source_format: str, config: ModelConfig | TimmConfig
) -> Provenance:
    """Where weights come from: as a card beside them says, else by the kind of their source."""
    known = _known_provenance(src, place, source_format, config)
    if str(place).startswith(TIMM_SPEC):
        return known
    path = Path(place)
    return read_provenance(path if path.is_dir() else path.parent, origin=known.origin) or known


def _known_provenance(
    src: str | Path, place: str | Path, source_format: str, config: ModelConfig | TimmConfig
) -> Provenance:
    """Where weights come from, by the kind of their source."""
    path = Path(place)
    if str(place).startswith(TIMM_SPEC) or is_timm_directory(path):
        return timm_provenance(place)
    name = str(src) if is_hub_spec(src) else path.absolute().name
    if source_format in OFFICIAL_LICENSES:
        return official_provenance(source_format, name)
    if source_format != "nextblock":
        return Provenance(origin=f"{name}, a {source_format}")
    if isinstance(config, TimmConfig):
        return Provenance(origin=f"{name}, trained with nextblock on timm's {config.architecture}")
    started = "" if config.init is None else f", started from {config.init}"
    return Provenance(origin=f"{name}, pre-trained with nextblock{started}")
