"""Models from anywhere: a file's format is told by its content, a directory's by what lies in it.

RUN, a checkpoint, a probe's head, MODEL.safetensors     what this package writes
*.ckpt, mp_rank_00_model_states.pt                       official XTRA: models and classifiers
backbone.pth and head.pth, AIM's training layout         official AIM
DIR with a timm config.json, a ViT's state dict          timm
hf:USER/NAME, hf:USER/NAME/FILE, timm:NAME               any of these from the hub, or by timm's name
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextblock.checkpoint import (
    MODEL_FILE,
    CheckpointError,
    UnknownFormatError,
    is_safetensors,
    latest_checkpoint,
    read_metadata,
    read_model,
)
from nextblock.config import Size, pair
from nextblock.interop.aim import hub_settings, is_aim, is_aim_head, read_aim, stores_positions
from nextblock.interop.files import (
    AIM_FILES,
    WEIGHT_SUFFIXES,
    choose_weights,
    read_content,
    read_json,
    unwrapped,
)
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.timm import from_timm, is_timm_directory, is_timm_weights, read_timm
from nextblock.interop.timm_spec import TIMM_SPEC, timm_model
from nextblock.interop.xtra import is_xtra, read_xtra
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import require

__all__ = ["Found", "Told", "own_file", "read", "weight_file"]

DEEPSPEED_FILES = ("mp_rank_00_model_states.pt", "checkpoint/mp_rank_00_model_states.pt")
"""The model in what DeepSpeed, and Lightning with it, save as a directory."""
KNOWN = "a run, a checkpoint, official XTRA and AIM files, timm directories and ViTs, hf:USER/NAME, timm:NAME"


class Found(NamedTuple):
    """A model, and the words for the format it was found in."""

    model: NextBlockModel | ImageClassifier
    format: str
    image_size_assumed: bool = False
    """Nothing tells the size of its images; the encoder takes any."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the caller says of a file that does not say it; None: nothing."""

    head: str | Path | None = None
    """The head of an AIM classifier, which lies in a file of its own."""
    num_heads: int | None = None
    probe_layers: Literal["last", "best"] | Sequence[int] | None = None
    """Layers that an AIM head averages, counted from 0."""
    image_size: Size | None = None
    """AIM: of its images, in pixels; positions are computed for it."""
    image_size_if_untold: Size | None = None
    """The same, but where the file tells it, that counts."""
    norm_eps: float | None = None
    """AIM: epsilon of the LayerNorms; 1e-6 in the inference layout, 1e-5 in that of the training code."""
    to_start_from: bool = False
    """Weights to start from: a timm ViT may lose its class token."""

    def __post_init__(self) -> None:
        _check_numbers(self.num_heads, self.image_size, self.norm_eps)
        _check_layers(self.probe_layers)


def _check_numbers(num_heads: int | None, image_size: Size | None, norm_eps: float | None) -> None:
    require(num_heads is None or num_heads >= 1, f"num_heads is {num_heads}; it must be at least 1")
    require(norm_eps is None or norm_eps > 0, f"norm_eps is {norm_eps}; it must be above 0")
    require(
        image_size is None or min(pair(image_size)) >= 1,
        f"image_size is {image_size}; it must be at least 1 pixel",
    )


def _check_layers(given: object) -> None:
    numbers = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    require(
        given in (None, "last", "best")
        or (numbers and all(isinstance(one, int) and one >= 0 for one in given)),  # type: ignore[attr-defined]
        f'probe_layers is {given!r}; give "last", "best", or a list of layers counted from 0',
    )


def read(src: str | Path, told: Told) -> Found:
    """Build what `src` holds, on the CPU, in fp32 and evaluation mode; `CheckpointError` says why not."""
    found = _read(src, told)
    config = (found.model if isinstance(found.model, NextBlockModel) else found.model.encoder_model).config
    heads = "its own" if isinstance(config, TimmConfig) else config.num_heads
    if told.num_heads not in (None, heads):
        raise ValueError(
            f"{src} has {heads} attention heads, as it tells itself, and not {told.num_heads}; leave "
            "num_heads out"
        )
    return found


def _read(src: str | Path, told: Told) -> Found:
    origin = str(src)
    if origin.startswith(TIMM_SPEC):
        _refuse_settings_of_aim(told, origin)
        vit = timm_model(origin)
        return Found(from_timm(vit, origin, drop_prefix_tokens=told.to_start_from), "timm model")
    path = _place(src)
    if is_timm_directory(path):
        _refuse_settings_of_aim(told, origin)
        return Found(read_timm(path, drop_prefix_tokens=told.to_start_from), "timm directory")
    own = own_file(path)
    if own is not None:
        _refuse_settings_of_aim(told, origin)
        return Found(read_model(own), "nextblock")
    files = _weight_files(path, origin)
    if len(files) == len(AIM_FILES):
        told = replace(told, head=told.head or files[1])
    return _read_foreign(files[0], origin, told)


