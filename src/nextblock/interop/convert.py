"""`nextblock.convert`: read any format that `load` knows and write another, to disk or to the hub."""

from __future__ import annotations

import difflib
import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextblock.atomic import make_directory, write_aside
from nextblock.checkpoint import MODEL_FILE, RECORDED_DATA, save_model, write_safetensors
from nextblock.config import Attention, DataConfig, ModelConfig, Size, pair
from nextblock.interop.cards import CARD_FILE, UNSPECIFIED, Provenance, model_card, read_provenance
from nextblock.interop.files import MAIN_FILES, WEIGHT_SUFFIXES, LoadOptions
from nextblock.interop.hub import HUB_SPEC, is_hub_spec, push
from nextblock.interop.load import Found, official_data, read, recorded_data
from nextblock.interop.onnx import write_onnx
from nextblock.interop.timm import FORMAT_VERSION, data_at, encoder_at
from nextblock.interop.timm_models import TIMM_EPS, as_timm_has, timm_architecture
from nextblock.interop.timm_spec import parse_timm_spec, timm_settings
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import require, to_dict

log = logging.getLogger(__name__)

Target = Literal["nextblock", "timm", "onnx"]
ONNX_SUFFIX = ".onnx"
OFFICIAL_LICENSES = {
    "official AIM": "Apple's own licence, if these are the weights that Apple released; see their origin",
    "official NEPA": "apache-2.0, if these are the weights that SixAILab released; see their origin",
    "official XTRA": "none is stated for the official XTRA weights, if these are they; ask their authors",
}
"""Licences by the format that `load` detects. Other people's weights may have these layouts too."""


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
    encoder, config = found.encoder_model, found.encoder_model.config
    is_timms = isinstance(config, TimmConfig)
    require(not (is_timms and to == "onnx"), f"{src} has a timm encoder, which onnx does not support")
    require(not (is_timms and attention == "causal"), f"{src} has a timm encoder, which has no mask")
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
    shared: dict[str, Any] = {"data": data, "provenance": provenance}
    other: dict[str, Any] = {"image_size": image_size, "attention": attention or "native"}
    head = None if isinstance(found.model, NextBlockModel) else found.model.head_config
    if to == "timm" and head is not None:
        log.info("left out: the classifier's %s head, which timm's models do not have", head.kind)
    elif to == "timm" and isinstance(encoder, NextBlockModel) and encoder.predictor is not None:
        log.info("left out: the predictor, which timm's models do not have")
    if path is None:
        repo = str(dst).removeprefix(HUB_SPEC)
        # The hub receives a folder in one commit. It has the repository's name, which card and timm show.
        with tempfile.TemporaryDirectory() as aside:
            folder = Path(aside) / repo.rpartition("/")[2]
            if to == "timm":
                write_timm(encoder, folder, address=f"hf-hub:{repo}", **shared, **other)
            else:
                _write_own(found, folder, address=str(dst), **shared)
            return Converted(to, push(folder, str(dst)), _num_bytes(folder), None)
    make_directory(path.parent)
    difference = None
    if to == "onnx":
        difference = write_onnx(found.model, path, layers=layers, **shared, **other)
    elif to == "timm":
        write_timm(encoder, path, address=f"local-dir:{path.name}", **shared, **other)
    else:
        _write_own(found, path, address=path.name, **shared)
    return Converted(to, str(path), _num_bytes(path), difference)


def target_of(dst: str | Path, to: Target | None) -> Target:
    """Format to write: `to`, or the format of the suffix; refuses contradictions."""
    suffix = "" if is_hub_spec(dst) else Path(dst).suffix.lower()
    # Without --to, an almost correct suffix is a typo ("x.onx"), but "v1.2" is the name of a directory.
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
    # Checked before a model is loaded or downloaded, too.
    above = next(parent for parent in path.absolute().parents if parent.exists())
    require(above.is_dir(), f"{path} cannot be written: {above} is a file; choose another place")
    return path


def _num_bytes(path: Path) -> int:
    """Size of a directory, or of a file and files whose names extend its name."""
    # The weights of a large ONNX graph are in a second file with the same name and a further suffix.
    files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
    return sum(file.stat().st_size for file in files if file.is_file())


def provenance_of(found: Found, src: str) -> Provenance:
    """Origin and licence from the card next to the weights, else from the kind of source."""
    config, kind, path = found.encoder_model.config, found.format, found.path
    name = src if path is None or is_hub_spec(src) else path.absolute().name
    if kind in ("timm model", "timm directory"):
        stated = timm_settings(path or src).get("license")
        origin = f"{name}, a {kind}" if path else f"timm's {parse_timm_spec(src).name}"
        known = Provenance(origin=origin, license=stated or UNSPECIFIED)
    elif kind in OFFICIAL_LICENSES:
        origin = f"{name}, in the layout of {kind} files"
        known = Provenance(origin=origin, license=OFFICIAL_LICENSES[kind])
    elif isinstance(config, TimmConfig):
        known = Provenance(origin=f"{name}, trained with nextblock on timm's {config.architecture}")
    elif kind == "nextblock":
        teacher = "" if config.teacher is None else f" on features of {config.teacher}"
        started = "" if config.init is None else f", started from {config.init}"
        known = Provenance(origin=f"{name}, pre-trained with nextblock{teacher}{started}")
    else:
        known = Provenance(origin=f"{name}, a {kind}")
    if path is None:
        return known
    # A card next to the weights wins, as it was written for them.
    return read_provenance(path if path.is_dir() else path.parent, origin=known.origin) or known


