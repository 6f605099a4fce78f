"""`nextblock.convert`: from any format that `load` reads to any that is written, on disk or on the hub."""

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

    `dst` is a path where nothing is yet, or "hf:USER/NAME" for a "nextblock" or "timm" directory on the
    Hugging Face hub; without `to` its suffix tells the format. `image_size` (timm, onnx) writes the encoder
    at that size, and is that of an AIM file which does not tell it; `attention` (timm, onnx) chooses
    its mask and `layers` (onnx) outputs; `license` and `origin` go into the model card. `settings` say what
    the source does not tell, as in `load`: `head`, `num_heads`, `probe_layers`, `norm_eps`.
    """
    to = target_of(dst, to)
    for name, value, formats in (("layers", layers, ["onnx"]), ("attention", attention, ["onnx", "timm"])):
        fits = value is None or to in formats
        require(fits, f"{name} means nothing to the format {to}; it is for {' and '.join(formats)}")
    path = _place(dst, to)
    fallback = {} if image_size is None else {"image_size": image_size}
    found = read(src, LoadOptions(**settings, fallback=fallback))
    config = found.encoder_model.config
    is_timms = isinstance(config, TimmConfig)
    if to == "onnx" and is_timms:
        raise UsageError(
            f"{src} holds a classifier on timm's {config.architecture}, which the format onnx cannot hold; "
            "write it to nextblock, or its encoder to timm"
        )
    require(
        attention != "causal" or not is_timms,
        f"{src} holds an encoder of timm, which has no mask; leave attention out",
    )
    # Only an encoder of ours can bring its positions and its mask to another size.
    size = pair(config.image_size if image_size is None else image_size)
    require(
        size == pair(config.image_size) or (to != "nextblock" and not is_timms),
        f"{src} records images of {config.image_size} px and keeps them; leave image_size "
        "out, or write an encoder of this package to timm or onnx",
    )
    # Another origin keeps the licence; another licence drops the old one's name and link with it.
    provenance = provenance_of(found, str(src))
    if origin is not None:
        provenance = replace(provenance, origin=origin)
    if license is not None:
        provenance = Provenance(origin=provenance.origin, license=license)
    recorded = recorded_data(str(src) if found.path is None else found.path)
    data = recorded or official_data(config.image_size, config.in_chans)
    if path is None:
        repo = str(dst).removeprefix(HUB_SPEC)
        # The hub takes a folder, in one commit. Card and timm show its name: the repository's.
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
    """The format to write: the one given or, without one, that of the suffix; contradictions are refused."""
    suffix = "" if is_hub_spec(dst) else Path(dst).suffix.lower()
    # What is nearly a suffix is a slip ("x.onx"), unless --to is given; "v1.2" is a directory's name.
    known = (ONNX_SUFFIX, *WEIGHT_SUFFIXES)
    near = [] if to or suffix in known else difflib.get_close_matches(suffix, known, n=1, cutoff=0.8)
    slip = f"{dst}: {suffix} looks like a misspelt {''.join(near)}"
    require(not near, f"{slip}; mend it, or give the format (--to) if this names a directory")
    is_onnx = suffix == ONNX_SUFFIX
    to = to or ("onnx" if is_onnx else "nextblock")
    require(to in ("nextblock", "timm", "onnx"), f"to is {to!r}; it must be nextblock, timm or onnx")
    kind = "a directory" if to != "onnx" else "an .onnx file"
    fits = is_onnx == (to == "onnx") or (to == "onnx" and not suffix)
    require(
        fits and suffix not in WEIGHT_SUFFIXES,
        f"{dst}: {to} is {kind}, and {suffix} says otherwise; name {kind}, or give another format (--to)",
    )
    return to


def _place(dst: str | Path, to: Target) -> Path | None:
    """The path to write to, refused before anything is read if it cannot be; None for the hub."""
    if is_hub_spec(dst):
        require(to != "onnx", f"{dst}: only nextblock and timm go to the hub; write onnx to a path")
        return None
    path = Path(dst)
    path = path.resolve() if path.name in ("", "..") else path  # "." has no name of its own
    # An empty directory is as good as none, but not for a file.
    taken = to == "onnx" or any(path.iterdir()) if path.is_dir() else path.exists()
    require(not taken, f"{path} exists already; name a new place, or remove it first")
    # Looked at now: a long conversion must not end in an error that could be known at once.
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
    """Write a "nextblock" or "timm" directory, on its way to `repo` of the hub if one is given."""
    head = None if isinstance(found.model, NextBlockModel) else found.model.head_config
    encoder = found.encoder_model
    # timm's models hold neither our heads nor a predictor: what is left out is said, and never silent.
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
    """Bytes of a file with what lies beside it under its name, or of all files of a directory."""
    # An ONNX graph too large for one file has its weights beside it, under its name and a suffix.
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def provenance_of(found: Found, src: str) -> Provenance:
    """Where weights come from: as a card beside them says, else by the kind of their source."""
    if found.path is None:
        return timm_provenance(src)
    # From the general to the particular: what is known of such files, and over it whatever a card beside the
    # weights says, as somebody wrote that for these weights.
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
