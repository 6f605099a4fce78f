"""`nextblock.convert`: read any format that `load` knows and write another, to disk or to the hub."""

from __future__ import annotations

import difflib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextblock.atomic import write_aside
from nextblock.checkpoint import MODEL_FILE, save_model
from nextblock.config import Attention, DataConfig, Size, pair
from nextblock.errors import UsageError
from nextblock.interop.cards import CARD_FILE, OFFICIAL_LICENSES, Provenance, model_card, read_provenance
from nextblock.interop.files import WEIGHT_SUFFIXES, LoadOptions, make_parent
from nextblock.interop.hub import HUB_SPEC, is_hub_spec, push
from nextblock.interop.load import Found, official_data, read, recorded_data
from nextblock.interop.timm import write_timm
from nextblock.interop.timm_spec import timm_provenance
from nextblock.models import NextBlockModel
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import require

log = logging.getLogger(__name__)

Target = Literal["nextblock", "timm", "onnx"]
ONNX_SUFFIX = ".onnx"


class Converted(NamedTuple):
    """Result of a conversion."""

    to: Target
    place: str
    """Path, or address on the hub."""
    num_bytes: int
    """Total size of all files."""
    difference: float | None
    """ONNX: largest difference between onnxruntime and torch, relative to the largest output."""


def convert(
    src: str | Path,
    dst: str | Path,
    to: Target | None = None,
    *,
    image_size: Size | None = None,
    layers: Sequence[int] | None = None,
    attention: Attention | None = None,
    license: str | None = None,  # noqa: A002 - the word that users know
    origin: str | None = None,
    **settings: Any,
) -> Converted:
    """Read a model as `nextblock.load` does and write it in the format `to`.

    `dst` is a new path, or "hf:USER/NAME" for a "nextblock" or "timm" directory on the Hugging Face hub.
    Without `to`, its suffix determines the format. `image_size` (timm, onnx) writes the encoder at that size;
    it is also the size of an AIM file that does not record one. `attention` (timm, onnx) chooses the mask and
    `layers` (onnx) the outputs. `license` and `origin` go into the model card. `settings` are those that the
    source does not record, as in `load`: `head`, `num_heads`, `probe_layers`, `norm_eps`.
    """
    to = target_of(dst, to)
    for name, value, formats in (("layers", layers, ["onnx"]), ("attention", attention, ["onnx", "timm"])):
        fits = value is None or to in formats
        require(fits, f"{name} does not apply to the format {to}, only to {' and '.join(formats)}")
    path = _place(dst, to)
    fallback = {} if image_size is None else {"image_size": image_size}
    found = read(src, LoadOptions(**settings, fallback=fallback))
    config = found.encoder_model.config
    is_timms = isinstance(config, TimmConfig)
    if to == "onnx" and is_timms:
        raise UsageError(
            f"{src} contains a classifier on timm's {config.architecture}, which onnx does not support; "
            "write it to nextblock, or its encoder to timm"
        )
    require(
        attention != "causal" or not is_timms,
        f"{src} contains a timm encoder, which has no mask; leave attention out",
    )
    # Only our own encoders can adapt positions and mask to another size.
    size = pair(config.image_size if image_size is None else image_size)
    require(
        size == pair(config.image_size) or (to != "nextblock" and not is_timms),
        f"{src} keeps its image size of {config.image_size} px; leave image_size "
        "out, or write an encoder of this package to timm or onnx",
    )
    # A new origin keeps the licence; a new licence drops the old one's name and link.
    provenance = provenance_of(found, str(src))
    if origin is not None:
        provenance = replace(provenance, origin=origin)
    if license is not None:
        provenance = Provenance(origin=provenance.origin, license=license)
    recorded = recorded_data(str(src) if found.path is None else found.path)
    data = recorded or official_data(config.image_size, config.in_chans)
    if path is None:
        repo = str(dst).removeprefix(HUB_SPEC)
        # The hub receives a folder in one commit. It has the repository's name, which card and timm show.
        with tempfile.TemporaryDirectory() as aside:
            folder = Path(aside) / repo.rpartition("/")[2]
            _write_directory(found, folder, to, image_size, attention, data, provenance, repo)
            return Converted(to, push(folder, str(dst)), _num_bytes(folder), None)
    difference = None
    if to == "onnx":
        from nextblock.interop.onnx import write_onnx

        use: dict[str, Any] = {"layers": layers, "attention": attention or "native", "image_size": image_size}
        difference = write_onnx(found.model, path, data=data, provenance=provenance, **use)
    else:
        _write_directory(found, path, to, image_size, attention, data, provenance)
    return Converted(to, str(path), _num_bytes(path), difference)