def weight_file(src: str | Path) -> Path:
    """The file of weights, or the first of two, that a path or `hf:` spec means."""
    path = _place(src)
    return own_file(path) or _weight_files(path, str(src))[0]


def _place(src: str | Path) -> Path:
    path = fetch(str(src)) if is_hub_spec(src) else Path(src)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; known: {KNOWN}")
    return path


def _weight_files(path: Path, origin: str) -> list[Path]:
    """A file itself; of a directory, the model's one or, for a backbone and its head, two."""
    if not path.is_dir():
        return [path]
    deepspeed = [path / name for name in DEEPSPEED_FILES if (path / name).is_file()]
    if deepspeed:
        return deepspeed[:1]
    files = [file.name for file in path.iterdir() if file.is_file()]
    chosen = choose_weights(files, origin, as_named=f"{path}/{{}}")
    if not chosen:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no model: looked for {MODEL_FILE}, checkpoints/step_*/{MODEL_FILE}, a timm "
            f"config.json and {', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)}, found {found}"
        )
    return [path / name for name in chosen]


def own_file(path: Path) -> Path | None:
    """The model file in this package's own format that a file, a checkpoint or a run means, if one does."""
    if not path.is_file():
        latest = None if (path / MODEL_FILE).is_file() else latest_checkpoint(path / "checkpoints")
        path = (latest or path) / MODEL_FILE
    return path if path.is_file() and _is_own(path) else None


def _is_own(path: Path) -> bool:
    return is_safetensors(path) and read_metadata(path).get("format") == "nextblock"


def _read_foreign(path: Path, origin: str, told: Told) -> Found:
    """Read a file that this package did not write."""
    content = read_content(path)
    if is_aim_head(content):
        raise UnknownFormatError(
            f"{origin} is the head of an AIM classifier alone; load its backbone, with head= this file "
            "(--head)"
        )
    if is_aim(content):
        return _read_aim(content, origin, told, read_json(path.parent / "config.json"))
    weights = unwrapped(content)
    if is_xtra(content):
        _refuse_settings_of_aim(told, origin)
        return Found(read_xtra(content, origin, num_heads=told.num_heads), "official XTRA")
    if is_timm_weights(weights):
        _refuse_settings_of_aim(told, origin)
        model = read_timm(path, weights, num_heads=told.num_heads, drop_prefix_tokens=told.to_start_from)
        return Found(model, "timm state dict")
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise UnknownFormatError(f"{origin} is in no known format (it holds: {held}); known: {KNOWN}")


def _read_aim(content: Any, origin: str, told: Told, settings: Mapping[str, Any]) -> Found:
    """AIM's files; `settings` are those of a config.json beside them, and what the caller says goes first."""
    head = None if told.head is None else _read_head(told.head)
    beside = hub_settings(settings) if _is_of(settings, content) else {}
    stored = stores_positions(content)
    sizes = (told.image_size, beside.get("image_size"), None if stored else told.image_size_if_untold)
    size = next((size for size in sizes if size is not None), None)
    probe_layers = beside.get("probe_layers") if told.probe_layers is None else told.probe_layers
    model = read_aim(
        content,
        origin,
        head=head,
        num_heads=told.num_heads or beside.get("num_heads"),
        probe_layers=probe_layers,
        image_size=size,
        norm_eps=told.norm_eps,
    )
    return Found(model, "official AIM", image_size_assumed=size is None and not stored)


def _is_of(settings: Mapping[str, Any], content: Any) -> bool:
    """Whether a config.json is that of these weights, and not of another file beside it."""
    projection = unwrapped(content).get("preprocessor.patchifier.proj.weight")
    width = None if projection is None else projection.shape[0]
    return bool(settings) and settings.get("embed_dim", width) == width


def _read_head(src: str | Path) -> Any:
    """The content of the second file of an AIM classifier."""
    path = fetch(str(src)) if is_hub_spec(src) else Path(src)
    content = read_content(path)
    if not is_aim_head(content):
        raise CheckpointError(f"{src} is no head of an AIM classifier; give Apple's head file")
    return content


def _refuse_settings_of_aim(told: Told, where: str) -> None:
    """Refuse what the caller says of a file that tells it itself, or has no use for it."""
    for name in ("head", "probe_layers", "image_size", "norm_eps"):
        if getattr(told, name) is not None:
            raise ValueError(f"{where} has no use for {name}={getattr(told, name)!r}; leave it out")
