"""`nextblock.convert`: from any format that `load` reads to any that is written, on disk or on the hub."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from nextblock.checkpoint import MODEL_FILE, save_model, write_aside
from nextblock.config import Attention, DataConfig, ModelConfig, Size
from nextblock.interop.cards import (
    CARD_FILE,
    OFFICIAL_LICENSES,
    Provenance,
    model_card,
    official_provenance,
    read_provenance,
)
from nextblock.interop.hub import HUB_SPEC, fetch, is_hub_spec, push
from nextblock.interop.image_data import official_data, recorded_data
from nextblock.interop.reading import Told, read
from nextblock.interop.timm_format import (
    TIMM_SPEC,
    is_timm_directory,
    timm_provenance,
    write_timm,
)
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.settings import require

__all__ = ["Converted", "Target", "convert"]

log = logging.getLogger(__name__)

Target = Literal["nextblock", "timm", "onnx", "xtra", "aim"]

SETTINGS_OF: dict[str, tuple[str, ...]] = {
    "nextblock": ("license", "origin"),
    "timm": ("license", "origin", "image_size"),
    "onnx": ("license", "origin", "image_size", "layers", "attention"),
    "xtra": (),
    "aim": (),
}
"""What each target understands, beside the settings that say how to read the source."""
TO_HUB = ("nextblock", "timm")


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
    Hugging Face hub. `image_size` (timm, onnx) writes the encoder at that size; `layers` and `attention`
    (onnx) choose outputs and mask; `license` and `origin` go into the model card. `head`, `num_heads`,
    `probe_layers` and `norm_eps` say of the source what its file does not tell, as in `load`.
    """
    _check_settings(
        to,
        dst,
        image_size=image_size,
        layers=layers,
        attention=attention,
        license=license,
        origin=origin,
    )
    place = fetch(str(src)) if is_hub_spec(src) else src
    reading = Told(head=head, num_heads=num_heads, probe_layers=probe_layers, norm_eps=norm_eps)
    model, source_format = read(src, reading)
    config = model.encoder_model.config if isinstance(model, ImageClassifier) else model.config
    data = recorded_data(place) or official_data(config)
    known = _provenance_of(src, place, source_format, config)
    provenance = Provenance(origin=origin or known.origin, license=license or known.license)
    if not is_hub_spec(dst):
        path = Path(dst)
        difference = _write(
            model,
            path,
            to,
            data=data,
            provenance=provenance,
            image_size=image_size,
            layers=layers,
            attention=attention or "native",
        )
        return Converted(to, str(path), _size(path), difference)
    repo = str(dst).removeprefix(HUB_SPEC)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / repo.rpartition("/")[2]
        _write(model, folder, to, data=data, provenance=provenance, image_size=image_size, repo=repo)
        return Converted(to, push(folder, str(dst)), _size(folder), None)


def _check_settings(to: Target, dst: str | Path, **settings: object) -> None:
    """Refuse what the target does not understand, and a place that is taken."""
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
    path = Path(dst)
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    require(not taken, f"{path} exists already; name a new place, or remove it first")


def _write(
    model: NextBlockModel | ImageClassifier,
    path: Path,
    to: Target,
    *,
    data: DataConfig,
    provenance: Provenance,
    image_size: Size | None = None,
    layers: Sequence[int] | None = None,
    attention: Attention = "native",
    repo: str | None = None,
) -> float | None:
    """Write a model to a path; ONNX gives the difference that it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if to == "timm":
        encoder_model = _encoder_for_timm(model)
        address = None if repo is None else f"hf-hub:{repo}"
        write_timm(
            encoder_model, path, data=data, provenance=provenance, image_size=image_size, address=address
        )
    elif to == "onnx":
        from nextblock.interop.onnx_export import write_onnx

        return write_onnx(
            model,
            path,
            data=data,
            provenance=provenance,
            layers=layers,
            attention=attention,
            image_size=image_size,
        )
    elif to == "nextblock":
        _write_nextblock(model, path, data=data, provenance=provenance, repo=repo)
    elif to == "xtra":
        from nextblock.interop.xtra import write_xtra

        write_xtra(model, path)
    else:
        from nextblock.interop.aim import write_aim

        write_aim(model, path)
    return None


def _encoder_for_timm(model: NextBlockModel | ImageClassifier) -> NextBlockModel:
    """What goes into timm's format, with a word on what does not."""
    if isinstance(model, ImageClassifier):
        log.info(
            "left out: the classifier's %s head, which timm's models do not have", model.head_config.kind
        )
        return model.encoder_model
    if model.predictor is not None:
        log.info("left out: the predictor, which timm's models do not have")
    return model


def _write_nextblock(
    model: NextBlockModel | ImageClassifier,
    directory: Path,
    *,
    data: DataConfig,
    provenance: Provenance,
    repo: str | None,
) -> None:
    is_classifier = isinstance(model, ImageClassifier)
    place = directory.name if repo is None else f"{HUB_SPEC}{repo}"
    use = "logits = model(images)" if is_classifier else "features = model.encode(images)"
    parts = "(b classes)" if is_classifier else "features.tokens, features.layers"
    notes = []
    if is_classifier:
        head = model.head_config
        notes.append(f"With a {head.kind} head of {head.num_classes} classes on layers {list(head.layers)}.")
    card = model_card(
        model.encoder_model.config if is_classifier else model.config,
        title=directory.name,
        library="nextblock",
        data=data,
        provenance=provenance,
        opening=f'import nextblock\nmodel = nextblock.load("{place}")\n{use}  # {parts}',
        notes=notes,
    )
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, model, data=data)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _size(path: Path) -> int:
    """Bytes of a file with what lies beside it under its name, or of all files of a directory."""
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())


# ---------------------------------------------------------------------------------- what is known of a source


def _provenance_of(src: str | Path, place: str | Path, source_format: str, config: ModelConfig) -> Provenance:
    """Where weights come from: as a card beside them says, else by the kind of their source."""
    if str(place).startswith(TIMM_SPEC):
        return timm_provenance(place)
    path = Path(place)
    carried = read_provenance(path if path.is_dir() else path.parent)
    if carried is not None:
        return carried
    if is_timm_directory(path):
        return timm_provenance(path)
    name = str(src) if is_hub_spec(src) else path.absolute().name
    if source_format in OFFICIAL_LICENSES:
        return official_provenance(source_format, name)
    if source_format != "nextblock":
        return Provenance(origin=f"{name}, a {source_format}")
    started = "" if config.init is None else f", started from {config.init}"
    return Provenance(origin=f"{name}, pre-trained with nextblock{started}")