def target_of(dst: str | Path, to: Target | None) -> Target:
    """Format to write: `to`, or the format of the suffix; refuses contradictions."""
    suffix = "" if is_hub_spec(dst) else Path(dst).suffix.lower()
    # Without --to, an almost correct suffix is a typo ("x.onx"), but "v1.2" is a directory name.
    known = (ONNX_SUFFIX, *WEIGHT_SUFFIXES)
    near = [] if to or suffix in known else difflib.get_close_matches(suffix, known, n=1, cutoff=0.8)
    typo = f"{dst}: {suffix} looks like a misspelt {''.join(near)}"
    require(not near, f"{typo}; fix it, or give the format (--to) if this names a directory")
    is_onnx = suffix == ONNX_SUFFIX
    to = to or ("onnx" if is_onnx else "nextblock")
    require(to in ("nextblock", "timm", "onnx"), f"to is {to!r}; it must be nextblock, timm or onnx")
    kind = "a directory" if to != "onnx" else "an .onnx file"
    fits = is_onnx == (to == "onnx") or (to == "onnx" and not suffix)
    require(
        fits and suffix not in WEIGHT_SUFFIXES,
        f"{dst}: the format {to} needs {kind}, not {suffix}; name {kind}, or give another format (--to)",
    )
    return to


def _place(dst: str | Path, to: Target) -> Path | None:
    """Path to write to, checked before anything is read; None for the hub."""
    if is_hub_spec(dst):
        require(to != "onnx", f"{dst}: only nextblock and timm go to the hub; write onnx to a path")
        return None
    path = Path(dst)
    path = path.resolve() if path.name in ("", "..") else path  # "." has no name
    # An existing empty directory is fine, but not for a file.
    taken = to == "onnx" or any(path.iterdir()) if path.is_dir() else path.exists()
    require(not taken, f"{path} exists already; name a new place, or remove it first")
    # Checked now, so that a long conversion does not fail at the end.
    above = next(parent for parent in path.absolute().parents if parent.exists())
    require(above.is_dir(), f"{path} cannot be written: {above} is a file; name a place in a directory")
    return path


def _write_directory(
    found: Found,
    directory: Path,
    to: Target,
    image_size: Size | None,
    attention: Attention | None,
    data: DataConfig,
    provenance: Provenance,
    repo: str | None = None,
) -> None:
    """Write a "nextblock" or "timm" directory; `repo` is its repository if it will be pushed to the hub."""
    head = None if isinstance(found.model, NextBlockModel) else found.model.head_config
    encoder = found.encoder_model
    # timm's models have neither our heads nor a predictor, so log what is left out.
    if to == "timm":
        if head is not None:
            log.info("left out: the classifier's %s head, which timm's models do not have", head.kind)
        elif isinstance(encoder, NextBlockModel) and encoder.predictor is not None:
            log.info("left out: the predictor, which timm's models do not have")
        address = None if repo is None else f"hf-hub:{repo}"
        written: dict[str, Any] = {"image_size": image_size, "attention": attention or "native"}
        write_timm(encoder, directory, data=data, provenance=provenance, address=address, **written)
        return
    place = directory.name if repo is None else f"{HUB_SPEC}{repo}"
    use, notes = "features = model.encode(images)  # features.tokens, features.layers", []
    if head is not None:
        use = "logits = model(images)  # (b classes)"
        notes = [f"With a head ({head.kind}) of {head.num_classes} classes on layers {list(head.layers)}."]
    card = model_card(
        encoder.config,
        title=directory.name,
        library="nextblock",
        data=data,
        provenance=provenance,
        opening=f'import nextblock\nmodel = nextblock.load("{place}")\n{use}',
        notes=notes,
    )
    make_parent(directory)
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, found.model, data=data)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _num_bytes(path: Path) -> int:
    """Size of a directory, or of a file and files whose names extend its name."""
    # The weights of a large ONNX graph are in a second file with the same name and a further suffix.
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def provenance_of(found: Found, src: str) -> Provenance:
    """Origin and licence from the card next to the weights, else from the kind of source."""
    if found.path is None:
        return timm_provenance(src)
    # What is known about this kind of file is the default. A card next to the weights wins, as it was written
    # for them.
    name = src if is_hub_spec(src) else found.path.absolute().name
    config, kind = found.encoder_model.config, found.format
    known = Provenance(origin=f"{name}, a {kind}")
    if kind == "timm directory":
        known = timm_provenance(found.path)
    elif kind in OFFICIAL_LICENSES:
        origin = f"{name}, in the layout of {kind} files"
        known = Provenance(origin=origin, license=OFFICIAL_LICENSES[kind])
    elif isinstance(config, TimmConfig):
        known = Provenance(origin=f"{name}, trained with nextblock on timm's {config.architecture}")
    elif kind == "nextblock":
        started = "" if config.init is None else f", started from {config.init}"
        known = Provenance(origin=f"{name}, pre-trained with nextblock{started}")
    folder = found.path if found.path.is_dir() else found.path.parent
    return read_provenance(folder, origin=known.origin) or known