# ----------------------------------------------------------------------------------------------- directories


def _write_own(
    found: Found, directory: Path, *, address: str, data: DataConfig, provenance: Provenance
) -> None:
    """Write a model or classifier as a directory that `nextblock.load(address)` opens."""
    use, notes = "features = model.encode(images)  # features.tokens, features.layers", []
    if not isinstance(found.model, NextBlockModel):
        head = found.model.head_config
        use = "logits = model(images)  # (b classes)"
        notes = [f"With a head ({head.kind}) of {head.num_classes} classes on layers {list(head.layers)}."]
    card = model_card(
        found.encoder_model.config,
        title=directory.name,
        library="nextblock",
        data=data,
        provenance=provenance,
        opening=f'import nextblock\nmodel = nextblock.load("{address}")\n{use}',
        notes=notes,
    )
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, found.model, data=data)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def write_timm(
    model: EncoderModel,
    directory: Path,
    *,
    address: str,
    data: DataConfig,
    provenance: Provenance,
    image_size: Size | None = None,
    attention: Attention = "native",
) -> None:
    """Write an encoder as a directory that `timm.create_model(address)` opens.

    An encoder under full attention with timm's epsilon becomes one of timm's own architectures, with all
    arguments given. So does one with a class token, rotary positions, normed queries or LayerScale. Any other
    becomes `nextblock_vit` (see `timm_models`). `image_size` and `attention` write one of our encoders at
    that size and with that mask. The predictor is left out.
    """
    # At another size, positions are resampled, and the size that images are resized to scales along.
    if isinstance(model, NextBlockModel):
        whole, model = model, encoder_at(model, image_size, attention)
        data = data_at(data, whole.config, model.config)
    config = model.config
    size = pair(config.image_size)
    # timm stores a fraction of the image instead of a size, and rounds down to whole pixels. If that loses a
    # pixel, half a pixel more in the divisor gives the right size.
    resize_px = data.resize_px(config.image_size)
    crop_pct = min(size) / resize_px
    if math.floor(min(size) / crop_pct) != resize_px:
        crop_pct = min(size) / (resize_px + 0.5)
    pretrained_cfg = {
        "num_classes": 0,
        "input_size": [config.in_chans, *size],
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": data.val_crop,
        "mean": list(data.mean),
        "std": list(data.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **({"license": provenance.license} if provenance.license != UNSPECIFIED else {}),
    }
    # timm builds from its arguments in config.json. They lack some of our settings, so we build from
    # "nextblock". It is in both files, as one may be copied without the other.
    described: dict[str, Any] = {"num_classes": 0, "num_features": config.embed_dim}
    metadata = {"format": "pt", "data": json.dumps({name: getattr(data, name) for name in RECORDED_DATA})}
    weights, register = model.encoder.state_dict(), ""
    place = address.partition(":")[2]
    if isinstance(config, ModelConfig):
        scaled = config.qk_scale is not None
        require(not scaled, "timm does not support model.qk_scale; write to nextblock or onnx")
        architecture, arguments = timm_architecture(config)
        weights = as_timm_has(weights, config)
        own = {"format_version": FORMAT_VERSION, "model": to_dict(config)}
        described |= {"global_pool": "avg", "nextblock": own}
        metadata["nextblock"] = json.dumps(own)
        notes = [f'`transformers.AutoModel.from_pretrained("{place}")` and `nextblock.load` open it too.']
        if architecture == "nextblock_vit":
            register = "import nextblock.interop.timm_models  # registers nextblock_vit\n"
            notes.append("timm and transformers need the second line above, and nextblock installed.")
        elif config.norm_eps < TIMM_EPS:
            notes.append(
                "timm's norms have a larger epsilon, so the tokens are scaled by a power of two up to the "
                "last norm. This changes the outputs of single layers, and fp16 may overflow."
            )
        elif config.positions == "sincos":
            notes.append(
                "At another `img_size=` timm resamples the fixed positions instead of recomputing them: "
                "convert again with `--image_size`."
            )
    else:
        architecture, arguments = config.architecture.partition(".")[0], dict(config.arguments)
        settings: Any = model.encoder.pretrained_cfg
        pretrained_cfg |= {n: settings.get(n) for n in ("fixed_input_size", "first_conv", "classifier")}
        notes = [f"Commands of nextblock accept it as `--model timm:{address}`."]
    described |= {"architecture": architecture, "model_args": arguments, "pretrained_cfg": pretrained_cfg}
    card = model_card(
        config,
        title=place.rpartition("/")[2],
        library="timm",
        data=data,
        provenance=provenance,
        opening=f'import timm\n{register}model = timm.create_model("{address}", pretrained=True).eval()\n'
        "features = model.forward_features(images)  # (b n d), model(images) pools them",
        notes=notes,
    )
    with write_aside(directory) as aside:
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(aside / MAIN_FILES[0], weights, metadata)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")
